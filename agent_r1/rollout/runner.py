"""Plays many episodes at once, some of them again after a tool's failure."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Sequence

from agent_r1.rollout.engine import Engine, Sampling, Session
from agent_r1.types import Action, Trajectory

MAX_RESAMPLES = 3
"""How often an episode is played again when a tool's policy asks for it."""


class Episodes:
    """Plays episodes, a fixed number at once. The next begins as soon as another no longer needs
    the engine, and its session opens before the engine goes on: batches do not depend on timing.
    """

    def __init__(
        self,
        engine: Engine,
        play: Callable[[int, int, Session], Coroutine[None, None, Trajectory]],
        count: int,
    ) -> None:
        self._engine, self._play = engine, play
        self._waiting = deque((number, 0) for number in range(count))
        self._done: dict[int, Trajectory] = {}
        self._discarded: defaultdict[int, list[str]] = defaultdict(list)
        self._count = count
        self._sessions: list[_Released] = []
        self._running: dict[asyncio.Task[Trajectory], tuple[int, int]] = {}
        self._ended: asyncio.Queue[asyncio.Task[Trajectory]] = asyncio.Queue()

    async def run(self, concurrency: int) -> list[Trajectory]:
        """All trajectories in order. An error that is not one episode's fault ends all and is
        raised.
        """
        for _ in range(min(concurrency, self._count)):
            self._start_next()
        try:
            while len(self._done) < self._count:
                self._finish(await self._ended.get())
                while self._waiting and len(self._running) < concurrency:
                    self._start_next()  # one that is to be played again
        finally:
            self._waiting.clear()
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            for session in self._sessions:  # of those that were cancelled before they began
                session.close()
            await self._engine.idle()
        return [self._done[number] for number in range(self._count)]

    def _finish(self, task: asyncio.Task[Trajectory]) -> None:
        """Stores an episode's trajectory, or queues it to be played again."""
        number, again = self._running.pop(task)
        trajectory = task.result()
        if trajectory.resample and again < MAX_RESAMPLES:
            self._waiting.append((number, again + 1))
            self._discarded[number] += [e for step in trajectory.steps for e in step.events]
            return
        trajectory.discarded = again
        trajectory.discarded_events = tuple(self._discarded[number])
        self._done[number] = trajectory

    def _start_next(self) -> None:
        if self._waiting:
            number, again = self._waiting.popleft()
            session = _Released(self._engine.session(number), self._start_next)
            self._sessions.append(session)
            task = asyncio.ensure_future(self._play(number, again, session))
            self._running[task] = number, again
            task.add_done_callback(self._ended.put_nowait)


class _Released:
    """A session that calls ``then`` just before it closes."""

    def __init__(self, session: Session, then: Callable[[], None]) -> None:
        self._session = session
        self._then: Callable[[], None] | None = then

    @property
    def outage(self) -> str | None:
        return self._session.outage

    async def generate(self, prefix: Sequence[int], sampling: Sampling, seed: int) -> Action:
        return await self._session.generate(prefix, sampling, seed)

    def close(self) -> None:
        then, self._then = self._then, None
        if then is not None:
            then()  # first, so that the engine is never without a session in between
        self._session.close()
