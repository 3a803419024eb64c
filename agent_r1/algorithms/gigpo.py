"""GiGPO, group-in-group policy optimisation: arXiv 2505.10978, eq. 3 to 8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field

from agent_r1.algorithms.advantages import group_relative, returns_to_go
from agent_r1.algorithms.base import GroupAlgorithm
from agent_r1.algorithms.credit import Attempt, Credit


class GiGPO(GroupAlgorithm):
    """``A = A_episode + step_weight * A_step``: GRPO's advantage of the whole trajectory, and that
    of the step among all steps of the group taken in the same state, by discounted return-to-go.

    Two states are the same where the environment gave them the same ``state_key``; a state met once
    adds nothing. The loss is a mean over all action tokens of all attempts, those of groups without
    a signal included, where eq. 8 has one over all steps.
    """

    compares_units = False  # compares states

    class Settings(GroupAlgorithm.Settings):
        """``normalize_std``: divide by the group's standard deviation; ``gamma``: discount per
        step; ``step_weight``: weight of the advantages of steps, the paper's omega.
        """

        name: str = "gigpo"
        normalize_std: bool = True
        gamma: float = Field(0.95, gt=0, le=1)
        step_weight: float = Field(1.0, ge=0)

    settings: Settings

    def baseline(self, returns: Sequence[float]) -> list[float]:
        return group_relative(returns, normalize_std=self.settings.normalize_std)

    def advantages(self, groups: Sequence[Sequence[Attempt]], credit: Credit) -> list[float]:
        return [a for g in groups for a in self._of_group(g, self.rewards(g, credit))]

    def _of_group(
        self, group: Sequence[Attempt], rewards: Sequence[Sequence[float]]
    ) -> Iterator[float]:
        pairs = zip(group, rewards, strict=True)
        earned = [attempt.step_sums(given) for attempt, given in pairs]
        episode = self.compared([sum(of_steps) for of_steps in earned])
        to_go = [returns_to_go(of_steps, gamma=self.settings.gamma) for of_steps in earned]
        anchors: dict[str, list[tuple[int, int]]] = {}
        for i, attempt in enumerate(group):
            for s, step in enumerate(attempt.trajectory.steps):
                if step.state_key is not None:
                    anchors.setdefault(step.state_key, []).append((i, s))
        advantages = [[a] * len(steps) for a, steps in zip(episode, to_go, strict=True)]
        for places in anchors.values():
            relative = self.compared([to_go[i][s] for i, s in places])
            for (i, s), value in zip(places, relative, strict=True):
                advantages[i][s] += self.settings.step_weight * value
        for attempt, per_step in zip(group, advantages, strict=True):
            yield from attempt.spread(per_step)
