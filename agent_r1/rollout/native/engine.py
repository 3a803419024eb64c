"""The native engine: continuous batching on the very model object that is trained.

Each pass of the model takes one new token of every session that is sampling, and all new tokens of
those that have just asked. Between passes the engine waits until every open session has asked
again, so batches do not depend on timing and a run repeats bit for bit; the wait is limited by
``patience``, so a slow tool holds up only its own episode.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from agent_r1.config.section import NamedSection
from agent_r1.errors import ConfigError
from agent_r1.rollout.engine import Sampling, Traits
from agent_r1.types import Action

if TYPE_CHECKING:
    from agent_r1.model.policy import Policy
    from agent_r1.model.sampling_weights import SamplingWeights
    from agent_r1.model.settings import ModelSettings
    from agent_r1.rollout.native.scheduler import Scheduler

from agent_r1.rollout.model_thread import EngineThread
from agent_r1.rollout.native.request import Counters, Request, Stop

SHARE_OF_FREE = 0.5


class NativeSession:
    """One episode's place in the engine."""

    outage = None

    def __init__(self, engine: NativeEngine, number: int) -> None:
        self._engine = engine
        self.number = number

    async def generate(self, prefix: Sequence[int], sampling: Sampling, seed: int) -> Action:
        future: asyncio.Future[Action] = asyncio.get_running_loop().create_future()
        self._engine.ask(self, Request(list(prefix), sampling, seed, future))
        try:
            return await future
        finally:
            self._engine.withdraw(self)

    def close(self) -> None:
        self._engine.release(self)


