"""Log-probabilities and entropies of chosen tokens, without all logits in memory at once.

Shape letters: A chosen tokens, C those of a chunk, W hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**27}
"""Bytes of float32 logits per chunk: on a CPU what its cache holds; on a GPU more, since each chunk
reads the whole output layer from memory.
"""
KEPT_BYTES = 2**30
"""Bytes of chunks kept for the backward pass; chunks beyond are computed again."""


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of its distribution, in nats.

    Args:
        logits: (..., V), those that predict ``token_ids``.
        token_ids: (...).
        temperature: Logits are divided by it, as in sampling; 0 (greedy) counts as 1.

    Returns:
        Log-probabilities and entropies, each (...), float32.
    """
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropy


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """``token_logprobs(hidden @ weight.T + bias, ...)`` in chunks, with gradients of both results.

    Args:
        hidden: (A, W), of the positions that predict ``token_ids``.
        weight: (V, W), and ``bias``: (V,) or ``None``; the model's output layer.
        token_ids: (A,).
        temperature: As in ``token_logprobs``.

    Returns:
        Log-probabilities and entropies, each (A,), float32.
    """
    result: tuple[Tensor, Tensor] = _HeadLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, token_ids, temperature or 1.0, torch.is_grad_enabled()
    )
    return result


class _HeadLogprobs(torch.autograd.Function):
    """With p = softmax(z): d logp(t) / dz = onehot(t) - p, and d entropy / dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        size = max(1, CHUNK_BYTES[weight.device.type] // (4 * weight.shape[0]))
        num_kept = KEPT_BYTES // (4 * weight.shape[0]) if keep else 0
        logprobs, entropies, kept = [], [], []
        for start in range(0, len(hidden), size):
            logp = _logp(hidden[start : start + size], weight, bias, temperature)
            chosen = token_ids[start : start + size, None]
            logprobs.append(logp.gather(1, chosen).squeeze(1))
            entropies.append(-torch.linalg.vecdot(logp.exp(), logp))
            if start + len(logp) <= num_kept:
                kept.append(logp)
        ctx.kept, ctx.size, ctx.temperature = kept, size, temperature
        both = torch.cat(logprobs), torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, bias, token_ids, both[1])
        ctx.set_materialize_grads(False)
        return both

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, token_ids, entropies = ctx.saved_tensors
        d_logprobs, d_entropies = grads
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if for_bias else None
        for start in range(0, len(hidden), ctx.size):
            rows = slice(start, start + ctx.size)
            d_logits = _d_logits(
                ctx.kept.pop(0) if ctx.kept else _logp(hidden[rows], weight, bias, ctx.temperature),
                token_ids[rows],
                None if d_logprobs is None else d_logprobs[rows],
                None if d_entropies is None else d_entropies[rows],
                entropies[rows],
            ).div_(ctx.temperature)
            if d_weight is not None and weight.device.type == "cpu":
                d_weight.addmm_(d_logits.t(), hidden[rows].float())
            elif d_weight is not None:  # summed in float32, multiplied in the model's own type
                d_weight += d_logits.to(weight.dtype).t() @ hidden[rows]
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            if d_hidden is not None:
                d_hidden[rows] = d_logits.to(weight.dtype) @ weight
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logp(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if temperature != 1.0:
        logits /= temperature
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _d_logits(
    logp: Tensor,
    token_ids: Tensor,
    d_logprobs: Tensor | None,
    d_entropies: Tensor | None,
    entropies: Tensor,
) -> Tensor:
    """Gradient (C, V) of the logits; overwrites ``logp``."""
    if d_logprobs is None:
        d_logprobs = torch.zeros_like(entropies)
    if d_entropies is None:
        grad = logp.exp_().mul_(-d_logprobs[:, None])
    else:
        p = logp.exp()
        grad = logp.add_(entropies[:, None]).mul_(-d_entropies[:, None])
        grad.sub_(d_logprobs[:, None]).mul_(p)
    return grad.scatter_add_(1, token_ids[:, None], d_logprobs[:, None])
