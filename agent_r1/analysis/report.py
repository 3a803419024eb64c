"""The report at the end of a run: before and after on the test split, an episode of each, the
curve.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from agent_r1.run.folder import RunFolder
from agent_r1.training.evaluate import Evaluation
from agent_r1.types import Group, Trajectory
from agent_r1.utils.durable import write_atomically
from agent_r1.utils.run_files import CURVE, RESULT


def write_result(
    run: RunFolder,
    before: dict[str, Evaluation],
    after: dict[str, Evaluation],
    *,
    train_seconds: float,
) -> dict[str, Any]:
    """Writes ``result.json``: success by category, before and after, sampled; and the same
    for greedy.

    ``before`` and ``after`` hold the evaluations ``"sampled"`` and ``"greedy"``.
    """

    def success(evaluation: Evaluation) -> dict[str, float | None]:
        return {name: score.success for name, score in evaluation.categories.items()}

    sampled = before["sampled"]
    result = {
        "before": success(sampled),
        "after": success(after["sampled"]),
        "greedy": {"before": success(before["greedy"]), "after": success(after["greedy"])},
        "tasks": min(score.tasks for score in sampled.categories.values()),
        "seconds": {
            "train": train_seconds,
            "eval": sum(e.seconds for e in [*before.values(), *after.values()]),
        },
        "details": {
            f"{when} {how}": evaluation.figures()
            for when, evaluations in (("before", before), ("after", after))
            for how, evaluation in evaluations.items()
        },
    }
    write_atomically(run.path / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def draw_curve(run: RunFolder) -> Path | None:
    """Success over the iterations as ``curve.png``, and below it each part of the process rewards;
    ``None`` without matplotlib (the extra ``plot``).
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = run.metrics()
    trained = [
        (row["iteration"], _or_gap(row["figures"]["success"])) for row in rows if "figures" in row
    ]
    parts = sorted({k for row in rows for k in row.get("figures", ()) if k.startswith("process/")})
    figure, panels = pyplot.subplots(
        1 + bool(parts),
        figsize=(7, 6.5 if parts else 4),
        height_ratios=(2, 1) if parts else None,
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    axes = panels[0][0]
    axes.plot(*zip(*trained, strict=True), color="0.7", label="training episodes")
    validated = [
        (row["iteration"], row["validation"]["categories"]) for row in rows if "validation" in row
    ]
    for category in validated[0][1] if validated else []:
        points = [
            (iteration, _or_gap(scores.get(category, {}).get("success")))
            for iteration, scores in validated
        ]
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            label=f"validation, category {category or 'all'}",
        )
    axes.set(ylabel="success", ylim=(0, 1.02), title=run.path.name)
    for part in parts:
        points = [
            (r["iteration"], r["figures"].get(part, math.nan)) for r in rows if "figures" in r
        ]
        panels[1][0].plot(*zip(*points, strict=True), label=part.removeprefix("process/"))
        panels[1][0].set(ylabel="process reward")
    for (panel,) in panels:
        panel.legend(loc="lower right")
        panel.grid(alpha=0.3)
    panels[-1][0].set(xlabel="iteration")
    path = run.path / CURVE
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _or_gap(value: float | None) -> float:
    """A figure that was not measured is a gap in the curve, not 0."""
    return math.nan if value is None else value


def table(result: dict[str, Any]) -> str:
    """The before/after table as plain text."""
    lines = [f"{'category':>10}  {'sampled':>17}  {'greedy':>17}   ({result['tasks']} tasks each)"]
    for name in result["before"]:
        sampled = _change(result["before"][name], result["after"][name])
        greedy = _change(result["greedy"]["before"][name], result["greedy"]["after"][name])
        lines.append(f"{name or 'all':>10}  {sampled:>17}  {greedy:>17}")
    return "\n".join(lines)


def _change(before: float | None, after: float | None) -> str:
    return " -> ".join("none" if value is None else f"{value:.3f}" for value in (before, after))


def contrast(before: list[Group], after: list[Group]) -> tuple[Trajectory, Trajectory]:
    """The same task before and after: of those solved only now, the one of median length."""
    pairs = [(b.trajectories[0], a.trajectories[0]) for b, a in zip(before, after, strict=True)]
    learned = [pair for pair in pairs if not _solved(pair[0]) and _solved(pair[1])]
    by_length = sorted(learned or pairs, key=lambda pair: len(pair[1].steps))
    return by_length[len(by_length) // 2]


def _solved(trajectory: Trajectory) -> bool:
    return trajectory.outcome is not None and trajectory.outcome.success
