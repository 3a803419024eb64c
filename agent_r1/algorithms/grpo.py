"""GRPO, group-relative policy optimisation: DeepSeekMath, arXiv 2402.03300, eq. 3 and 4."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from agent_r1.algorithms.advantages import group_relative
from agent_r1.algorithms.base import Advantages, Algorithm, Credit, spread
from agent_r1.types import Group

if TYPE_CHECKING:
    from torch import Tensor


class GRPO(Algorithm):
    """Advantages relative to the group, clipped ratio, optional KL to the reference in the loss.

    With outcome or trajectory credit the returns of the group's trajectories are compared, and
    every action token of a trajectory gets the same advantage. With step credit the returns of all
    steps of the group are compared (process supervision, section 4.1.3), and a token gets its
    step's.
    """

    class Settings(Algorithm.Settings):
        """``aggregation``: every token alike, or every trajectory alike (the paper's eq. 3)."""

        name: str = "grpo"
        normalize_std: bool = True
        clip_low: float = Field(0.2, gt=0)
        clip_high: float = Field(0.2, gt=0)
        aggregation: Literal["token", "sequence"] = "token"

    def advantages(self, group: Group, credit: Credit) -> Advantages:
        returns = [
            credit.returns([step.rewards for step in trajectory.steps], trajectory.outcome.reward)
            for trajectory in group.scored
            if trajectory.outcome is not None
        ]
        if credit.per_step:
            steps = [(i, s) for t in group.scored for i, s in enumerate(t.steps)]
            flat = [value for per_trajectory in returns for value in per_trajectory]
            relative = iter(self._relative(flat, [credit.peers(*step) for step in steps]))
            return spread([[next(relative) for _ in values] for values in returns], group)
        whole = self._relative([values[0] for values in returns], [None] * len(returns))
        per_step = [[value] * len(values) for value, values in zip(whole, returns, strict=True)]
        return spread(per_step, group)

    def _relative(self, returns: list[float], peers: list[Hashable]) -> list[float]:
        """``group_relative`` among the returns that have the same peers."""
        relative = [0.0] * len(returns)
        for peer in set(peers):
            indices = [index for index, other in enumerate(peers) if other == peer]
            values = [returns[index] for index in indices]
            normalized = group_relative(values, normalize_std=self.settings.normalize_std)
            for index, value in zip(indices, normalized, strict=True):
                relative[index] = value
        return relative

    def token_weights(self, num_action_tokens: list[int]) -> list[float]:
        if self.settings.aggregation == "token":
            return super().token_weights(num_action_tokens)
        return [1.0 / (len(num_action_tokens) * count) for count in num_action_tokens]

    def clip_bounds(self) -> tuple[float, float]:
        return 1.0 - self.settings.clip_low, 1.0 + self.settings.clip_high

    def policy_loss(
        self, logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor
    ) -> Tensor:
        from agent_r1.algorithms.losses import clipped_policy_loss

        return clipped_policy_loss(
            logprobs,
            sampling_logprobs,
            advantages,
            clip_low=self.settings.clip_low,
            clip_high=self.settings.clip_high,
        )
