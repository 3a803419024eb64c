"""The protocol of engines: tokens in, tokens and log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agent_r1.types import Action


@dataclass(slots=True, frozen=True)
class Sampling:
    """How to sample one action.

    Attributes:
        max_tokens: Longest action, in tokens.
        stop_token_ids: Tokens that end the action.
        stop_strings: Texts that end the action once a token completes them.
        temperature: 0 is greedy.
        top_p: Leave out all but the most probable tokens that make up this share; for evaluation
            only, since the log-probabilities are those before.
        top_k: The same of all but so many tokens; 0 for none.
    """

    max_tokens: int
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Session(Protocol):
    """One episode's conversation with an engine, which may keep its cache from turn to turn."""

    async def generate(self, prefix: Sequence[int], sampling: Sampling, seed: int) -> Action:
        """Samples the continuation of ``prefix`` (all token ids so far), with randomness from
        ``seed`` alone.
        """
        ...

    def close(self) -> None:
        """Ends the conversation and frees what it holds; a second call does nothing."""
        ...


class Engine(Protocol):
    """Tokens in, tokens and log-probabilities out."""

    def session(self, number: int = 0) -> Session:
        """A new conversation; where order matters, sessions are served by ``number``."""
        ...

    def load(self, version: int) -> None:
        """Takes over the policy's present weights as that version; no session may be open."""
        ...

    async def idle(self) -> None:
        """Waits, once all sessions are closed, until the model is at work no more."""
        ...

    def report(self) -> dict[str, float]:
        """Figures since the last report, by name; those that end in ``_seconds`` are wall time."""
        ...
