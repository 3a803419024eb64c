"""Losses per token: pure functions on tensors, each with its formula and source. All tensors are
(T,): the action tokens of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Nats at which ratios stop growing: ``exp`` of more may overflow, and then even a ratio that is
clipped, or a token of weight 0, would make the gradient NaN.
"""


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """``exp(logp - logp_old)``, the difference bounded to +-``MAX_LOG_RATIO``."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clip_surrogate(
    ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``.

    PPO (arXiv 1707.06347, eq. 7), with the two bounds apart as in DAPO (arXiv 2503.14476, eq. 10).
    """
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """``clip_surrogate`` of the token's ratio ``r = exp(logp - logp_old)``."""
    ratio = importance_ratio(logprobs, old_logprobs)
    return clip_surrogate(ratio, advantages, clip_low=clip_low, clip_high=clip_high)


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, sequences: Tensor) -> Tensor:
    """``s_i = (pi(y_i) / pi_old(y_i))^(1/|y_i|)`` of the token's sequence (GSPO, arXiv 2507.18071,
    eq. 7), in the form of its eq. 14: the value is the sequence's, the gradient comes through the
    token, and weighed 1/|y_i| the tokens' gradients add up to that of ``s_i``.

    ``sequences``: (T,) integers, equal for the tokens of one sequence, which must be whole.
    """
    num = int(sequences.max()) + 1 if len(sequences) else 0
    difference = (logprobs - old_logprobs).detach()
    count = difference.new_zeros(num).index_add_(0, sequences, torch.ones_like(difference))
    total = difference.new_zeros(num).index_add_(0, sequences, difference)
    mean = (total / count.clamp(min=1.0)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)[sequences]
    return torch.exp(mean + logprobs - logprobs.detach())


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """``-sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp``: the weight is clipped, not the update,
    so that every token keeps its gradient (CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).
    """
    ratio = importance_ratio(logprobs.detach(), old_logprobs)
    return -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages * logprobs


def value_loss(
    values: Tensor, old_values: Tensor, targets: Tensor, *, clip: float | None
) -> Tensor:
    """``max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2``; without ``clip`` the
    first term alone (the clipped form of the PPO code base; "The 37 implementation details of PPO",
    detail 9).
    """
    loss = (values - targets) ** 2
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - targets) ** 2)
    return loss / 2


def truncated_importance(old_logprobs: Tensor, sampling_logprobs: Tensor, *, cap: float) -> Tensor:
    """``min(pi_old / pi_sampling, cap)``: what a token's loss weighs when it was sampled by another
    engine or an older policy than the one the update starts from (truncated importance sampling:
    Ionides 2008; for rollouts: Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy training").
    """
    return importance_ratio(old_logprobs, sampling_logprobs).clamp(max=cap)


def importance_in_band(
    old_logprobs: Tensor, sampling_logprobs: Tensor, *, low: float, high: float
) -> Tensor:
    """``r = pi_old / pi_sampling`` where ``low <= r <= high``, else 0: a token that the two
    policies see too differently is left out (IcePop: Ring-1T, arXiv 2510.18855).
    """
    ratio = importance_ratio(old_logprobs, sampling_logprobs)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def sequences_in_band(
    old_logprobs: Tensor, sampling_logprobs: Tensor, sequences: Tensor, *, low: float, high: float
) -> Tensor:
    """1 for the tokens of sequences with ``low <= s <= high``, else 0; ``s`` is the geometric mean
    of the sequence's ratios, which does not grow with its length: ``sequence_ratio`` of the policy
    that the update starts from over the one that sampled.
    """
    ratio = sequence_ratio(old_logprobs, sampling_logprobs, sequences)
    return ((ratio >= low) & (ratio <= high)).to(old_logprobs.dtype)
