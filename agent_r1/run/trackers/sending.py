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
COLUMNS = ("iteration", "task", "attempt", "reward", "success", "stop", "turns", "episode")


class Senders:
    """The trackers of a run.

    Args:
        sections: Their sections in the recipe.
        run: The run's folder. Trackers are told the rows that it has already, those that know the
            run only the last ones.
    """

    def __init__(self, sections: Sequence[NamedSection], run: RunFolder) -> None:
        self._senders = [_Sender(section, run) for section in sections]

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
    def __init__(self, section: NamedSection, run: RunFolder) -> None:
        self._name, self._samples = section.name, getattr(section, "samples", 0)
        self._tracker: Tracker = TRACKERS.make(section)
        folder = run.path / FOLDER / self._name.rpartition(":")[2]
        make_folder(folder)
        self._sent = folder / SENT
        sent = int(self._sent.read_text()) if self._sent.exists() else None
        rows = run.metrics()
        if sent is not None and rows:
            last = min(sent, rows[-1]["iteration"])
            rows = [row for row in rows if row["iteration"] > last - AGAIN]
        settings = dict(flat_settings(run.recipe_data()))
        first = int(rows[0]["iteration"]) if rows else 0
        beginning = Beginning(run.path.name, settings, folder, first, sent is not None)
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._left: deque[Callable[[], None]] = deque()
        self._told = False
        self._todo.put(functools.partial(self._tracker.start, beginning))
        for row in rows:
            self.log(row, ())
        self._thread = threading.Thread(
            target=self._work, name=f"tracker {self._name}", daemon=True
        )
        self._thread.start()

    def log(self, row: dict[str, Any], groups: Sequence[Group]) -> None:
        iteration = int(row["iteration"])
        figures = flat_figures(row)
        if figures:
            self._todo.put(functools.partial(self._log, iteration, figures))
        if samples := _samples(iteration, groups, self._samples):
            self._todo.put(functools.partial(self._tracker.table, iteration, COLUMNS, samples))

    def _log(self, iteration: int, figures: dict[str, float]) -> None:
        self._tracker.log(iteration, figures)
        write_atomically(self._sent, str(iteration))

    def end(self) -> None:
        self._todo.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            LOG.warning(
                f"tracker {self._name!r} was not done within {seconds:.0f} seconds and is left "
                "behind; metrics.jsonl has all figures"
            )
        elif self._left:
            LOG.warning(
                f"tracker {self._name!r}: {len(self._left)} messages could not be sent; "
                "metrics.jsonl has all figures"
            )

    def _work(self) -> None:
        """Sends everything in order; what failed is tried again when more comes."""
        while (work := self._todo.get()) is not None:
            self._left.append(work)
            self._send()
        if self._send():
            self._try(self._tracker.close)

    def _send(self) -> bool:
        while self._left and self._try(self._left[0]):
            self._left.popleft()
        return not self._left

    def _try(self, work: Callable[[], None]) -> bool:
        try:
            work()
            return True
        except (Exception, SystemExit) as error:  # of its package
            if not self._told:
                LOG.warning(
                    f"tracker {self._name!r}: {describe(error):.500}; it is tried again with each "
                    "iteration, and the run goes on"
                )
            self._told = True
            return False


def _samples(iteration: int, groups: Sequence[Group], count: int) -> list[list[Any]]:
    """The best and the worst attempt of the first groups, in turn, as rows of a table."""
    chosen: list[Trajectory] = []
    for group in groups:
        ranked = sorted(group.scored, key=_reward)
        chosen += [*ranked[-1:], *ranked[:-1][:1]]
        if len(chosen) >= count:
            break
    return [
        [
            *(iteration, t.task_id, t.attempt, _reward(t), bool(t.outcome and t.outcome.success)),
            *(str(t.stop), len(t.steps), transcript(t)),
        ]
        for t in chosen[:count]
    ]


def _reward(trajectory: Trajectory) -> float:
    return trajectory.outcome.reward if trajectory.outcome is not None else 0.0
