"""What an algorithm is: an advantage estimator, a policy loss, a normaliser, and perhaps a KL term.

A new one is a file with a subclass of ``Algorithm`` and a line in ``ALGORITHMS``, or no line at
all when the recipe names it as ``"my_algorithm.py:MyAlgorithm"``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from agent_r1.config import NamedSection
from agent_r1.types import Group, Step

if TYPE_CHECKING:
    from torch import Tensor

Advantages = list[list[list[float]]]
"""Per scored trajectory of a group, per step, per action token."""


def spread(per_step: list[list[float]], group: Group) -> Advantages:
    """One number per trajectory and step, repeated for every action token of the step."""
    return [
        [[value] * len(step.action.token_ids) for value, step in zip(values, t.steps, strict=True)]
        for values, t in zip(per_step, group.scored, strict=True)
    ]


class Credit:
    """From the rewards of a trajectory to the return of each of its steps."""

    class Settings(NamedSection):
        """The keys of ``[credit]``."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    per_step: bool = False
    """Whether returns differ between the steps of a trajectory."""

    def returns(self, rewards: list[dict[str, float]], outcome: float) -> list[float]:
        """The return of each step, from its process rewards by part and the episode's outcome
        reward.
        """
        raise NotImplementedError

    def peers(self, index: int, step: Step) -> Hashable:
        """With which steps of the group a step's return is compared: those that give the same."""
        return None


class Algorithm:
    """Subclass it, set ``Settings``, and write the two functions."""

    class Settings(NamedSection):
        """The keys of ``[algorithm]``."""

        kl_coef: float = Field(0.0, ge=0)
        """Weight of the KL term to the reference policy, estimator k3, in the loss; 0 for none."""
        entropy_coef: float = Field(0.0, ge=0)
        """Weight of the entropy in the loss, which rewards it; 0 for none."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def advantages(self, group: Group, credit: Credit) -> Advantages:
        """Advantages of the group's scored trajectories, in their order."""
        raise NotImplementedError

    def token_weights(self, num_action_tokens: list[int]) -> list[float]:
        """What one action token of each trajectory weighs in the loss; all tokens together weigh 1.

        Because the weights are known before the first forward pass, the loss does not depend on
        how a batch is cut into micro-batches. Default: every token alike.
        """
        total = sum(num_action_tokens)
        return [1.0 / total] * len(num_action_tokens)

    def clip_bounds(self) -> tuple[float, float]:
        """Ratios outside are reported as clipped. Default: none are."""
        return 0.0, float("inf")

    def policy_loss(
        self, logprobs: Tensor, sampling_logprobs: Tensor, advantages: Tensor
    ) -> Tensor:
        """Loss of each action token. All arguments and the result are (T,)."""
        raise NotImplementedError