class NativeEngine:
    """See the module's docstring."""

    traits: ClassVar = Traits()

    class Settings(NamedSection):
        """The keys of ``[engine]``.

        Attributes:
            patience: Seconds that a pass waits for episodes whose tools are running; one that took
                longer once is not waited for again, and none while most of them are such. A run
                repeats bit for bit as long as no tool takes longer; 0 never waits.
            cache_gib: Memory for keys and values; by default half of what is free.
            cache: Where keys and values lie: ``blocks`` of sequences of similar length, or, for a
                GPU, ``slots``, with passes that are captured and replayed.
        """

        name: str = "native"
        patience: float = Field(1.0, ge=0)
        cache_gib: float | None = Field(None, gt=0)
        cache: Literal["blocks", "slots"] = "blocks"

    def __init__(self, settings: Settings, policy: Policy) -> None:
        if policy.unpackable:
            raise ConfigError(
                f"engine 'native' cannot run this model: {policy.unpackable}; "
                "set engine = 'padded', which is slower"
            )
        self._settings = settings
        self._policy = policy
        self._version = 0
        self._task: asyncio.Task[None] | None = None
        self._changed: asyncio.Event | None = None
        self._at_work: asyncio.Lock | None = None
        self._is_paused = False
        self._scheduler: Scheduler | None = None
        self._weights: SamplingWeights | None = None
        self.open: set[NativeSession] = set()
        self.requests: dict[NativeSession, Request] = {}
        self._late: set[NativeSession] = set()
        self._closed: list[NativeSession] = []
        self.counters, self._reported = Counters(), Counters()
        self._thread = EngineThread()

    @classmethod
    def must_serve(cls, settings: Settings, model: ModelSettings) -> None:
        from agent_r1.model.load import load_config
        from agent_r1.model.policy import why_unpackable

        if reason := why_unpackable(load_config(model)):
            raise ConfigError(
                f"engine = 'native' cannot run {model.path!r}: {reason}; "
                "engine = 'padded' can, more slowly"
            )

    async def start(self, longest: int | None = None) -> None:
        return None

    def session(self, number: int = 0) -> NativeSession:
        session = NativeSession(self, number)
        self.open.add(session)
        return session

    async def sync(self, weights: Policy, version: int) -> None:
        """The model object may be the one that was trained: its weights must not change while a
        pass runs. All that was computed with the old ones is computed again.
        """
        async with self._at_work or contextlib.nullcontext():
            self._begin_anew()
            self._policy, self._version = weights, version

    async def idle(self) -> None:
        if self.open:
            return
        if self._task is not None:
            await asyncio.wait({self._task})
        if not self.open:
            self._forget()
            self._weights = None

    async def pause(self) -> None:
        """What was computed is dropped: new weights are likely, and the learner needs the room."""
        self._is_paused = True
        async with self._at_work or contextlib.nullcontext():
            self._begin_anew()
            self._free()

    def resume(self) -> None:
        self._is_paused = False
        self._wake()

    def _begin_anew(self) -> None:
        """Drops all that was computed, between passes."""
        for request in self.requests.values():
            request.outdated(self._version)
        self._scheduler = self._weights = None
        self._closed.clear()

    def _free(self) -> None:
        """Gives memory that is not used back to the learner."""
        if self._policy.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()  # one large block, which smaller ones would cut up

    def report(self) -> dict[str, float]:
        before, self._reported = self._reported, dataclasses.replace(self.counters)
        return {name: now - vars(before)[name] for name, now in vars(self._reported).items()}

    def advice(self, figures: Mapping[str, float], seconds: float) -> Iterator[str]:
        if late := figures["late"]:
            yield (
                f"in {late:g} episodes tools took longer than engine.patience; another run will "
                "not repeat this one bit for bit"
            )
        if (waited := figures["wait_seconds"]) > max(5.0, 0.3 * seconds):
            yield (
                f"the engine waited {waited:.0f} s for tools; engine.patience = 0 goes on without "
                "the slow ones"
            )
        if dropped := figures["dropped"]:
            yield (
                f"memory ran short, {dropped:g} tokens were computed again, so that another run "
                "may not repeat this one bit for bit; a larger engine.cache_gib or a smaller "
                "train.concurrency helps"
            )

    async def close(self) -> None:
        await self.idle()

    # Called by sessions ------------------------------------------------------------------------

    def ask(self, session: NativeSession, request: Request) -> None:
        self.requests[session] = request
        if self._task is None:
            self._changed, self._at_work = asyncio.Event(), asyncio.Lock()
            self._task = asyncio.get_running_loop().create_task(self._serve())
        self._wake()

    def withdraw(self, session: NativeSession) -> None:
        self.requests.pop(session, None)
        self._wake()

    def release(self, session: NativeSession) -> None:
        if session in self.open:
            self.open.remove(session)
            self._late.discard(session)
            self._closed.append(session)
            self._wake()
        if not self.open:
            self._forget()

    def _forget(self) -> None:
        """The learner needs the memory next."""
        if self._scheduler is not None:
            self._scheduler = None
            self._free()
        self._closed.clear()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()

    # The loop ----------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Runs passes as long as a session waits for tokens."""
        assert self._at_work is not None
        try:
            while self.requests:
                await self._join()
                if not self.requests:
                    break
                if self._is_paused:
                    continue
                async with self._at_work:
                    await self._pass()
                await asyncio.sleep(0)
        except Exception as error:
            self._scheduler = None  # its state is unknown now
            for request in self.requests.values():
                if not request.future.done():
                    request.future.set_exception(error)
        finally:
            self._task = self._at_work = None

    async def _join(self) -> None:
        """Waits, at most ``patience``, for sessions that are neither sampling nor asking; not where
        most are known to take longer.
        """
        assert self._changed is not None
        while self._is_paused:
            self._changed.clear()
            await self._changed.wait()
        start = time.perf_counter()
        while not self._is_paused and (absent := self.open - self.requests.keys() - self._late):
            if 2 * len(self._late) > len(self.open):
                break
            self._changed.clear()
            left = self._settings.patience - (time.perf_counter() - start)
            try:
                await asyncio.wait_for(self._changed.wait(), max(left, 0.0))
            except TimeoutError:
                self._late |= absent & self.open - self.requests.keys()
                self.counters.late += len(self._late & absent)
        self.counters.wait_seconds += time.perf_counter() - start

    async def _pass(self) -> None:
        """One pass of the model; sessions may ask and close meanwhile."""
        start = time.perf_counter()
        counters, requests = self.counters, dict(self.requests)
        # In a fixed order: the order of closing depends on timing.
        closed = sorted(self._closed, key=lambda session: session.number)
        self._closed.clear()
        done = await self._thread.run(functools.partial(self._run, requests, closed, counters))
        counters.model_seconds += time.perf_counter() - start
        for session, stop in done.items():
            request = requests[session]
            if self.requests.get(session) is not request:
                continue  # nobody waits for it any more
            del self.requests[session]
            if not request.future.done():
                request.future.set_result(request.action(stop, self._version))

    def _run(
        self,
        requests: dict[NativeSession, Request],
        closed: Sequence[NativeSession],
        counters: Counters,
    ) -> dict[NativeSession, Stop]:
        scheduler = self._scheduler
        if scheduler is None:
            from agent_r1.learner.memory_plan import free_memory
            from agent_r1.model.sampling_weights import SamplingWeights
            from agent_r1.rollout.native.scheduler import Scheduler  # the first need of torch

            policy, gib = self._policy, self._settings.cache_gib
            if self._weights is None:
                room = SHARE_OF_FREE * free_memory(policy.device)
                self._weights = SamplingWeights(policy, room)
            size = gib * 2**30 if gib else SHARE_OF_FREE * free_memory(policy.device)
            slots = self._settings.cache == "slots"
            budget = int(size) // policy.cache_bytes
            scheduler = Scheduler(policy, self._weights, budget, slots=slots)
            self._scheduler = scheduler
        scheduler.close(closed)
        return scheduler.run(requests, counters)
