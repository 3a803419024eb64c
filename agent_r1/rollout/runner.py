"""Plays many episodes at once, some of them again after a tool's failure."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from agent_r1.rollout.engine import Engine, Sampling, Session
from agent_r1.types import Action, Trajectory

MAX_RESAMPLES = 3
"""How often an episode is played again when a tool's policy asks for it."""


@dataclass
class _Episode:
    """An episode that is wanted.

    Attributes:
        again: Plays that were thrown away, and ``events``, what went wrong with tools in them.
    """

    number: int
    play: Callable[[int, Session], Coroutine[None, None, Trajectory]]
    wanted: asyncio.Future[Trajectory]
    again: int = 0
    events: list[str] = field(default_factory=list)


class Stopwatch:
    """Adds up the wall seconds between ``start`` and ``stop``."""

    def __init__(self) -> None:
        self.runs = False
        self._before = self._since = 0.0

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self.runs else 0.0)

    def start(self) -> None:
        if not self.runs:
            self._since, self.runs = time.perf_counter(), True

    def stop(self) -> None:
        self._before, self.runs = self.seconds, False


class Episodes:
    """Plays episodes, a fixed number at once. The next begins as soon as another no longer needs
    the engine, and its session opens before the engine goes on: batches do not depend on timing.

    Attributes:
        paused: Runs while the engine rests for the learner; that time is not the episodes'.
        sampling: Runs while some episode waits for tokens and the engine does not rest.
    """

    def __init__(self, engine: Engine, concurrency: int) -> None:
        self._engine, self._concurrency = engine, concurrency
        self._waiting: deque[_Episode] = deque()
        self._running: dict[asyncio.Task[Trajectory], _Episode] = {}
        self._sessions: set[_Released] = set()
        self._num_asking = 0
        self.paused, self.sampling = Stopwatch(), Stopwatch()

    def add(
        self, number: int, play: Callable[[int, Session], Coroutine[None, None, Trajectory]]
    ) -> asyncio.Future[Trajectory]:
        """Queues an episode; the future has its trajectory, or an error that is not that episode's
        fault alone.

        Args:
            number: Its session's, see ``Engine.session``.
            play: Plays it, given how many plays of it were thrown away, and a session.
        """
        wanted: asyncio.Future[Trajectory] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Episode(number, play, wanted))
        self._fill()
        return wanted

    async def pause(self) -> None:
        """The learner is about to use the model."""
        if self._engine.traits.rests:
            self.paused.start()
            self.sampling.stop()
        await self._engine.pause()

    def resume(self) -> None:
        """Ends a pause."""
        self.paused.stop()
        if self._num_asking:
            self.sampling.start()
        self._engine.resume()

    async def close(self) -> None:
        """Ends all that are open; returns when the engine works for none of them."""
        self.resume()
        for episode in self._waiting:
            episode.wanted.cancel()
        self._waiting.clear()
        running = [*self._running]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for session in [*self._sessions]:  # of those that were cancelled before they began
            session.close()
        await self._engine.idle()

    def asks(self, more: int) -> None:
        """So many more episodes wait for tokens."""
        self._num_asking += more
        if not self._num_asking:
            self.sampling.stop()
        elif not self.paused.runs:
            self.sampling.start()

    def release(self, session: _Released) -> None:
        """That session closes: another may open."""
        self._sessions.discard(session)
        self._fill()

    def _fill(self) -> None:
        while self._waiting and len(self._sessions) < self._concurrency:
            episode = self._waiting.popleft()
            session = _Released(self._engine.session(episode.number), self)
            self._sessions.add(session)
            task = asyncio.ensure_future(episode.play(episode.again, session))
            self._running[task] = episode
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Trajectory]) -> None:
        """Hands over an episode's trajectory, or queues it to be played again."""
        episode = self._running.pop(task)
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or episode.wanted.done():  # nobody wants it any more
            episode.wanted.cancel()
        elif error is not None:
            episode.wanted.set_exception(error)
        elif (found := task.result()).resample and episode.again < MAX_RESAMPLES:
            episode.again += 1
            episode.events += [e for step in found.steps for e in step.events]
            self._waiting.appendleft(episode)  # its group waits for it
            self._fill()
        else:
            found.discarded, found.discarded_events = episode.again, tuple(episode.events)
            episode.wanted.set_result(found)


class _Released:
    """A session that tells when it waits for tokens, and that it closes, just before it does."""

    def __init__(self, session: Session, episodes: Episodes) -> None:
        self._session, self._episodes = session, episodes
        self._is_open = True

    @property
    def outage(self) -> str | None:
        return self._session.outage

    async def generate(self, prefix: Sequence[int], sampling: Sampling, seed: int) -> Action:
        self._episodes.asks(1)
        try:
            return await self._session.generate(prefix, sampling, seed)
        finally:
            self._episodes.asks(-1)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._episodes.release(self)  # so that the engine is never without a session
        self._session.close()
