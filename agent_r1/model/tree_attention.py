"""Attention along a tree of tokens: one function for the engine and the learner, exact.

Tokens of a tree lie in one sequence, depth first, so the descendants of a run of tokens are the
tokens right after it. Every token attends to its own run causally and to each run above it in
full. The parts are joined by their log-sum-exp, as in FlashAttention (arXiv 2205.14135, section
3.1); no T x T mask exists, no key is copied, and a shared run is read once for all who share it.

Shape letters: H query heads, K key-value heads, Q and N numbers of queries and keys, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from agent_r1.model.attention_kernels import attend, attend_backward, join

NAME = "agent_r1_tree"
"""Name of the function in transformers."""


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
    """The ``tree`` argument of the model's forward pass: knows which keys each query may see."""

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
        """The parts for a window, made once for all layers that share it."""
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
    """The parts that a tree's attention consists of; the part with a query's own key comes
    first.

    Args:
        spans: Depth first.
        window: A query sees itself and the ``window - 1`` tokens before it; ``None``: all before.
        device: Device of the masks, which only a window needs.
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


def attend_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Sequence[Part],
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Writes the joint result of the parts to ``out`` (1, H, T, D) and ``lse`` (1, H, T)."""
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
        attend_parts(query, key, value, parts, scale, out, lse)
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
