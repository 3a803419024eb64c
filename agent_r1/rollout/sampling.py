"""Draws one token per row, each from its own uniform number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from agent_r1.errors import RunError
from agent_r1.rollout.engine import Sampling

BLOCK = 256
"""Tokens are drawn in two steps, a block and a token in it: one pass over the vocabulary, and sums
short enough for float64.
"""


NOT_FINITE = "the model's output is not finite: its weights are damaged, or learner.lr is too high"


def draw(
    logits: Tensor, uniforms: Sequence[float], samplings: Sequence[Sampling]
) -> tuple[list[int], list[float], list[float]]:
    """Token ids, their log-probabilities and the entropies of their distributions, one per row.

    Log-probability and entropy are those after temperature and before truncation by top-k and
    top-p, as the learner computes them.

    Args:
        logits: (B, V), overwritten.
        uniforms: B numbers in [0, 1).
        samplings: B; temperature 0 is greedy and counts as 1 in the log-probabilities.
    """
    device = logits.device
    logp = logits.float()
    if any(s.temperature not in (0.0, 1.0) for s in samplings):
        temperatures = [s.temperature or 1.0 for s in samplings]
        logp /= torch.tensor(temperatures, device=device)[:, None]
    total = logp.logsumexp(-1, keepdim=True)
    if not total.isfinite().all():
        raise RunError(NOT_FINITE)
    logp -= total
    p = logp.exp()
    entropies = -torch.linalg.vecdot(p, logp)
    if not entropies.isfinite().all():  # a logit of -inf: 0 log 0 is 0
        entropies = torch.special.entr(p).sum(-1)
    greedy = torch.tensor([s.temperature == 0.0 for s in samplings])
    if greedy.all():
        token_ids = logp.argmax(-1)
    else:
        for row, sampling in enumerate(samplings):
            if sampling.top_k or sampling.top_p < 1.0:
                p[row] = truncated(p[row], top_k=sampling.top_k, top_p=sampling.top_p)
        token_ids = _inverse_cdf(p, torch.tensor(uniforms, dtype=torch.float64, device=device))
        if greedy.any():
            token_ids = torch.where(greedy.to(device), logp.argmax(-1), token_ids)
    logprobs = logp.gather(1, token_ids[:, None]).squeeze(1)
    return token_ids.tolist(), logprobs.tolist(), entropies.tolist()


def draw_plain(logits: Tensor, uniforms: Tensor, temperatures: Tensor, greedy: Tensor) -> Tensor:
    """As ``draw``, without truncation and without asking the device for anything.

    Args:
        logits: (B, V).
        uniforms: (B,), float64. temperatures: (B,), 1 where ``greedy`` (B,) is true.

    Returns:
        (B, 4) float64: token id, log-probability, entropy, and the logits' normaliser, which is
        not finite if the model's output is not.
    """
    logp = logits.float() / temperatures[:, None]
    total = logp.logsumexp(-1, keepdim=True)
    logp = logp - total
    p = logp.exp()
    entropies = torch.special.entr(p).sum(-1)
    p = torch.where(total.isfinite(), p, 1.0)  # an index that is no number would end the process
    token_ids = torch.where(greedy, logp.argmax(-1), _inverse_cdf(p, uniforms))
    logprobs = logp.gather(1, token_ids[:, None]).squeeze(1)
    return torch.stack([x.double() for x in (token_ids, logprobs, entropies, total[:, 0])], 1)


def truncated(p: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Probabilities (V,) with all but the ``top_k`` largest (0: all) set to zero, then all beyond
    the smallest set that holds ``top_p`` of what is left. Not normalised.
    """
    ordered, order = p.sort(descending=True, stable=True)
    if top_k:
        ordered[top_k:] = 0.0
    before = ordered.double().cumsum(0) - ordered
    ordered[before >= top_p * ordered.sum()] = 0.0
    return torch.zeros_like(p).scatter_(0, order, ordered)


def _inverse_cdf(p: Tensor, uniforms: Tensor) -> Tensor:
    """The token (B,) at which the cumulated probabilities (B, V) pass the uniform number (B,)."""
    if padding := -p.shape[1] % BLOCK:
        p = torch.nn.functional.pad(p, (0, padding))
    blocks = p.view(len(p), -1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms[:, None] * sums[:, -1:]
    block = _last_below(sums, target)
    before = sums.gather(1, block) - blocks.gather(1, _wide(block)).sum(-1, dtype=torch.float64)
    inside = blocks.gather(1, _wide(block)).squeeze(1).double().cumsum(-1)
    return (block * BLOCK + _last_below(inside, target - before)).squeeze(1)


def _wide(block: Tensor) -> Tensor:
    return block[:, :, None].expand(-1, -1, BLOCK)


def _last_below(cumulated: Tensor, target: Tensor) -> Tensor:
    """The first index (B, 1) whose cumulated value exceeds the target; never one of probability
    zero.
    """
    index = torch.searchsorted(cumulated, target, right=True)
    last = torch.searchsorted(cumulated, cumulated[:, -1:].contiguous())
    return torch.minimum(index, last)


def stop_of(
    token_ids: Sequence[int], sampling: Sampling, tokenizer: Any
) -> Literal["stop", "length"] | None:
    """Why these tokens are a whole action, or ``None`` if more are to come."""
    if token_ids[-1] in sampling.stop_token_ids:
        return "stop"
    if sampling.stop_strings:
        longest = max(len(text.encode()) for text in sampling.stop_strings)
        tail = tokenizer.decode(token_ids[-longest - 4 :])  # a token has a byte at least
        if any(text in tail for text in sampling.stop_strings):
            return "stop"
    return "length" if len(token_ids) >= sampling.max_tokens else None
