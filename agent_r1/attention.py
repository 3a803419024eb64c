"""Attention along a tree of tokens: one function for the engine and the learner, exact.

Tokens of a tree lie in one sequence, depth first, so the descendants of a run of tokens are the
tokens right after it. Every token attends to its own run causally and to each run above it in
full. The parts are joined by their log-sum-exp, as in FlashAttention (arXiv 2205.14135, section
3.1); no T x T mask exists, no key is copied, and a shared run is read once for all who share it.

Shape letters: H query heads, K key-value heads, Q and N numbers of queries and keys, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "agent_r1_tree"
"""Under which transformers knows the function."""


@dataclass(slots=True, frozen=True)
class Span:
    """A run of tokens [start, end) without a branch inside; [end, last) are its descendants.

    ``position`` is that of its first token in its sequence.
    """

    start: int
    end: int
    last: int
    position: int


@dataclass(slots=True, frozen=True)
class Part:
    """Queries [q0, q1) against keys [k0, k1). ``first`` marks the part that holds a query's own
    key.

    ``mask`` is (q1 - q0, k1 - k0), True where visible; ``None`` is everything, or everything up to
    the query itself if ``causal``.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    first: bool = False
    causal: bool = False
    mask: Tensor | None = None


class Tree(Protocol):
    """What the model's forward pass gets as ``tree``: it knows which keys each query may see."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """(1, H, T, D), (1, K, T, D), (1, K, T, D) to (1, H, T, D)."""
        ...


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function, in the form that transformers calls."""
    assert attention_mask is None, "who sees whom follows from the tree"
    assert softcap is None, "refused when the model was loaded"
    out = tree.attend(
        module.layer_idx, query, key, value, scale=scaling, window=sliding_window or None
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, tree_attention)


class PackedTree:
    """The learner's tree: all tokens are new, gradients flow."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self._spans = spans
        self._device = device
        self._parts: dict[int | None, list[Part]] = {}

    def parts(self, window: int | None) -> list[Part]:
        """The same for all layers with the same window, so made once."""
        if window not in self._parts:
            self._parts[window] = tree_parts(self._spans, window, self._device)
        return self._parts[window]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        out: Tensor = _TreeAttention.apply(query, key, value, self.parts(window), scale)  # type: ignore[no-untyped-call]
        return out


def tree_parts(spans: Sequence[Span], window: int | None, device: torch.device) -> list[Part]:
    """Which products the attention of a tree consists of; the part with a query's own key comes
    first.

    Args:
        spans: Depth first.
        window: A query sees itself and the ``window - 1`` tokens before it; ``None``: all before.
        device: Of the masks, which only a window needs.
    """
    parts: list[Part] = []
    for span in spans:
        length = span.end - span.start
        if window is None or length <= window:
            parts.append(Part(span.start, span.end, span.start, span.end, True, causal=True))
        else:
            parts += _windowed(span, window, device)
    for index, span in enumerate(spans):
        if span.last == span.end:
            continue
        if window is None:
            parts.append(Part(span.end, span.last, span.start, span.end))
            continue
        for below in spans[index + 1 :]:
            if below.start >= span.last:
                break
            parts += _across(below, span, window, device)
    return parts


def _windowed(span: Span, window: int, device: torch.device) -> list[Part]:
    """A span against itself in blocks of queries, so that the cost is linear in its length."""
    parts = []
    for q0 in range(span.start, span.end, window):
        q1 = min(q0 + window, span.end)
        k0 = max(span.start, q0 - window + 1)
        mask = _within(range(q0, q1), range(k0, q1), window, device)
        parts.append(Part(q0, q1, k0, q1, True, mask=mask))
    return parts


def _across(below: Span, above: Span, window: int, device: torch.device) -> list[Part]:
    """The queries of one span against the keys of one above it, as far as the window reaches."""
    end = above.position + above.end - above.start
    num = min(below.end - below.start, end - 1 + window - below.position)
    if num <= 0:
        return []
    skip = max(0, below.position - window + 1 - above.position)
    queries = range(below.position, below.position + num)
    keys = range(above.position + skip, end)
    full = queries[-1] - keys[0] < window
    mask = None if full else _within(queries, keys, window, device)
    q0, k0 = below.start, above.start + skip
    return [Part(q0, q0 + num, k0, above.end, mask=mask)]


def _within(queries: range, keys: range, window: int, device: torch.device) -> Tensor:
    """(Q, N): whether the key is the query's own or one of the ``window - 1`` before."""
    q = torch.arange(queries.start, queries.stop, device=device)
    k = torch.arange(keys.start, keys.stop, device=device)
    distance = q[:, None] - k[None, :]
    return (distance >= 0) & (distance < window)


