"""A row of ``metrics.jsonl`` as flat figures, for curves: in the window on runs and in trackers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

TABLES = ("seconds", "env_seconds", "tokens_per_second", "memory_gib", "engine")
"""Tables of a row whose figures keep the table's name."""


def flat_figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a row by name; what was not measured, or is no finite number, is left out.

    Example:
        >>> flat_figures({"iteration": 1, "figures": {"reward": 0.5}, "seconds": {"total": 2.0}})
        {'reward': 0.5, 'seconds/total': 2.0}
    """
    return {name: float(value) for name, value in _pairs(row) if is_figure(value)}


def is_figure(value: object) -> bool:
    """Whether a value is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer of hundreds of digits
        return False


def _pairs(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from _table(row, "figures").items()
    for name in TABLES:
        yield from ((f"{name}/{key}", value) for key, value in _table(row, name).items())
    validation = _table(row, "validation")
    yield from _of_score("validation", _table(validation, "total"))
    categories = _table(validation, "categories")
    for category, score in categories.items() if len(categories) > 1 else ():
        if isinstance(score, dict):
            yield from _of_score(f"validation/{category}", score)


def _of_score(name: str, score: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((f"{name}/{key}", score.get(key)) for key in ("success", "reward", "turns"))
    yield from ((f"{name}/{key}", value) for key, value in _table(score, "metrics").items())


def _table(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table of a row; empty where the file holds something else."""
    table = row.get(name)
    return table if isinstance(table, dict) else {}
