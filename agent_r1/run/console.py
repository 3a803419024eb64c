"""The log of a run on the console: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from agent_r1.utils.log import LOG


class ConsoleHandler(logging.Handler):
    """Prints the log of a run. With ``quiet`` only warnings are shown, on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(logging.WARNING if quiet else logging.INFO)
        self.console = Console(stderr=quiet, highlight=False)
        self.progress: Progress | None = None
        if not quiet and sys.stdout.isatty():
            self.progress = Progress(
                TextColumn("iteration"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self.progress.add_task("", total=None)

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        text = f"{'warning: ' if is_warning else ''}{record.getMessage()}"
        style = "yellow" if is_warning else None
        self.console.print(text, markup=False, style=style, soft_wrap=True)
        row: dict[str, Any] | None = getattr(record, "row", None)
        if self.progress is not None and row is not None:
            name = "success" if _is_sampled(row) else "loss"
            self.progress.update(
                self._task,
                completed=row["iteration"],
                total=getattr(record, "total", None),
                description=f"{name} {_figure(row['figures'][name])}",
            )


@contextmanager
def console(*, quiet: bool = False) -> Iterator[None]:
    """Shows the log meanwhile, and nobody else does."""
    handler, level, propagate = ConsoleHandler(quiet=quiet), LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    try:
        with handler.progress or nullcontext():
            yield
    finally:
        LOG.setLevel(level)
        LOG.propagate = propagate
        LOG.removeHandler(handler)


def iteration_line(row: dict[str, Any], total: int, seconds_left: float) -> str:
    """An iteration's row of ``metrics.jsonl`` in one line."""
    return (
        f"{row['iteration']:4d}/{total}  "
        f"{_of_rollout(row) if _is_sampled(row) else _of_demonstrations(row)}  "
        f"{row['seconds']['total']:.1f} s  left {_clock(seconds_left)}"
    )


def validation_line(iteration: int, total: int, figures: dict[str, Any]) -> str:
    """A validation's figures in one line."""
    by_category = "  ".join(
        f"{name or 'all'}: {_figure(score['success'])}"
        for name, score in figures["categories"].items()
    )
    of_all = figures["total"]
    return (
        f"{iteration:4d}/{total}  validation success {_figure(of_all['success'])} "
        f"[{of_all['low']:.2f}, {of_all['high']:.2f}]  "
        f"by category {by_category}  {figures['seconds']:.1f} s"
    )


def _is_sampled(row: dict[str, Any]) -> bool:
    return row["figures"]["updates"] == 0 or row["figures"]["entropy"] is not None


@contextmanager
def counting(what: str, *, quiet: bool = False) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr for work of unknown size; the yielded function takes stage and count."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:,}} {what}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    task = progress.add_task("starting", total=None)
    with progress:
        yield lambda stage, number: progress.update(task, description=stage, completed=number)


def _of_rollout(row: dict[str, Any]) -> str:
    figures = row["figures"]
    num_groups = figures["groups_used"] + figures["groups_without_signal"]
    return (
        f"success {_figure(figures['success'])}  "
        f"reward {_figure(figures['reward'])}{_parts(figures)}  "
        f"entropy {_figure(figures['entropy'])}  "
        f"tokens {_figure(figures['action_tokens'], 0)}  "
        f"turns {_figure(figures['turns'], 1)}  "
        f"groups {figures['groups_used']}/{num_groups}{_stops(figures)}  "
        f"{row['tokens_per_second']['generated']:,.0f} tok/s"
    )


def _of_demonstrations(row: dict[str, Any]) -> str:
    """The loss is the mean of -log pi over the tokens that are imitated."""
    figures = row["figures"]
    return (
        f"loss {figures['loss']:.3f}  tokens {_figure(figures['action_tokens'], 0)}  "
        f"turns {_figure(figures['turns'], 1)}  {row['tokens_per_second']['trained']:,.0f} tok/s"
    )


def _stops(figures: dict[str, Any]) -> str:
    """Counts of all reasons why episodes stopped, except ``done``."""
    stops = {k.removeprefix("stop/"): v for k, v in figures.items() if k.startswith("stop/")}
    total = sum(stops.values())
    return "".join(f"  {k} {v}/{total}" for k, v in sorted(stops.items()) if k != "done")


def _parts(figures: dict[str, Any]) -> str:
    parts = {k.removeprefix("process/"): v for k, v in figures.items() if k.startswith("process/")}
    return "".join(f"  {name} {value:.2f}" for name, value in parts.items())


def _figure(value: float | None, digits: int = 3) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
