"""What a step earned: from process rewards and the outcome reward to a return per step. Plain
numbers, no torch.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

from pydantic import Field

from agent_r1.algorithms.base import Credit
from agent_r1.config import NamedSection
from agent_r1.types import Step


class OutcomeCredit(Credit):
    """Every step of a trajectory gets its outcome: ``R_s = R``. Process rewards are recorded, not
    used.
    """

    class Settings(NamedSection):
        name: str = "outcome"

    def returns(self, rewards: list[dict[str, float]], outcome: float) -> list[float]:
        return [outcome] * len(rewards)


class _ProcessSettings(NamedSection):
    """``weights`` by part of the process reward; a part that is not named weighs 1."""

    weights: dict[str, float] = Field(default_factory=dict)

    def process(self, rewards: dict[str, float]) -> float:
        return sum(self.weights.get(part, 1.0) * value for part, value in rewards.items())


class TrajectoryCredit(Credit):
    """Process rewards summed over the trajectory: ``R_s = R + sum_t r_t``, the same for all its
    steps.
    """

    class Settings(_ProcessSettings):
        name: str = "trajectory"

    def returns(self, rewards: list[dict[str, float]], outcome: float) -> list[float]:
        total = outcome + sum(map(self.settings.process, rewards))
        return [total] * len(rewards)


class StepCredit(Credit):
    """Return-to-go: ``R_s = sum_{t >= s} gamma^(t-s) r_t + gamma^(S-1-s) R``, one number per
    step.
    """

    per_step = True

    class Settings(_ProcessSettings):
        """``compare``: a step's return with those of all steps of the group, of the same index, or
        of the same ``state_key``. Returns-to-go fall as an episode goes on, so comparing all steps
        favours the
        the early ones.
        """

        name: str = "step"
        gamma: float = Field(1.0, ge=0.0, le=1.0)
        compare: Literal["group", "index", "state_key"] = "group"

    def peers(self, index: int, step: Step) -> Hashable:
        if self.settings.compare == "state_key":
            return step.state_key if step.state_key is not None else ("no key", id(step))
        return index if self.settings.compare == "index" else None

    def returns(self, rewards: list[dict[str, float]], outcome: float) -> list[float]:
        to_go: list[float] = []
        for index, reward in enumerate(reversed(rewards)):
            after = self.settings.gamma * to_go[-1] if index else outcome
            to_go.append(self.settings.process(reward) + after)
        return to_go[::-1]
