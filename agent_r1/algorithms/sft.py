"""Supervised fine-tuning: the warm start before reinforcement learning, and expert iteration after
it (rejection sampling, e.g. STaR, arXiv 2203.14465).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from agent_r1.algorithms.base import Algorithm
from agent_r1.algorithms.credit import Credit, PerToken
from agent_r1.config.section import NamedSection
from agent_r1.types import Group

if TYPE_CHECKING:
    from torch import Tensor


class SFT(Algorithm):
    """``-log pi`` of each action token of demonstrations, all tokens of a batch alike."""

    demonstrated = True

    class Settings(NamedSection):
        """The keys of ``[algorithm]``.

        Attributes:
            source: ``gold``: the environment's own demonstrations. Or the folders of runs, whose
                successful trajectories are imitated.
            require: What an episode must have reached to be imitated, besides success: the least
                value of a metric of its outcome, by name.
        """

        name: str = "sft"
        source: str | tuple[str, ...] = "gold"
        require: dict[str, float] = Field(default_factory=dict)

        # What other algorithms let the recipe choose. A task without a demonstration is replaced.
        refills: ClassVar[int] = 20
        aggregation: ClassVar[str] = "token"
        kl: ClassVar[None] = None
        entropy_coef: ClassVar[float] = 0.0
        truncated: ClassVar[str] = "keep"
        importance_cap: ClassVar[None] = None
        loss_mask: ClassVar[bool] = True

    def advantages(self, groups: Sequence[Group], credit: Credit) -> list[list[PerToken]]:
        return [
            [[[1.0] * len(step.action.token_ids) for step in t.steps] for t in group.scored]
            for group in groups
        ]

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, sequences: Tensor) -> Tensor:
        return logprobs.new_ones(logprobs.shape)  # no policy sampled these

    def clip_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0

    def policy_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor
    ) -> Tensor:
        return -advantages * logprobs
