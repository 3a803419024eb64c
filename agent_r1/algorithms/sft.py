"""Supervised fine-tuning: the warm start before reinforcement learning, and expert iteration after
it (rejection sampling, e.g. STaR, arXiv 2203.14465).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from agent_r1.algorithms.base import Algorithm
from agent_r1.algorithms.credit import Attempt, Credit

if TYPE_CHECKING:
    from torch import Tensor


class SFT(Algorithm):
    """``-log pi`` of each action token of demonstrations, all tokens of a batch alike."""

    demonstrated = True
    refills = 20
    """Most times per iteration that tasks without a demonstration are replaced."""

    class Settings(Algorithm.Settings):
        """The keys of ``[algorithm]``.

        Attributes:
            source: ``gold``: the environment's own demonstrations. Or the folders of runs, whose
                successful trajectories are imitated.
            require: Least values of outcome metrics, by name, that an episode needs to be
                imitated, besides success.
        """

        name: str = "sft"
        source: str | tuple[str, ...] = "gold"
        require: dict[str, float] = Field(default_factory=dict)

    settings: Settings

    def advantages(self, groups: Sequence[Sequence[Attempt]], credit: Credit) -> list[float]:
        return [1.0] * sum(sum(attempt.lengths) for group in groups for attempt in group)

    def policy_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor
    ) -> Tensor:
        return -advantages * logprobs
