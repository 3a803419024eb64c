"""One call of ``generate`` inside the native engine, and the engine's counters."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from agent_r1.rollout.engine import Sampling
from agent_r1.types import Action, VersionSpan

Stop = Literal["stop", "length", "memory"]


@dataclass(eq=False)
class Request:
    """One call of ``generate`` and what has been sampled for it so far.

    Attributes:
        context: Tokens to compute before the next one is sampled: the call's prefix and, after a
            change of weights, what was sampled before it.
        limit: Most tokens to sample: ``sampling.max_tokens``, or fewer where memory is short.
        room: KV-cache tokens reserved for the session.
        uniforms: Random numbers, one for each token of the action.
        inherited: How many of the sampled tokens are in ``context``.
        spans: Spans of tokens whose weights have been replaced since.
    """

    context: list[int]
    sampling: Sampling
    seed: int
    future: asyncio.Future[Action]
    limit: int = 0
    room: int = 0
    uniforms: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    inherited: int = 0
    spans: list[VersionSpan] = field(default_factory=list)

    @property
    def is_sampling(self) -> bool:
        """Whether its context is computed."""
        return len(self.token_ids) > self.inherited

    @property
    def left(self) -> int:
        """Most tokens that may follow the context."""
        return self.limit - self.inherited

    def note(self, token_id: int, logprob: float, entropy: float) -> None:
        """Records one more sampled token."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.entropies.append(entropy)

    def outdated(self, version: int) -> None:
        """What was computed with the weights of ``version`` is dropped: who samples the rest must
        compute all that stands before it.
        """
        self._end_span(version)
        self.context += self.token_ids[self.inherited :]
        self.inherited = len(self.token_ids)

    def action(self, stop: Stop, version: int) -> Action:
        """What was sampled, the last of it by ``version``."""
        self._end_span(version)
        return Action(
            tuple(self.token_ids),
            tuple(self.logprobs),
            tuple(self.entropies),
            tuple(self.spans),
            stop,
        )

    def _end_span(self, version: int) -> None:
        start, end = self.spans[-1].end if self.spans else 0, len(self.token_ids)
        if end > start:
            if self.spans and self.spans[-1].version == version:  # after a pause
                start = self.spans.pop().start
            self.spans.append(VersionSpan(version, start, end))


@dataclass
class Counters:
    """The engine's work since it was made.

    Attributes:
        passes: Passes of the model.
        prefilled: Tokens run in bulk, not one by one in sampling.
        sampled: Tokens sampled.
        dropped: Tokens computed again because memory had run short.
        late: Episodes whose tools took longer than the patience; passes wait for them no more.
        model_seconds: Time in passes of the model; ``wait_seconds``: waiting for tools.
    """

    passes: int = 0
    prefilled: int = 0
    sampled: int = 0
    dropped: int = 0
    late: int = 0
    model_seconds: float = 0.0
    wait_seconds: float = 0.0
