"""GiGPO, group-in-group policy optimisation: arXiv 2505.10978, eq. 3 to 8."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from agent_r1.algorithms.advantages import group_relative, returns_to_go
from agent_r1.algorithms.base import GroupAlgorithm
from agent_r1.algorithms.credit import Credit, PerToken
from agent_r1.types import Group


class GiGPO(GroupAlgorithm):
    """``A = A_episode + step_weight * A_step``: GRPO's advantage of the whole trajectory, and that
    of the step among all steps of the group taken in the same state, by discounted return-to-go.

    Two states are the same where the environment gave them the same ``state_key``; a state met once
    adds nothing. The loss is a mean over all action tokens of all attempts, those of groups without
    a signal included, where eq. 8 has one over all steps.
    """

    compares_units = False  # but states

    class Settings(GroupAlgorithm.Settings):
        """``gamma``: discount per step. ``step_weight``: the paper's omega."""

        name: str = "gigpo"
        normalize_std: bool = True
        gamma: float = Field(0.95, gt=0, le=1)
        step_weight: float = Field(1.0, ge=0)

    def baseline(self, returns: Sequence[float]) -> list[float]:
        return group_relative(returns, normalize_std=self.settings.normalize_std)

    def advantages(self, groups: Sequence[Group], credit: Credit) -> list[list[PerToken]]:
        return [self._of_group(group, self.rewards(group, credit)) for group in groups]

    def _of_group(self, group: Group, rewards: list[PerToken]) -> list[PerToken]:
        episode = self.baseline([sum(map(sum, per_step)) for per_step in rewards])
        to_go = [
            returns_to_go([sum(step) for step in per_step], gamma=self.settings.gamma)
            for per_step in rewards
        ]
        anchors: dict[str, list[tuple[int, int]]] = {}
        for i, trajectory in enumerate(group.scored):
            for s, step in enumerate(trajectory.steps):
                if step.state_key is not None:
                    anchors.setdefault(step.state_key, []).append((i, s))
        advantages = [[a] * len(steps) for a, steps in zip(episode, to_go, strict=True)]
        for places in anchors.values():
            relative = self.baseline([to_go[i][s] for i, s in places])
            for (i, s), value in zip(places, relative, strict=True):
                advantages[i][s] += self.settings.step_weight * value
        return [
            [[a] * len(tokens) for a, tokens in zip(per_step, tokens_of, strict=True)]
            for per_step, tokens_of in zip(advantages, rewards, strict=True)
        ]
