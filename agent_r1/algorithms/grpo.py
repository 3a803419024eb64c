"""GRPO, group-relative policy optimisation: DeepSeekMath, arXiv 2402.03300, eq. 3 and 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from agent_r1.algorithms.advantages import group_relative
from agent_r1.algorithms.base import GroupAlgorithm


class GRPO(GroupAlgorithm):
    """``A = (R - mean(R)) / std(R)`` over the group, PPO's clipped loss, averaged over each
    trajectory and then over all trajectories (eq. 3). A group without a signal has advantages of 0
    and counts in that mean.

    The paper has KL k3 in the loss with coefficient 0.04; here there is none unless the recipe says
    so. ``aggregation = "token"`` lets every token weigh alike, as later work found better.
    """

    class Settings(GroupAlgorithm.Settings):
        """``normalize_std``: divide by the group's standard deviation."""

        name: str = "grpo"
        aggregation: Literal["token", "sequence", "fixed"] = "sequence"
        normalize_std: bool = True

    settings: Settings

    def baseline(self, returns: Sequence[float]) -> list[float]:
        return group_relative(returns, normalize_std=self.settings.normalize_std)
