"""An experiment's figures: learning curves, and bars for the test sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent_r1.bench.experiment import Experiment, Job
from agent_r1.bench.statistics import trailing_mean
from agent_r1.bench.tables import TRAINING, Rows, curve_of, set_table

WINDOW = 5
"""Iterations that a drawn curve is averaged over."""


def draw_figures(experiment: Experiment, jobs: Sequence[Job], runs: Path, out: Path) -> list[Path]:
    """PNG files; none without matplotlib (the extra ``plot``)."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return []
    matplotlib.use("agg")
    from matplotlib import pyplot

    paths = []
    if any(job.train for job in jobs):
        for name, draw in (("curves", _success), ("training", _training)):
            figure = draw(pyplot, experiment, jobs, runs)
            paths.append(out / f"{name}.png")
            figure.savefig(paths[-1], dpi=110)
            pyplot.close(figure)
    if experiment.set:
        figure = _bars(pyplot, set_table(experiment, jobs, runs))
        paths.append(out / "bars.png")
        figure.savefig(paths[-1], dpi=110)
        pyplot.close(figure)
    return paths


def _success(pyplot: Any, experiment: Experiment, jobs: Sequence[Job], runs: Path) -> Any:
    """A panel per start, a line per arm: mean over the seeds, the band from least to most."""
    num = len(experiment.start)
    figure, panels = pyplot.subplots(
        1, num, figsize=(max(7, 4.5 * num), 4.2), layout="constrained", squeeze=False, sharey=True
    )
    for axes, start in zip(panels[0], experiment.start, strict=True):
        _draw(axes, experiment, start.name, jobs, runs, "success")
        axes.set(xlabel="iteration", ylim=(0, 1.02), title=start.name)
    panels[0][0].set_ylabel(f"success in training, mean of {WINDOW} iterations")
    panels[0][-1].legend(loc="lower right", fontsize=8)
    return figure


def _training(pyplot: Any, experiment: Experiment, jobs: Sequence[Job], runs: Path) -> Any:
    """A column per start and a row for each figure of training."""
    shape = (len(TRAINING), len(experiment.start))
    size = (max(7, 4.5 * shape[1]), 2.4 * shape[0])
    figure, panels = pyplot.subplots(
        *shape, figsize=size, layout="constrained", squeeze=False, sharex="col", sharey="row"
    )
    for row, (name, label) in zip(panels, TRAINING.items(), strict=True):
        for axes, start in zip(row, experiment.start, strict=True):
            _draw(axes, experiment, start.name, jobs, runs, name)
        row[0].set_ylabel(label, fontsize=8)
    for axes, start in zip(panels[0], experiment.start, strict=True):
        axes.set_title(start.name)
    for axes in panels[-1]:
        axes.set_xlabel("iteration")
    panels[0][-1].legend(fontsize=8)
    return figure


def _draw(
    axes: Any, experiment: Experiment, start: str, jobs: Sequence[Job], runs: Path, figure: str
) -> None:
    """The smoothed curves of a figure, from one start."""
    for arm in experiment.arm:
        own = [j for j in jobs if j.train and (j.start, j.arm) == (start, arm.name)]
        if not own:
            continue
        curves = [trailing_mean(curve_of(job, runs, figure), WINDOW) for job in own]
        length = min(map(len, curves))
        stacked = np.stack([curve[:length] for curve in curves])
        steps = np.arange(1, length + 1)
        (line,) = axes.plot(steps, stacked.mean(0), label=arm.name)
        axes.fill_between(
            steps, stacked.min(0), stacked.max(0), color=line.get_color(), alpha=0.15, lw=0
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def _bars(pyplot: Any, rows: Rows) -> Any:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(max(7, 1.2 * len(methods)), 4.2), layout="constrained")
    width = 0.8 / len(sets)
    for index, name in enumerate(sets):
        own = [row for row in rows if row["set"] == name]
        means = [row["mean"] for row in own]
        below = [max(0.0, row["mean"] - row["low"]) for row in own]
        above = [max(0.0, row["high"] - row["mean"]) for row in own]
        places = np.arange(len(methods)) + (index - (len(sets) - 1) / 2) * width
        axes.bar(places, means, width * 0.95, yerr=[below, above], capsize=2, label=name)
    axes.set_xticks(range(len(methods)), methods, rotation=20, ha="right")
    axes.set(ylabel="success", ylim=(0, 1.02))
    axes.legend(fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    return figure
