"""DAPO, decoupled clip and dynamic sampling policy optimisation: arXiv 2503.14476."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from agent_r1.algorithms.advantages import ZERO_STD
from agent_r1.algorithms.grpo import GRPO
from agent_r1.config.section import Section
from agent_r1.types import Estimates, Group, StopReason, Trajectory


class OverlongSettings(Section):
    """Soft over-long punishment (eq. 13), in action tokens of an episode: nothing up to
    ``length - buffer``, falling to -1 at ``length``; -1, too, where a limit of tokens cut it off.

    Attributes:
        length: Action tokens at which an episode loses 1.
        buffer: Action tokens before that over which the punishment grows.
    """

    length: int = Field(ge=1)
    buffer: int = Field(ge=1)

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if self.buffer > self.length:
            raise ValueError(f"overlong.buffer = {self.buffer} is more than length = {self.length}")
        return self


class DAPO(GRPO):
    """GRPO with four changes: the upper clip bound is higher, so that rare tokens may rise
    (eq. 10); groups whose attempts all succeed or all fail alike are replaced by fresh ones
    (eq. 11); every token weighs alike (eq. 12); and over-long episodes lose up to 1 (eq. 13).

    Only the environment's outcomes decide whether a group has a signal: neither the length
    punishment nor process rewards nor a KL penalty turn equal outcomes into one. A group that is
    left out is not in the batch, and counts in no mean.
    """

    replaces_groups = True

    class Settings(GRPO.Settings):
        """``refills``: most draws of fresh tasks per iteration, to replace groups without a
        signal. ``overlong``: none by default.
        """

        name: str = "dapo"
        aggregation: Literal["token", "sequence", "fixed"] = "token"
        clip_high: float = Field(0.28, gt=0)
        refills: int = Field(3, ge=0)
        overlong: OverlongSettings | None = None

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.refills = settings.refills

    def has_signal(self, group: Group, known: Estimates) -> bool:
        outcomes = [t.outcome.reward for t in group.scored if t.outcome is not None]
        return bool(outcomes) and max(outcomes) - min(outcomes) >= ZERO_STD

    def outcome(self, trajectory: Trajectory) -> float:
        reward = super().outcome(trajectory)
        if (limits := self.settings.overlong) is None:
            return reward
        if trajectory.stop is StopReason.MAX_TOKENS:
            return reward - 1.0  # nobody knows how long it would have become
        return reward + overlong_punishment(
            trajectory.num_action_tokens, length=limits.length, buffer=limits.buffer
        )


def overlong_punishment(num_tokens: int, *, length: int, buffer: int) -> float:
    """``0`` up to ``length - buffer``, ``(length - buffer - n) / buffer`` up to ``length``, then
    ``-1``.

    Example:
        >>> [overlong_punishment(n, length=100, buffer=20) for n in (80, 90, 100, 200)]
        [0.0, -0.5, -1.0, -1.0]
    """
    return -min(1.0, max(0, num_tokens - (length - buffer)) / buffer) + 0.0
