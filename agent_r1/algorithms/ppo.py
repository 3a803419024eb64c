"""PPO, proximal policy optimisation with a critic: arXiv 1707.06347; GAE: arXiv 1506.02438."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from agent_r1.algorithms.advantages import gae
from agent_r1.algorithms.base import Algorithm
from agent_r1.algorithms.credit import Credit, PerToken, like
from agent_r1.algorithms.reinforce_pp import whitened
from agent_r1.types import Group, Trajectory

if TYPE_CHECKING:
    from torch import Tensor


class PPO(Algorithm):
    """GAE over the action tokens of a trajectory, across its turns: from the last token of one turn
    it goes on to the first of the next, and the observation between them is no time. The critic is
    a value head on the policy's own last hidden states. The loss is a mean over all action tokens
    (the paper's expectation over time steps, eq. 7).
    """

    critic = True

    class Settings(Algorithm.Settings):
        """Further keys.

        Attributes:
            gamma, lam: Per action token (GAE).
            normalize: Advantages to mean 0 and deviation 1 over the iteration's action tokens that
                are in the loss.
            truncated: Also ``bootstrap``: of an episode that a limit cut off, the critic's value of
                its last state stands in for the outcome that it did not come to.
            value_coef: Weight of the value loss.
            value_clip: How far a value may move from the old one, as in the loss of the policy;
                none by default.
            value_lr: Of the value head, with the schedule of ``learner.lr``.
            value_gradient: Whether the value loss also trains the model below the head.
            critic_warmup: Iterations that train the value head alone.
            advantage_mask: False lets GAE walk over the environment's tokens, too: for ablations.
        """

        name: str = "ppo"
        gamma: float = Field(1.0, gt=0, le=1)
        lam: float = Field(1.0, ge=0, le=1)
        normalize: bool = True
        truncated: Literal["keep", "mask", "bootstrap"] = "bootstrap"  # type: ignore[assignment]
        value_coef: float = Field(0.5, gt=0)
        value_clip: float | None = Field(None, gt=0)
        value_lr: float = Field(1e-3, gt=0)
        value_gradient: bool = False
        critic_warmup: int = Field(0, ge=0)
        advantage_mask: bool = True

        @model_validator(mode="after")
        def _masks(self) -> Self:
            if self.advantage_mask and not self.loss_mask:
                raise ValueError("loss_mask = false needs advantage_mask = false as well")
            if not self.advantage_mask and self.importance_cap is not None:
                raise ValueError("importance_cap has no effect with advantage_mask = false")
            return self

    def outcome(self, trajectory: Trajectory) -> float:
        return 0.0 if self.bootstraps(trajectory) else super().outcome(trajectory)

    def bootstraps(self, trajectory: Trajectory) -> bool:
        return bool(self.settings.truncated == "bootstrap" and trajectory.stop.truncated)

    def advantages(self, groups: Sequence[Group], credit: Credit) -> list[list[PerToken]]:
        advantages = [
            [self.estimate(trajectory, rewards)[0] for trajectory, rewards in pairs]
            for pairs in self._rewarded(groups, credit)
        ]
        return whitened(advantages, groups, self) if self.settings.normalize else advantages

    def value_targets(self, groups: Sequence[Group], credit: Credit) -> list[list[PerToken]]:
        return [
            [self.estimate(trajectory, rewards)[1] for trajectory, rewards in pairs]
            for pairs in self._rewarded(groups, credit)
        ]

    def _rewarded(
        self, groups: Sequence[Group], credit: Credit
    ) -> list[list[tuple[Trajectory, PerToken]]]:
        return [[*zip(g.scored, self.rewards(g, credit), strict=True)] for g in groups]

    def estimate(self, trajectory: Trajectory, rewards: PerToken) -> tuple[PerToken, PerToken]:
        """GAE of one trajectory, and ``A + V``, the return that it stands for."""
        before = [*chain.from_iterable(values(trajectory, s) for s in range(len(rewards)))]
        advantages = gae(
            [*chain.from_iterable(rewards)],
            before,
            last_value=self.last_value(trajectory),
            gamma=self.settings.gamma,
            lam=self.settings.lam,
        )
        targets = [a + v for a, v in zip(advantages, before, strict=True)]
        return like(rewards, advantages), like(rewards, targets)

    def last_value(self, trajectory: Trajectory) -> float:
        """The value after the last action: 0 unless a limit cut the episode off."""
        last = trajectory.steps[-1].values
        assert last is not None
        return last[-1] if self.bootstraps(trajectory) else 0.0

    def value_loss(self, values: Tensor, old_values: Tensor, targets: Tensor) -> Tensor:
        from agent_r1.algorithms.losses import value_loss

        loss = value_loss(values, old_values, targets, clip=self.settings.value_clip)
        weighted: Tensor = self.settings.value_coef * loss
        return weighted


def values(trajectory: Trajectory, index: int) -> Sequence[float]:
    """The critic's values of the states before each action token of a step."""
    of_step = trajectory.steps[index].values
    assert of_step is not None, "the learner prepares first"
    return of_step[:-1]
