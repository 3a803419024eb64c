"""One call of ``generate`` inside the native engine, and the engine's counters."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from agent_r1.rollout.engine import Sampling
from agent_r1.types import Action

if TYPE_CHECKING:
    pass


Stop = Literal["stop", "length", "memory"]


@dataclass(eq=False)
class Request:
    """One call of ``generate`` and what has been sampled for it so far."""

    context: list[int]
    sampling: Sampling
    seed: int
    future: asyncio.Future[Action]
    limit: int = 0
    """Most tokens to sample: ``sampling.max_tokens``, or fewer where memory is short."""
    room: int = 0
    """KV-cache tokens reserved for this session."""
    uniforms: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    def note(self, token_id: int, logprob: float, entropy: float) -> None:
        """Records one more sampled token."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.entropies.append(entropy)

    def action(self, stop: Stop, version: int) -> Action:
        return Action(
            tuple(self.token_ids), tuple(self.logprobs), tuple(self.entropies), version, stop
        )


@dataclass
class Counters:
    """The engine's work since its last report.

    Attributes:
        passes: Passes of the model.
        prefilled: Tokens run in bulk, not one by one in sampling.
        sampled: Tokens sampled.
        dropped: Tokens computed again because memory had run short.
        late: How often a pass went on without an episode whose tools took longer than the patience.
        model_seconds: Time in passes of the model; ``wait_seconds``: waiting for tools.
    """

    passes: int = 0
    prefilled: int = 0
    sampled: int = 0
    dropped: int = 0
    late: int = 0
    model_seconds: float = 0.0
    wait_seconds: float = 0.0
