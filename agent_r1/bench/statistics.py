"""Means and intervals over seeds and tasks, and how fast a curve rises. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 4_000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def two_level_bootstrap(scores: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """The mean of ``scores[run][task]`` with a percentile interval: runs are drawn with
    replacement and so are tasks, the same tasks for all runs, because all runs were tested on the
    same (Davison and Hinkley 1997, section 3.8). NaN where a run has no score for a task.

    Few runs make the interval too narrow: they tell little about other seeds.
    """
    table = np.asarray(scores, dtype=float)
    if not table.size or np.isnan(table).all(axis=1).any():
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    num_runs, num_tasks = table.shape
    runs = rng.integers(num_runs, size=(NUM_RESAMPLES, num_runs))
    tasks = rng.integers(num_tasks, size=(NUM_RESAMPLES, num_tasks))
    means = np.stack([_mean_of_known(run[tasks], np.nanmean(run)) for run in table])
    resampled = means[runs, np.arange(NUM_RESAMPLES)[:, None]].mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(np.nanmean(table, axis=1).mean()), float(low), float(high))


def _mean_of_known(resamples: Array, where_none: float) -> Array:
    """Means of rows, NaN left out."""
    known = ~np.isnan(resamples)
    sums, counts = np.nansum(resamples, axis=1), known.sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), where_none)


def trailing_mean(curve: Sequence[float], window: int) -> Array:
    """Means over each point and up to ``window - 1`` points before it; points that were not
    measured are left out, NaN if none was.
    """
    windows = (np.asarray(curve[max(0, i + 1 - window) : i + 1]) for i in range(len(curve)))
    measured = (values[~np.isnan(values)] for values in windows)
    return np.array([values.mean() if len(values) else np.nan for values in measured])


def steps_to(curve: Sequence[float] | Array, mark: float) -> int | None:
    """The first iteration, counted from 1, at which a curve has reached a mark; ``None`` if never,
    or if the mark is 0: where nothing was learned nothing was reached.
    """
    reached = np.flatnonzero(np.asarray(curve) >= mark)
    return int(reached[0]) + 1 if mark > 0 and len(reached) else None


def ratio_of_means(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Interval:
    """``mean(ours) / mean(theirs)``, the pairs drawn with replacement: run i of both has the same
    seed, and so the same tasks.
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(a), size=(NUM_RESAMPLES, len(a)))
    ratios = a[drawn].mean(1) / b[drawn].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(a.mean() / b.mean()), float(low), float(high))
