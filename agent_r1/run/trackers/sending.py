"""Feeds the trackers of a run, each in a thread of its own. A tracker that fails or is slow is told
of in the log; it never ends or holds up the run.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agent_r1.config.section import NamedSection
from agent_r1.run.figures import flat_figures
from agent_r1.run.folder import RunFolder, flat_settings
from agent_r1.run.trackers import TRACKERS
from agent_r1.run.trackers.base import Beginning, Tracker
from agent_r1.run.transcript import transcript
from agent_r1.types import Group, Trajectory
from agent_r1.utils.durable import make_folder, write_atomically
from agent_r1.utils.log import LOG
from agent_r1.utils.run_files import TRACKERS as FOLDER
from agent_r1.utils.text import describe

CLOSE_SECONDS = 30.0
"""Time that all trackers together have at the end of a run for what is left to send."""
AGAIN = 10
"""Rows that a tracker is told again when a run goes on: a kill may have cost it the last ones."""
SENT = "sent"
"""File of the last iteration that a tracker took, in its folder."""
COLUMNS = ("episode", "task", "reward", "success", "stop", "turns", "text")


class Senders:
    """The trackers of a run.

    Args:
        sections: Their sections in the recipe.
        run: The run's folder. Trackers are told the rows that it has already, those that know the
            run only the last ones.
    """

    def __init__(self, sections: Sequence[NamedSection], run: RunFolder) -> None:
        rows, settings = run.metrics(), dict(flat_settings(run.recipe_data()))
        names = [section.name.rpartition(":")[2] for section in sections]
        self._senders = []
        for place, (section, name) in enumerate(zip(sections, names, strict=True)):
            number = names[:place].count(name)  # of several trackers of one kind
            folder = run.path / FOLDER / f"{name}{f'-{number + 1}' if number else ''}"
            self._senders.append(_Sender(section, run.path.name, settings, folder, rows))

    def log(self, row: dict[str, Any], groups: Sequence[Group] = ()) -> None:
        """Sends a row of metrics, and samples of its episodes."""
        for sender in self._senders:
            sender.log(row, groups)

    def close(self) -> None:
        """Ends the trackers, or leaves them behind."""
        for sender in self._senders:
            sender.end()
        deadline = time.monotonic() + CLOSE_SECONDS
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))


class _Sender:
    """One tracker and its thread, where all of its work is done."""

    def __init__(
        self,
        section: NamedSection,
        run: str,
        settings: dict[str, Any],
        folder: Path,
        rows: list[dict[str, Any]],
    ) -> None:
        self._section, self._folder, self._sent = section, folder, folder / SENT
        self._samples = getattr(section, "samples", 0)
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._figures: deque[Callable[[], None]] = deque()
        self._tracker: Tracker | None = None
        self._told = False
        self._start = functools.partial(self._begin, run, settings, rows)
        self._thread = threading.Thread(
            target=self._work, name=f"tracker {section.name}", daemon=True
        )
        self._thread.start()

    def log(self, row: dict[str, Any], groups: Sequence[Group]) -> None:
        """Has a row sent; called in the trainer's thread, so that nothing is done here."""
        self._todo.put(functools.partial(self._take, row, groups))

    def end(self) -> None:
        self._todo.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        name = self._section.name
        if self._thread.is_alive():
            LOG.warning(
                f"tracker {name!r} was not done within {CLOSE_SECONDS:.0f} seconds and is left "
                "behind; metrics.jsonl has all figures"
            )
        elif self._figures:
            LOG.warning(
                f"tracker {name!r}: the figures of {len(self._figures)} iterations could not be "
                "sent; metrics.jsonl has all"
            )

    def _work(self) -> None:
        while (work := self._todo.get()) is not None:
            self._try(work)
        self._send()
        if self._tracker is not None:
            self._try(self._tracker.close)

    def _begin(self, run: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Starts the tracker, which is tried again before each iteration until it works."""
        make_folder(self._folder)
        try:
            sent = int(self._sent.read_text())
        except (OSError, ValueError):  # the first time, or cut off by a kill
            sent = None
        if sent is not None and rows:
            last = min(sent, rows[-1]["iteration"])
            rows = [row for row in rows if row["iteration"] > last - AGAIN]
        first = int(rows[0]["iteration"]) if rows else 0
        tracker = TRACKERS.make(self._section)
        tracker.start(Beginning(run, settings, self._folder, first, sent is not None))
        self._tracker = tracker
        earlier = [functools.partial(self._log, row) for row in rows]
        self._figures.extendleft(reversed(earlier))

    def _take(self, row: dict[str, Any], groups: Sequence[Group]) -> None:
        self._figures.append(functools.partial(self._log, row))
        if self._tracker is None:
            self._start()
        self._send()
        iteration = int(row["iteration"])
        if self._tracker is not None and (samples := _samples(iteration, groups, self._samples)):
            self._tracker.table(iteration, COLUMNS, samples)  # if it fails, not sent again

    def _send(self) -> None:
        """Sends figures in order; what fails is tried again when more comes."""
        while self._tracker is not None and self._figures and self._try(self._figures[0]):
            self._figures.popleft()

    def _log(self, row: dict[str, Any]) -> None:
        assert self._tracker is not None
        if figures := flat_figures(row):
            self._tracker.log(int(row["iteration"]), figures)
        write_atomically(self._sent, str(row["iteration"]))

    def _try(self, work: Callable[[], None]) -> bool:
        try:
            work()
            return True
        except (Exception, SystemExit) as error:  # of its package
            if not self._told:
                LOG.warning(
                    f"tracker {self._section.name!r}: {describe(error):.500}; it is tried again "
                    "with each iteration, and the run goes on"
                )
            self._told = True
            return False


def _samples(iteration: int, groups: Sequence[Group], count: int) -> list[list[Any]]:
    """The best and the worst attempt of the first groups, in turn, as rows of a table."""
    rows: list[list[Any]] = []
    for group in groups:
        ranked = sorted(group.attempts(), key=lambda pair: _reward(pair[1]))
        for attempt, t in [*ranked[-1:], *ranked[:-1][:1]]:
            name = f"{iteration}/{group.number + 1}/{attempt + 1}"
            success = bool(t.outcome and t.outcome.success)
            found = (name, t.task_id, _reward(t), success, str(t.stop), len(t.steps), transcript(t))
            rows.append(list(found))
        if len(rows) >= count:
            break
    return rows[:count]


def _reward(trajectory: Trajectory) -> float:
    return trajectory.outcome.reward if trajectory.outcome is not None else 0.0
