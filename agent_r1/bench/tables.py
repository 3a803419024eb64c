"""Tables of an experiment as CSV and Markdown, written from the run folders alone."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent_r1.bench.experiment import Experiment, Job, Speed, TaskSet
from agent_r1.bench.statistics import (
    Array,
    Interval,
    ratio_of_means,
    steps_to,
    trailing_mean,
    two_level_bootstrap,
)
from agent_r1.bench.worker import set_file
from agent_r1.errors import ConfigError
from agent_r1.run.figures import flat_figures
from agent_r1.run.folder import RunFolder
from agent_r1.utils.durable import write_atomically

Rows = list[dict[str, Any]]


def write_tables(experiment: Experiment, jobs: Sequence[Job], runs: Path, out: Path) -> list[Path]:
    """Writes all tables of an experiment whose jobs are done; returns their paths."""
    written = []
    markdown = []
    if experiment.set:
        rows = set_table(experiment, jobs, runs)
        columns = column_table(experiment, jobs, runs)
        written.append(write_csv(out / "table.csv", columns or rows))
        markdown.append(set_markdown(experiment, rows))
        if columns:
            markdown.append(as_markdown(columns))
        if faults := sum(result_of(j, s, runs)["total"]["faults"] for j in jobs for s, _ in j.sets):
            markdown.append(f"{faults} episodes were excluded: the infrastructure failed.")
    if experiment.pair:
        pairs = pair_table(experiment, jobs, runs)
        written.append(write_csv(out / "pairs.csv", pairs))
        markdown.append(as_markdown(pairs))
    if any(arm.against for arm in experiment.arm):
        per_run, summary = speed_tables(experiment, jobs, runs)
        written += [
            write_csv(out / "runs.csv", per_run),
            write_csv(out / "summary.csv", [{k: row[k] for k in SUMMARY} for row in summary]),
        ]
        markdown.append(speed_markdown(experiment.speed, summary))
    curves = curve_rows(jobs, runs)
    if curves:
        written.append(write_csv(out / "curves.csv", curves))
    write_atomically(out / "table.md", "\n\n".join(markdown) + "\n")
    return [*written, out / "table.md"]


def name_of(start: str, arm: str) -> str:
    return f"{start}: {arm}" if start else arm


def result_of(job: Job, test_set: TaskSet, runs: Path) -> dict[str, Any]:
    """The stored result of a run on a set."""
    recipe = next(recipe for s, recipe in job.sets if s.name == test_set.name)
    path = set_file(runs / job.folder, test_set, recipe)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def score_table(
    jobs: Sequence[Job],
    test_set: TaskSet,
    runs: Path,
    metric: str | None = None,
    tasks: Sequence[str] | None = None,
    *,
    asked: str = "columns",
) -> list[list[float]]:
    """Scores by run and task; NaN where an episode has none. By default those of the set's
    metric, and of all tasks that some run has a score for. ``asked`` is the metric's key in the
    experiment, for errors.
    """
    key = asked if metric else f"set {test_set.name!r}: metric"
    metric = metric or test_set.metric
    outcomes = [result_of(job, test_set, runs)["outcomes"] for job in jobs]
    known = dict.fromkeys(name for of_run in outcomes for o in of_run.values() for name in o)
    if metric not in known:
        raise ConfigError(f"{key} = {metric!r}, but the environment gives {', '.join(known)}")
    tasks = tasks or tasks_of(jobs, test_set, runs)
    return [[of_run.get(task, {}).get(metric, math.nan) for task in tasks] for of_run in outcomes]


def tasks_of(jobs: Sequence[Job], test_set: TaskSet, runs: Path) -> list[str]:
    """The tasks of a set that some of the runs has a score for."""
    outcomes = [result_of(job, test_set, runs)["outcomes"] for job in jobs]
    return list(dict.fromkeys(task for of_run in outcomes for task in of_run))


def set_table(experiment: Experiment, jobs: Sequence[Job], runs: Path) -> Rows:
    """A row for each arm and set."""
    rows = []
    for start in experiment.start:
        for arm in experiment.arm:
            own = [job for job in jobs if (job.start, job.arm) == (start.name, arm.name)]
            for test_set in experiment.set:
                interval = two_level_bootstrap(score_table(own, test_set, runs))
                rows.append(
                    {
                        "method": name_of(start.name, arm.name),
                        "set": test_set.name,
                        "seeds": len(own),
                        **_rounded(interval),
                    }
                )
    return rows


def column_table(experiment: Experiment, jobs: Sequence[Job], runs: Path) -> Rows:
    """A row for each arm and set, with the experiment's columns; none if it names none."""
    rows: Rows = []
    if not experiment.columns:
        return rows
    for start in experiment.start:
        for arm in experiment.arm:
            own = [job for job in jobs if (job.start, job.arm) == (start.name, arm.name)]
            for test_set in experiment.set:
                first, *others = (
                    two_level_bootstrap(score_table(own, test_set, runs, metric))
                    for metric in experiment.columns
                )
                name, *names = experiment.columns
                rows.append(
                    {
                        "method": name_of(start.name, arm.name),
                        "set": test_set.name,
                        "n": len(score_table(own, test_set, runs, name)[0]),
                        name: round(first.mean, 4),
                        f"{name}_low": round(first.low, 4),
                        f"{name}_high": round(first.high, 4),
                        **{
                            other: round(interval.mean, 4)
                            for other, interval in zip(names, others, strict=True)
                        },
                    }
                )
    return rows


