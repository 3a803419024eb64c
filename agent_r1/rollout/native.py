"""The simple native engine: batched sampling on the very model object that is trained.

It works in ticks: a batch starts when every open session waits for tokens, so batches do not
depend on timing and a run repeats bit for bit. Rows are padded on the left; each session keeps the
keys and values of its tokens, so a new turn costs its new tokens only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent_r1.config import NamedSection
from agent_r1.types import Action, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from agent_r1.policy import Policy


@dataclass
class Request:
    """One call of ``generate`` that waits to be served."""

    prefix: list[int]
    sampling: Sampling
    seed: int
    future: asyncio.Future[Action]


class NativeSession:
    """One episode's place in the engine."""

    def __init__(self, engine: NativeEngine, number: int) -> None:
        self._engine = engine
        self.number = number
        self.cached_ids: list[int] = []
        self.cache: list[tuple[Tensor, Tensor]] = []
        """Keys and values per layer, each (heads, len(cached_ids), head width)."""

    async def generate(self, prefix: Sequence[int], sampling: Sampling, seed: int) -> Action:
        future: asyncio.Future[Action] = asyncio.get_running_loop().create_future()
        self._engine.waiting[self] = Request(list(prefix), sampling, seed, future)
        self._engine.wake()
        try:
            return await future
        finally:
            self._engine.waiting.pop(self, None)

    def close(self) -> None:
        if self in self._engine.open:
            self._engine.open.remove(self)
            self.cache, self.cached_ids = [], []
            self._engine.wake()


class NativeEngine:
    """See the module's docstring."""

    class Settings(NamedSection):
        name: str = "native"

    def __init__(self, settings: NamedSection, policy: Policy) -> None:
        self._policy = policy
        self._version = 0
        self._num_opened = 0
        self.open: set[NativeSession] = set()
        self.waiting: dict[NativeSession, Request] = {}

    def session(self) -> NativeSession:
        session = NativeSession(self, self._num_opened)
        self._num_opened += 1
        self.open.add(session)
        return session

    def load(self, version: int) -> None:
        """The model object is shared, so the weights are there already; caches of older ones must
        be gone.
        """
        assert not self.open, "weights changed while sessions were open"
        self._version = version

    def wake(self) -> None:
        if self.waiting and len(self.waiting) == len(self.open):
            asyncio.get_running_loop().call_soon(self._tick)

    def _tick(self) -> None:
        if not self.waiting or len(self.waiting) != len(self.open):
            return  # a session opened, closed or was served since
        sessions = sorted(self.waiting, key=lambda session: session.number)
        requests = [self.waiting.pop(session) for session in sessions]
        from agent_r1.rollout.batch import sample  # the first need of torch

        try:
            actions = sample(self._policy, sessions, requests, version=self._version)
        except Exception as error:
            for request in requests:
                if not request.future.done():
                    request.future.set_exception(error)
            return
        for request, action in zip(requests, actions, strict=True):
            if not request.future.done():
                request.future.set_result(action)
