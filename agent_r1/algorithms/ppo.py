"""PPO, proximal policy optimisation with a critic: arXiv 1707.06347; GAE: arXiv 1506.02438."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from agent_r1.algorithms.advantages import gae
from agent_r1.algorithms.base import PolicyGradient
from agent_r1.algorithms.credit import Attempt, Credit
from agent_r1.algorithms.reinforce_pp import whitened
from agent_r1.types import Trajectory

if TYPE_CHECKING:
    from torch import Tensor


class PPO(PolicyGradient):
    """GAE over the action tokens of a trajectory, across its turns: the first token of a turn
    directly follows the last of the turn before; observations do not count as time. The critic is
    a value head on the policy's own last hidden states. The loss is a mean over all action tokens
    (the paper's expectation over time steps, eq. 7).
    """

    critic = True

    class Settings(PolicyGradient.Settings):
        """Further keys.

        Attributes:
            gamma, lam: Per action token (GAE).
            normalize: Advantages to mean 0 and deviation 1 over the iteration's action tokens that
                are in the loss.
            truncated: Also ``bootstrap``: in an episode that a limit cut off, the critic's value of
                the last state replaces the missing outcome.
            value_coef: Weight of the value loss.
            value_clip: How far a value may move from the old one, as in the loss of the policy;
                none by default.
            value_lr: Rate of the value head, with the schedule of ``learner.lr``.
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
            for key in ("importance_cap", "importance_band", "sequence_band"):
                if not self.advantage_mask and getattr(self, key) is not None:
                    raise ValueError(f"{key} has no effect with advantage_mask = false")
            return self

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.advantage_mask, self.critic_warmup = settings.advantage_mask, settings.critic_warmup
        self.value_lr, self.value_gradient = settings.value_lr, settings.value_gradient

    def outcome(self, trajectory: Trajectory) -> float:
        return 0.0 if self.bootstraps(trajectory) else super().outcome(trajectory)

    def bootstraps(self, trajectory: Trajectory) -> bool:
        return self.settings.truncated == "bootstrap" and trajectory.stop.truncated

    def advantages(self, groups: Sequence[Sequence[Attempt]], credit: Credit) -> list[float]:
        advantages = [a for of_attempt, _ in self._estimates(groups, credit) for a in of_attempt]
        return whitened(advantages, groups, self) if self.settings.normalize else advantages

    def value_targets(self, groups: Sequence[Sequence[Attempt]], credit: Credit) -> list[float]:
        return [t for _, of_attempt in self._estimates(groups, credit) for t in of_attempt]

    def _estimates(
        self, groups: Sequence[Sequence[Attempt]], credit: Credit
    ) -> Iterator[tuple[list[float], list[float]]]:
        for group in groups:
            for attempt, rewards in zip(group, self.rewards(group, credit), strict=True):
                yield self.estimate(attempt, rewards)

    def estimate(
        self, attempt: Attempt, rewards: Sequence[float]
    ) -> tuple[list[float], list[float]]:
        """GAE of one trajectory, and ``A + V``, the return that it stands for; (T,) each."""
        advantages = gae(
            rewards,
            attempt.values,
            last_value=self.last_value(attempt),
            gamma=self.settings.gamma,
            lam=self.settings.lam,
        )
        return advantages, [a + v for a, v in zip(advantages, attempt.values, strict=True)]

    def last_value(self, attempt: Attempt) -> float:
        """The value after the last action: 0 unless a limit cut the episode off."""
        return attempt.last_value if self.bootstraps(attempt.trajectory) else 0.0

    def value_loss(self, values: Tensor, old_values: Tensor, targets: Tensor) -> Tensor:
        from agent_r1.algorithms.losses import value_loss

        loss = value_loss(values, old_values, targets, clip=self.settings.value_clip)
        weighted: Tensor = self.settings.value_coef * loss
        return weighted