class _TreeAttention(torch.autograd.Function):
    """Runs the parts and joins them. Backward needs the joint result and log-sum-exp only, so each
    part of the gradient is exact by itself.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: list[Part], scale: float
    ) -> Tensor:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        for part in parts:
            queries, keys = slice(part.q0, part.q1), slice(part.k0, part.k1)
            piece, piece_lse = attend(
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                scale=scale,
                causal=part.causal,
                mask=part.mask,
            )
            if part.first:
                out[:, :, queries], lse[:, :, queries] = piece, piece_lse
            else:
                join(out[:, :, queries], lse[:, :, queries], piece, piece_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        (grad,) = grads
        d_query, d_key, d_value = (torch.zeros_like(x) for x in (query, key, value))
        for part in ctx.parts:
            queries, keys = slice(part.q0, part.q1), slice(part.k0, part.k1)
            pieces = attend_backward(
                grad[:, :, queries],
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                out[:, :, queries],
                lse[:, :, queries],
                scale=ctx.scale,
                causal=part.causal,
                mask=part.mask,
            )
            d_query[:, :, queries] += pieces[0]
            d_key[:, :, keys] += pieces[1]
            d_value[:, :, keys] += pieces[2]
        return d_query, d_key, d_value, None, None


def join(out: Tensor, lse: Tensor, piece: Tensor, piece_lse: Tensor) -> None:
    """Adds, in place, what more keys contribute. ``out`` (..., Q, D), ``lse`` (..., Q)."""
    total = torch.logaddexp(lse, piece_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1).to(out.dtype))
    out.addcmul_(piece, (piece_lse - total).exp_().unsqueeze(-1).to(out.dtype))
    lse.copy_(total)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of some queries to some keys, and the log-sum-exp of its scores.

    Args:
        query: (B, H, Q, D). key, value: (B, K, N, D), H a multiple of K.
        causal: Query i sees the keys up to i.
        mask: Boolean, broadcast to (B, 1, Q, N); every query must see a key.

    Returns:
        (B, H, Q, D) and float32 (B, H, Q).
    """
    batch, heads, num_queries, width = query.shape
    if not causal:  # heads that share keys become queries: (B, K, H / K * Q, D)
        query, mask = _fold(query, key), _fold_mask(mask, query, key)
    kernel = _cpu_kernel if query.device.type == "cpu" and _kernel_works() else _plain_kernel
    out, lse = kernel(query, key, value, scale, causal, mask)
    return out.reshape(batch, heads, num_queries, width), lse.reshape(batch, heads, num_queries)


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, as far as these keys contribute to ``out``."""
    shape = query.shape
    if not causal:
        mask = _fold_mask(mask, query, key)
        grad, query, out = (_fold(x, key) for x in (grad, query, out))
        lse = lse.reshape(query.shape[:3])
    on_cpu = query.device.type == "cpu" and _kernel_works()
    kernel = _cpu_kernel_backward if on_cpu else _plain_kernel_backward
    d_query, d_key, d_value = kernel(grad, query, key, value, out, lse, scale, causal, mask)
    return d_query.reshape(shape), d_key, d_value


def _fold(x: Tensor, key: Tensor) -> Tensor:
    batch, _, _, width = x.shape
    return x.reshape(batch, key.shape[1], -1, width)


def _fold_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    groups = query.shape[1] // key.shape[1]
    if mask is None or mask.shape[-2] == 1 or groups == 1:
        return mask
    return mask.repeat(*(1,) * (mask.dim() - 2), groups, 1)


def _cpu_kernel(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """PyTorch's own flash kernel, in the form that returns the log-sum-exp."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = op(query, key, value, 0.0, causal, attn_mask=_bias(mask, query), scale=scale)
    return out, lse


def _cpu_kernel_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    bias = _bias(mask, query)
    grads: tuple[Tensor, Tensor, Tensor] = op(
        grad, query, key, value, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )
    return grads


def _bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    bias.masked_fill_(~mask, float("-inf"))
    return bias if bias.dim() == 4 else bias[None, None]


@functools.cache
def _kernel_works() -> bool:
    """Whether this PyTorch's kernel does what we rely on; its interface is not a public one."""
    x = torch.linspace(-1.0, 1.0, 2 * 4 * 3 * 8).reshape(2, 4, 3, 8)
    arguments = (x, x[:, :2], x[:, 2:], 0.3, True, None)
    try:
        out, lse = _cpu_kernel(*arguments)
        grads = _cpu_kernel_backward(x, *arguments[:3], out, lse, *arguments[3:])
    except (AttributeError, RuntimeError, TypeError):
        return False
    plain, plain_lse = _plain_kernel(*arguments)
    plain_grads = _plain_kernel_backward(x, *arguments[:3], out, lse, *arguments[3:])
    ours, theirs = [out, lse, *grads], [plain, plain_lse, *plain_grads]
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def _scores(
    query: Tensor, key: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, int]:
    """float32 scores (B, H, Q, N) and how many query heads share a key head."""
    groups = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(groups, 1).transpose(2, 3)).float() * scale
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    if mask is not None:
        bias = _bias(mask, query)
        assert bias is not None
        scores = scores + bias
    return scores, groups


def _plain_kernel(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same by matrix products, for devices without that kernel."""
    scores, groups = _scores(query, key, scale, causal, mask)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().to(value.dtype)
    return weights @ value.repeat_interleave(groups, 1), lse


def _plain_kernel_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scores, groups = _scores(query, key, scale, causal, mask)
    weights = (scores - lse.unsqueeze(-1)).exp()
    grad = grad.float()
    d_weights = grad @ value.repeat_interleave(groups, 1).float().transpose(2, 3)
    delta = (grad * out.float()).sum(-1, keepdim=True)
    d_scores = weights * (d_weights - delta) * scale
    d_query = d_scores @ key.repeat_interleave(groups, 1).float()
    d_key = d_scores.transpose(2, 3) @ query.float()
    d_value = weights.transpose(2, 3) @ grad
    shape = (key.shape[0], key.shape[1], groups, *key.shape[2:])
    d_key, d_value = (x.reshape(shape).sum(2) for x in (d_key, d_value))
    return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype)
