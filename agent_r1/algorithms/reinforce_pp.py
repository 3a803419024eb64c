"""REINFORCE++ and its baseline form: arXiv 2501.03262."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from pydantic import Field

from agent_r1.algorithms.advantages import group_relative, returns_to_go, whiten
from agent_r1.algorithms.base import Algorithm, GroupAlgorithm
from agent_r1.algorithms.credit import Credit, PerToken, like
from agent_r1.types import Group


class ReinforcePP(Algorithm):
    """``A_t = sum_(i >= t) r_i``, normalised over all action tokens of the iteration that are in
    the loss, which is a mean over the same; no critic and no group, so none without a signal. The
    paper's KL belongs in the reward: ``kl = {coef = ..., estimator = "k1", place = "reward"}``.
    """

    class Settings(Algorithm.Settings):
        """``gamma``: discount per action token."""

        name: str = "reinforce++"
        gamma: float = Field(1.0, gt=0, le=1)

    def advantages(self, groups: Sequence[Group], credit: Credit) -> list[list[PerToken]]:
        gamma = self.settings.gamma
        to_go = [
            [
                like(rewards, returns_to_go([*chain.from_iterable(rewards)], gamma=gamma))
                for rewards in self.rewards(group, credit)
            ]
            for group in groups
        ]
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

    def advantages(self, groups: Sequence[Group], credit: Credit) -> list[list[PerToken]]:
        return whitened(super().advantages(groups, credit), groups, self)


def whitened(
    advantages: list[list[PerToken]], groups: Sequence[Group], algorithm: Algorithm
) -> list[list[PerToken]]:
    """``whiten`` over all tokens of all groups that are in the loss."""
    flat = [a for group in advantages for trajectory in group for step in trajectory for a in step]
    counted = [
        not algorithm.masks(trajectory)
        for group in groups
        for trajectory in group.scored
        for step in trajectory.steps
        for _ in step.action.token_ids
    ]
    rest = iter(whiten(flat, counted))
    return [
        [[[next(rest) for _ in step] for step in trajectory] for trajectory in group]
        for group in advantages
    ]
