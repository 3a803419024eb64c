"""Attention of some queries to some keys with the log-sum-exp of its scores, so that results for
several sets of keys can be joined, forward and backward.

Shape letters: B batch, H query heads, K key-value heads, Q and N numbers of queries and keys, D
head width.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

QUERIES = 512
"""Queries that the plain kernel handles at once, which bounds its memory."""
MIN_PIECE = 64
"""Fewer queries are not worth a thread of their own."""


def join(out: Tensor, lse: Tensor, piece: Tensor, piece_lse: Tensor) -> None:
    """Adds, in place, the contribution of further keys. ``out`` (..., Q, D), ``lse`` (..., Q)."""
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
    if (num := _pieces(query, causal, mask)) > 1:
        pieces = _cut(query, num)
        out, lse = op(pieces, *_for_each(num, key, value), 0.0, False, scale=scale)
        size = query.shape[2]
        return _uncut(out, size), _uncut(lse.unsqueeze(-1), size).squeeze(-1)
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
    if (num := _pieces(query, causal, mask)) > 1:
        grad, pieces, out = (_cut(x, num) for x in (grad, query, out))
        lse = _cut(lse.unsqueeze(-1), num).squeeze(-1)
        key, value = _for_each(num, key, value)
        d_query, d_key, d_value = op(grad, pieces, key, value, out, lse, 0.0, False, scale=scale)
        return _uncut(d_query, query.shape[2]), d_key.sum(0, True), d_value.sum(0, True)
    bias = _bias(mask, query)
    grads: tuple[Tensor, Tensor, Tensor] = op(
        grad, query, key, value, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )
    return grads


def _pieces(query: Tensor, causal: bool, mask: Tensor | None) -> int:
    """In how many pieces the queries of each head go to the kernel, which gives whole heads of a
    batch to its threads: three heads would keep two threads busy for as long as four do.
    """
    batch, heads, num_queries, _ = query.shape
    threads = torch.get_num_threads()
    num = threads // math.gcd(heads, threads)
    if batch > 1 or causal or mask is not None or num_queries < num * MIN_PIECE:
        return 1
    return num


def _cut(x: Tensor, num: int) -> Tensor:
    """(1, K, Q, ...) to (num, K, Q / num, ...), zeros where Q is no multiple."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % num))
    pieces: Tensor = x[0].unflatten(1, (num, -1)).transpose(0, 1)
    return pieces.contiguous()


def _uncut(x: Tensor, size: int) -> Tensor:
    """The reverse of ``_cut``, for ``size`` queries."""
    return x.transpose(0, 1).flatten(1, 2)[None, :, :size]


def _for_each(num: int, *tensors: Tensor) -> list[Tensor]:
    return [x.expand(num, -1, -1, -1) for x in tensors]


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
    query: Tensor, key: Tensor, scale: float, causal: bool, mask: Tensor | None, start: int
) -> Tensor:
    """float32 scores (B, H, Q, N) of the queries from ``start`` on; key (B, H, N, D)."""
    scores = (query.float() * scale) @ key.float().transpose(2, 3)
    rows = torch.arange(start, start + query.shape[2], device=query.device)
    if causal:
        columns = torch.arange(key.shape[2], device=query.device)
        scores.masked_fill_(columns > rows[:, None], float("-inf"))
    if mask is not None:
        bias = _bias(mask, scores)
        assert bias is not None
        scores += bias if bias.shape[-2] == 1 else bias[..., rows, :]
    return scores


def _plain_kernel(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As ``_cpu_kernel`` by matrix products, for other devices; ``QUERIES`` at a time."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    for start in range(0, query.shape[2], QUERIES):
        some = slice(start, start + QUERIES)
        scores = _scores(query[:, :, some], key, scale, causal, mask, start)
        lse[:, :, some] = scores.logsumexp(-1)
        weights = (scores - lse[:, :, some, None]).exp()
        out[:, :, some] = weights.to(value.dtype) @ value
    return out, lse


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
    groups = query.shape[1] // key.shape[1]
    wide_key, wide_value = (x.repeat_interleave(groups, 1).float() for x in (key, value))
    d_query = torch.empty_like(query)
    d_key, d_value = torch.zeros_like(wide_key), torch.zeros_like(wide_value)
    for start in range(0, query.shape[2], QUERIES):
        some = slice(start, start + QUERIES)
        scores = _scores(query[:, :, some], wide_key, scale, causal, mask, start)
        weights = (scores - lse[:, :, some, None]).exp()
        part = grad[:, :, some].float()
        delta = (part * out[:, :, some].float()).sum(-1, keepdim=True)
        d_scores = weights * (part @ wide_value.transpose(2, 3) - delta) * scale
        d_query[:, :, some] = (d_scores @ wide_key).to(query.dtype)
        d_key += d_scores.transpose(2, 3) @ query[:, :, some].float()
        d_value += weights.transpose(2, 3) @ part
    shape = (key.shape[0], key.shape[1], groups, *key.shape[2:])
    d_key, d_value = (x.reshape(shape).sum(2).to(key.dtype) for x in (d_key, d_value))
    return d_query, d_key, d_value
