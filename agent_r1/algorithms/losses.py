"""Losses per token: pure functions on tensors, each with its formula and source. All tensors are
(T,).
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_policy_loss(
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with ``r = exp(logp - logp_sampling)``.

    PPO (arXiv 1707.06347, eq. 7), with the two bounds apart as in DAPO (arXiv 2503.14476, eq. 10).
    """
    ratio = torch.exp(logprobs - sampling_logprobs)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``exp(d) - d - 1`` with ``d = logp_ref - logp``: an estimate of KL(policy || reference),
    never negative.

    Schulman, "Approximating KL divergence" (2020); the KL term of GRPO (arXiv 2402.03300, eq. 4).
    """
    difference = reference_logprobs - logprobs
    return torch.exp(difference) - difference - 1.0
