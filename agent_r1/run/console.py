"""Console output of a run: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from agent_r1.utils.text import clean, printable


class Reporter:
    """Prints rows of metrics. With ``quiet`` nothing but warnings is shown (``--json``, Python)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=quiet, highlight=False)
        self.quiet = quiet
        self._total = 0
        self._seen = 0
        self._spent = 0.0
        self._progress: Progress | None = None
        if not quiet and sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("iteration"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task("", total=None)

    @contextmanager
    def over(self, num_iterations: int) -> Iterator[None]:
        """Shows the progress of ``num_iterations``."""
        self._total = num_iterations
        if self._progress is None:
            yield
            return
        self._progress.update(self._task, total=num_iterations)
        with self._progress:
            yield

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(printable(clean(text)), markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        text = printable(clean(f"warning: {text}"))
        self.console.print(text, markup=False, style="yellow", soft_wrap=True)

    def iteration(self, row: dict[str, Any]) -> None:
        """One line for an iteration's row of ``metrics.jsonl``."""
        figures, seconds = row["figures"], row["seconds"]["total"]
        self._seen += 1
        self._spent += seconds
        left = (self._total - row["iteration"]) * self._spent / self._seen
        sampled = figures["updates"] == 0 or figures["entropy"] is not None
        self.say(
            f"{row['iteration']:4d}/{self._total}  "
            f"{_of_rollout(row) if sampled else _of_demonstrations(row)}  {seconds:.1f} s  "
            f"left {_clock(left)}"
        )
        if self._progress is not None:
            name = "success" if sampled else "loss"
            description = f"{name} {_figure(figures[name])}"
            self._progress.update(self._task, completed=row["iteration"], description=description)

    def validation(self, iteration: int, figures: dict[str, Any]) -> None:
        by_category = "  ".join(
            f"{name or 'all'}: {_figure(score['success'])}"
            for name, score in figures["categories"].items()
        )
        total = figures["total"]
        self.say(
            f"{iteration:4d}/{self._total}  validation success {_figure(total['success'])} "
            f"[{total['low']:.2f}, {total['high']:.2f}]  "
            f"by category {by_category}  {figures['seconds']:.1f} s"
        )


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
