"""The simple engine: for models whose past is more than keys and values along a tree.

A batch starts when every open session waits for tokens. Rows are padded on the left and every turn
is prefilled anew, by the model's own forward pass and cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from agent_r1.config.section import NamedSection
from agent_r1.rollout.engine import Sampling, Traits
from agent_r1.rollout.model_thread import EngineThread
from agent_r1.rollout.native.request import Request, Stop
from agent_r1.types import Action

if TYPE_CHECKING:
    from agent_r1.model.policy import Policy
    from agent_r1.model.settings import ModelSettings


class PaddedSession:
    """One episode's place in the engine."""

    outage = None

    def __init__(self, engine: PaddedEngine, number: int) -> None:
        self._engine = engine
        self.number = number

    async def generate(self, prefix: Sequence[int], sampling: Sampling, seed: int) -> Action:
        future: asyncio.Future[Action] = asyncio.get_running_loop().create_future()
        self._engine.waiting[self] = Request(list(prefix), sampling, seed, future)
        self._engine.wake()
        try:
            return await future
        finally:
            self._engine.waiting.pop(self, None)
            self._engine.wake()

    def close(self) -> None:
        self._engine.open.discard(self)
        self._engine.wake()


class PaddedEngine:
    """See the module's docstring."""

    traits: ClassVar = Traits()

    class Settings(NamedSection):
        name: str = "padded"

    def __init__(self, settings: Settings, policy: Policy) -> None:
        self._policy = policy
        self._version = 0
        self._counters = {"prefilled": 0, "sampled": 0}
        self.open: set[PaddedSession] = set()
        self.waiting: dict[PaddedSession, Request] = {}
        self._task: asyncio.Task[None] | None = None
        self._at_work: asyncio.Lock | None = None
        self._is_paused = False
        self._thread = EngineThread()

    @classmethod
    def must_serve(cls, settings: Settings, model: ModelSettings) -> None:
        return None

    async def start(self, longest: int | None = None) -> None:
        return None

    def session(self, number: int = 0) -> PaddedSession:
        session = PaddedSession(self, number)
        self.open.add(session)
        return session

    async def sync(self, weights: Policy, version: int) -> None:
        """Waits for the batch at work, which is sampled whole from the old weights."""
        async with self._at_work or contextlib.nullcontext():
            self._policy, self._version = weights, version

    async def pause(self) -> None:
        self._is_paused = True
        async with self._at_work or contextlib.nullcontext():
            pass

    def resume(self) -> None:
        self._is_paused = False
        self.wake()

    def report(self) -> dict[str, float]:
        counters = dict(self._counters)
        self._counters = dict.fromkeys(counters, 0)
        return {name: float(value) for name, value in counters.items()}

    def advice(self, figures: Mapping[str, float], seconds: float) -> Iterator[str]:
        yield from ()

    async def idle(self) -> None:
        if self._task is not None and not self.open:
            await asyncio.wait({self._task})

    async def close(self) -> None:
        await self.idle()

    def wake(self) -> None:
        if self._task is None and self._can_begin():
            self._task = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        """Runs batches as long as every open session waits."""
        self._at_work = asyncio.Lock()
        try:
            await asyncio.sleep(0)  # what opens or closes now counts
            while self._can_begin():
                async with self._at_work:
                    await self._batch()
                await asyncio.sleep(0)
        finally:
            self._task = self._at_work = None

    def _can_begin(self) -> bool:
        return bool(self.waiting) and len(self.waiting) == len(self.open) and not self._is_paused

    async def _batch(self) -> None:
        sessions = sorted(self.waiting, key=lambda session: session.number)
        requests = [self.waiting.pop(session) for session in sessions]
        try:
            batch = functools.partial(sample, self._policy, requests, self._version)
            actions = await self._thread.run(batch)
        except Exception as error:
            for request in requests:
                if not request.future.done():
                    request.future.set_exception(error)
            return
        self._counters["prefilled"] += sum(len(request.context) for request in requests)
        for request, action in zip(requests, actions, strict=True):
            self._counters["sampled"] += len(action.token_ids)
            if not request.future.done():
                request.future.set_result(action)


def sample(policy: Policy, requests: Sequence[Request], version: int) -> list[Action]:
    """One batch: all rows run until the last is done."""
    import torch
    from transformers import DynamicCache

    from agent_r1.rollout.sampling import draw, stop_of

    longest = max(len(request.context) for request in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, longest - len(request.context) :] = torch.tensor(request.context)
        mask[row, longest - len(request.context) :] = 1
        rng = np.random.default_rng(request.seed)
        request.limit = request.sampling.max_tokens
        request.uniforms = rng.random(request.limit).tolist()
    ids, mask = ids.to(policy.device), mask.to(policy.device)
    cache = DynamicCache(config=policy.base.config)
    stops: dict[Request, Stop] = {}
    with torch.inference_mode():
        while True:
            logits = policy.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            rest = [min(len(r.token_ids), r.limit - 1) for r in requests]
            uniforms = [r.uniforms[i] for r, i in zip(requests, rest, strict=True)]
            drawn = draw(logits, uniforms, [request.sampling for request in requests])
            for request, token_id, logprob, entropy in zip(requests, *drawn, strict=True):
                if request not in stops:
                    request.note(token_id, logprob, entropy)
                    stop = stop_of(request.token_ids, request.sampling, policy.tokenizer)
                    if stop is not None:
                        stops[request] = stop
            if len(stops) == len(requests):
                return [request.action(stops[request], version) for request in requests]
            ids = torch.tensor(drawn[0], device=policy.device)[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
