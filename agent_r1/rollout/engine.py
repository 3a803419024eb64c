"""The protocol of engines: tokens in, tokens and log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from agent_r1.types import Action

if TYPE_CHECKING:
    from agent_r1.model.policy import Policy
    from agent_r1.model.settings import ModelSettings


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
    """One episode's conversation with an engine, which may keep its cache from turn to turn.

    Attributes:
        outage: Why the engine itself fails to give the action that is waited for; an episode whose
            time is over meanwhile does not count. ``None`` if it works, however slowly.
    """

    @property
    def outage(self) -> str | None: ...

    async def generate(self, prefix: Sequence[int], sampling: Sampling, seed: int) -> Action:
        """Samples the continuation of ``prefix`` (all token ids so far), with randomness from
        ``seed`` alone.
        """
        ...

    def close(self) -> None:
        """Ends the conversation and frees what it holds; a second call does nothing."""
        ...


@dataclass(slots=True, frozen=True)
class Traits:
    """What an engine promises.

    Attributes:
        exact: Its log-probabilities are the learner's but for the last bits: importance weights
            are not needed.
        rests: It samples with the very model that is trained, and so not while the learner is at
            work; others go on meanwhile.
    """

    exact: bool = True
    rests: bool = True


class Engine(Protocol):
    """Tokens in, tokens and log-probabilities out; made as ``Engine(settings, policy)``, where the
    policy's weights are version 0.

    The life of an engine: ``start``, then sessions, with ``pause`` and ``sync`` before, between or
    during them, then ``close``.
    """

    traits: ClassVar[Traits]

    @classmethod
    def must_serve(cls, settings: Any, model: ModelSettings) -> None:
        """Raises ``ConfigError`` if the engine cannot run that model here; loads no weights."""
        ...

    async def start(self, longest: int | None = None) -> None:
        """Makes the engine ready for sessions; does nothing if it is.

        Args:
            longest: Longest context that sessions will have, in tokens; the model's by default.

        Raises:
            ConfigError: It cannot be, and why; e.g. a server has another model.
        """
        ...

    def session(self, number: int = 0) -> Session:
        """A new conversation; where order matters, sessions are served by ``number``."""
        ...

    async def pause(self) -> None:
        """The learner is about to work with the policy, and perhaps to change its weights: until
        ``resume`` the engine makes no use of it and, if it rests, holds no memory for it. Who asks
        for tokens waits, or goes on with the weights that the engine has.
        """
        ...

    def resume(self) -> None:
        """Ends a pause, after ``sync`` if the weights have changed; without one it does nothing."""
        ...

    async def sync(self, weights: Policy, version: int) -> None:
        """From its return on, tokens are sampled from these weights. Sessions may be open: an
        action that is being sampled goes on, and tells which weights sampled which of its tokens.
        """
        ...

    async def idle(self) -> None:
        """Waits until the model is at work no more; does nothing while sessions are open."""
        ...

    def report(self) -> dict[str, float]:
        """Figures since the last report, by name; those that end in ``_seconds`` are wall time."""
        ...

    def advice(self, figures: Mapping[str, float], seconds: float) -> Iterator[str]:
        """What in a report concerns the user, and the cure, a line each.

        Args:
            figures: The report. seconds: Wall time of the rollout it is about.
        """
        ...

    async def close(self) -> None:
        """Frees all that the engine holds; ``start`` makes it ready again."""
        ...