def pair_table(experiment: Experiment, jobs: Sequence[Job], runs: Path) -> Rows:
    """How much better one arm is than another on the same tasks, those of several sets pooled:
    differences task by task, bootstrapped over seeds and tasks.
    """
    rows: Rows = []
    for start in experiment.start:
        for pair in experiment.pair:
            ours, theirs = (
                [j for j in jobs if (j.start, j.arm) == (start.name, name)]
                for name in (pair.arm, pair.against)
            )
            sets = [s for s in experiment.set if s.name in pair.sets]
            for metric in pair.metrics or (sets[0].metric,):
                pooled = []
                for test_set in sets:
                    tasks = tasks_of([*ours, *theirs], test_set, runs)
                    one, other = (
                        np.array(
                            score_table(own, test_set, runs, metric, tasks, asked="pair.metrics")
                        )
                        for own in (ours, theirs)
                    )
                    pooled.append(one - other)
                difference = np.concatenate(pooled, axis=1)
                rows.append(
                    {
                        "method": name_of(start.name, pair.arm),
                        "against": name_of(start.name, pair.against),
                        "sets": " + ".join(pair.sets),
                        "metric": metric,
                        "n": int((~np.isnan(difference)).any(axis=0).sum()),
                        **_rounded(two_level_bootstrap(difference.tolist()), mean="difference"),
                    }
                )
    return rows


