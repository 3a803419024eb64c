"""REINFORCE++ and its baseline form: arXiv 2501.03262."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from agent_r1.algorithms.advantages import group_relative, returns_to_go, whiten
from agent_r1.algorithms.base import Algorithm, GroupAlgorithm, PolicyGradient
from agent_r1.algorithms.credit import Attempt, Credit


class ReinforcePP(PolicyGradient):
    """``A_t = sum_(i >= t) r_i``, normalised over all action tokens of the iteration that are in
    the loss, which is a mean over the same; no critic and no group, so none without a signal. The
    paper's KL belongs in the reward: ``kl = {coef = ..., estimator = "k1", place = "reward"}``.
    """

    class Settings(PolicyGradient.Settings):
        """``gamma``: discount per action token."""

        name: str = "reinforce++"
        gamma: float = Field(1.0, gt=0, le=1)

    settings: Settings

    def advantages(self, groups: Sequence[Sequence[Attempt]], credit: Credit) -> list[float]:
        gamma = self.settings.gamma
        rewards = (row for group in groups for row in self.rewards(group, credit))
        to_go = [value for row in rewards for value in returns_to_go(row, gamma=gamma)]
        return whitened(to_go, groups, self)


class ReinforcePPBaseline(GroupAlgorithm):
    """``A = R - mean(R)`` over the group, normalised over all action tokens of the iteration that
    are in the loss, which is a mean over the same; groups of equal returns are among them. The
    paper's KL is k2 in the loss.
    """

    class Settings(GroupAlgorithm.Settings):
        name: str = "reinforce++-baseline"

    def baseline(self, returns: Sequence[float]) -> list[float]:
        return group_relative(returns, normalize_std=False)

    def advantages(self, groups: Sequence[Sequence[Attempt]], credit: Credit) -> list[float]:
        return whitened(super().advantages(groups, credit), groups, self)


def whitened(
    advantages: Sequence[float], groups: Sequence[Sequence[Attempt]], algorithm: Algorithm
) -> list[float]:
    """``whiten`` over all tokens of all groups that are in the loss."""
    counted = [
        not algorithm.masks(attempt.trajectory)
        for group in groups
        for attempt in group
        for _ in range(sum(attempt.lengths))
    ]
    return whiten(advantages, counted)
