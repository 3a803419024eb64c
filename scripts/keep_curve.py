"""Writes a run's curves where results are kept: a CSV of every iteration, a PNG of their means.

python scripts/keep_curve.py runs/rl docs/results/multihop-smollm2/grpo
"""

import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np

from agent_r1.bench.statistics import trailing_mean
from agent_r1.run.folder import RunFolder

TRAINED = ["success", "f1", "supporting_recall", "answer_shown", "answered", "calls", "entropy"]
HELD_OUT = ["em", "f1", "supporting_recall", "calls"]
PANELS = ["success", "supporting_recall", "calls", "entropy"]
WINDOW = 5


def main(run: str, out: str) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = RunFolder.open(run).metrics()
    with Path(f"{out}_curve.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        held_out = [f"validation_{name}" for name in HELD_OUT]
        writer.writerow(["iteration", *TRAINED, "rollout_s", "learner_s", *held_out])
        for row in rows:
            figures, seconds = row.get("figures", {}), row.get("seconds", {})
            validation = row.get("validation", {}).get("total", {}).get("metrics", {})
            cells = [figures.get(name) for name in TRAINED]
            cells += [seconds.get("rollout"), seconds.get("learner")]
            cells += [validation.get(name) for name in HELD_OUT]
            writer.writerow([row["iteration"], *map(_rounded, cells)])
    trained = [row["figures"] for row in rows if "figures" in row]
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(14, 3.2), layout="constrained")
    for axes, name in zip(panels, PANELS, strict=True):
        values = np.array([figures[name] for figures in trained])
        axes.plot(range(1, len(values) + 1), values, color="0.8")
        axes.plot(range(1, len(values) + 1), trailing_mean(values, WINDOW))
        axes.set_title(name)
        axes.set_xlabel("iteration")
    figure.savefig(f"{out}_curve.png", dpi=90)


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    main(*sys.argv[1:])
