"""GSPO, group sequence policy optimisation: arXiv 2507.18071, eq. 5 to 7."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from agent_r1.algorithms.grpo import GRPO

if TYPE_CHECKING:
    from torch import Tensor


class GSPO(GRPO):
    """GRPO's advantages; ratio and clipping are those of the whole sequence, here all action tokens
    of the trajectory: ``s = (pi(y) / pi_old(y))^(1/|y|)``. Its clip range is narrow, since a mean
    over many tokens moves little (section 5.1). The mean is over all sequences, those of groups
    without a signal included (eq. 5).
    """

    whole_trajectories = True

    class Settings(GRPO.Settings):
        name: str = "gspo"
        clip_low: float = Field(3e-4, gt=0)
        clip_high: float = Field(4e-4, gt=0)
        aggregation: Literal["token", "sequence", "fixed"] = "sequence"

    settings: Settings

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, sequences: Tensor) -> Tensor:
        from agent_r1.algorithms.losses import sequence_ratio

        return sequence_ratio(logprobs, old_logprobs, sequences)

    def policy_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor
    ) -> Tensor:
        from agent_r1.algorithms.losses import clip_surrogate

        return clip_surrogate(
            self.ratio(logprobs, old_logprobs, sequences),
            advantages,
            clip_low=self.settings.clip_low,
            clip_high=self.settings.clip_high,
        )
