"""CISPO, clipped importance-sampling policy optimisation: MiniMax-M1, arXiv 2506.13585, eq. 4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from agent_r1.algorithms.grpo import GRPO

if TYPE_CHECKING:
    from torch import Tensor


class CISPO(GRPO):
    """GRPO's advantages; REINFORCE weighed by the clipped ratio, through which no gradient flows.
    The paper sets no lower bound, hence ``clip_low = 1``. Every token weighs alike (eq. 4), those
    of groups without a signal in the denominator.
    """

    class Settings(GRPO.Settings):
        name: str = "cispo"
        aggregation: Literal["token", "sequence", "fixed"] = "token"
        clip_low: float = Field(1.0, gt=0)
        clip_high: float = Field(1.0, gt=0)

    settings: Settings

    def policy_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor
    ) -> Tensor:
        from agent_r1.algorithms.losses import cispo_loss

        low, high = self.settings.clip_low, self.settings.clip_high
        return cispo_loss(logprobs, old_logprobs, advantages, clip_low=low, clip_high=high)