def as_markdown(rows: Rows) -> str:
    """Rows as Markdown, one column per key."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, r.values())) + " |" for r in rows)])


def set_markdown(experiment: Experiment, rows: Rows) -> str:
    """Rows as Markdown, one column per set, and the mean over the sets."""
    sets = [test_set.name for test_set in experiment.set]
    lines = [
        "| method | " + " | ".join(sets) + " | mean |",
        "|---|" + "---|" * (len(sets) + 1),
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["set"]: row for row in rows if row["method"] == method}
        cells = [f"{r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in own.values()]
        mean = np.mean([row["mean"] for row in own.values()])
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {mean:.3f} |")
    return "\n".join(lines)


SUMMARY = ("start", "credit", "steps_outcome", "steps_process", "ratio", "low", "high")


def curve_of(job: Job, runs: Path, figure: str) -> list[float]:
    """A figure of each iteration of training; NaN where it was not measured."""
    rows = (row for row in RunFolder(runs / job.folder).metrics() if "figures" in row)
    return [flat_figures(row).get(figure, math.nan) for row in rows]


def success_curve(job: Job, runs: Path) -> list[float]:
    """Success of the training episodes, which are fresh tasks in every iteration."""
    return curve_of(job, runs, "success")


def speed_tables(experiment: Experiment, jobs: Sequence[Job], runs: Path) -> tuple[Rows, Rows]:
    """One row per run, and one for each start and arm that is compared with another.

    Steps are iterations until the trailing mean of training success has reached the mark: the
    share ``speed.share`` of the better arm's final success, means over the seeds. A run that never
    reaches it counts with all its iterations, and as capped.
    """
    per_run: Rows = []
    summary: Rows = []
    for start in experiment.start:
        trained = [job for job in jobs if job.train and job.start == start.name]
        curves = {job.folder: success_curve(job, runs) for job in trained}
        before = float(np.mean([curve[0] for curve in curves.values()]))
        for arm in experiment.arm:
            if arm.against is None:
                continue
            ours, theirs = (
                [
                    trailing_mean(curves[job.folder], experiment.speed.window)
                    for job in trained
                    if job.arm == name
                ]
                for name in (arm.name, arm.against)
            )
            row, steps = _compare(ours, theirs, experiment.speed.share)
            summary.append(
                {"start": round(before, 4), "credit": arm.name, **row}
                | {"name": start.name, "against": arm.against}
            )
            for name, own in zip((arm.name, arm.against), steps, strict=True):
                seeds = [job.seed for job in trained if job.arm == name]
                per_run += [
                    {
                        "start": start.name,
                        "comparison": f"{arm.name} against {arm.against}",
                        "arm": name,
                        "seed": seed,
                        "steps": "" if count is None else count,
                    }
                    for seed, count in zip(seeds, own, strict=True)
                ]
    return per_run, summary


def _compare(
    ours: list[Array], theirs: list[Array], share: float
) -> tuple[dict[str, Any], tuple[list[int | None], list[int | None]]]:
    """How fast smoothed curves reach the mark, and the iterations of each run."""
    final_ours, final_theirs = (float(np.mean([c[-1] for c in own])) for own in (ours, theirs))
    mark = share * max(final_ours, final_theirs)
    steps_ours, steps_theirs = ([steps_to(c, mark) for c in own] for own in (ours, theirs))
    counted_ours, counted_theirs = (
        [len(c) if s is None else s for c, s in zip(own, steps, strict=True)]
        for own, steps in ((ours, steps_ours), (theirs, steps_theirs))
    )
    ratio = ratio_of_means(counted_ours, counted_theirs)
    row = {
        "steps_outcome": float(np.mean(counted_theirs)),
        "steps_process": float(np.mean(counted_ours)),
        **_rounded(ratio, mean="ratio"),
        "mark": mark,
        "final_outcome": final_theirs,
        "final_process": final_ours,
        "capped_outcome": steps_theirs.count(None),
        "capped_process": steps_ours.count(None),
        "seeds": len(ours),
    }
    return row, (steps_ours, steps_theirs)


def speed_markdown(speed: Speed, summary: Rows) -> str:
    lines = [
        f"Iterations to {speed.share:.0%} of the better arm's final success; in brackets runs that "
        "never got there, counted as the cap.",
        "",
        "| start | success before | credit | against | steps, outcome | steps, process | ratio | "
        "final, outcome | final, process |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        ratio = Interval(row["ratio"], row["low"], row["high"])
        lines.append(
            f"| {row['name']} | {row['start']:.3f} | {row['credit']} | {row['against']} | "
            f"{row['steps_outcome']:.1f} ({row['capped_outcome']}) | "
            f"{row['steps_process']:.1f} ({row['capped_process']}) | {ratio} | "
            f"{row['final_outcome']:.3f} | {row['final_process']:.3f} |"
        )
    return "\n".join(lines)


TRAINING = {
    "entropy": "entropy, nats a token",
    "kl": "KL to the reference, nats a token",
    "grad_norm": "gradient norm",
    "clip_fraction": "clipped tokens, share",
    "action_tokens": "sampled tokens an episode",
}
"""Figures that tell how training goes, beside success, and their units."""


def curve_rows(jobs: Sequence[Job], runs: Path) -> Rows:
    """Training success and process rewards of every run, iteration by iteration."""
    rows = []
    for job in jobs:
        if not job.train:
            continue
        for row in RunFolder(runs / job.folder).metrics():
            if "figures" not in row:
                continue
            figures = row["figures"]
            parts = {key: round(v, 4) for key, v in figures.items() if key.startswith("process/")}
            rows.append(
                {
                    "method": name_of(job.start, job.arm),
                    "seed": job.seed,
                    "iteration": row["iteration"],
                    "success": _or_empty(figures["success"], 4),
                    "turns": _or_empty(figures["turns"], 3),
                    **{name: figures.get(name) for name in TRAINING},
                    "seconds": round(row["seconds"]["total"], 2),
                    **parts,
                }
            )
    return rows


def _or_empty(value: float | None, digits: int) -> float | str:
    """A figure not measured is an empty cell, not 0."""
    return "" if value is None else round(value, digits)


def write_csv(path: Path, rows: Rows) -> Path:
    text = io.StringIO()
    fields = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(fields), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
    return path


def _rounded(interval: Interval, mean: str = "mean") -> dict[str, float]:
    values = (interval.mean, interval.low, interval.high)
    return {k: round(v, 4) for k, v in zip((mean, "low", "high"), values, strict=True)}
