"""The learner's attention along a tree of tokens as one kernel call a layer: FlexAttention
(arXiv 2412.05496) with a mask of blocks. For CUDA: on a CPU its backward pass does not exist.

Tokens lie depth first, so a query sees a key that lies before it and whose run's last descendant
lies after it. That is one comparison, and whole blocks that hold no such pair are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from agent_r1.model.tree_attention import Span

BLOCK = 128
"""Queries and keys of a block of the mask."""
MIN_WIDTH = 16
"""The kernel has no narrower heads."""
MOST_COMPILED = 64
"""Lengths and windows that are compiled in one process; PyTorch's own limit is 8."""


class FlexTree:
    """As ``PackedTree``: all tokens are new, gradients flow.

    The kernel is compiled for each length, so lengths are rounded up to one of a few. The tokens
    added see nothing but themselves, and nobody sees them.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        num_tokens = max(span.last for span in spans)
        self.length = padded_length(num_tokens)
        last = torch.arange(1, self.length + 1)
        position = torch.zeros(self.length, dtype=torch.long)
        for span in spans:
            last[span.start : span.end] = span.last
            position[span.start : span.end] = torch.arange(span.end - span.start) + span.position
        self._last, self._position = last.to(device), position.to(device)
        self._masks: dict[int | None, BlockMask] = {}

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
        num_tokens, width = query.shape[2:]
        widen = (0, max(0, MIN_WIDTH - width), 0, self.length - num_tokens)
        query, key, value = (torch.nn.functional.pad(x, widen) for x in (query, key, value))
        out: Tensor = _compiled()(
            query, key, value, block_mask=self.mask(window), scale=scale, enable_gqa=True
        )
        return out[:, :, :num_tokens, :width]

    def mask(self, window: int | None) -> BlockMask:
        """The mask for a window, made once for all layers that share it."""
        if window not in self._masks:
            self._masks[window] = _block_mask(self._last, self._position, window)
        return self._masks[window]


def padded_length(num_tokens: int) -> int:
    """The next of four lengths per power of two; a multiple of a block."""
    step = max(BLOCK, (1 << max(num_tokens - 1, 1).bit_length()) // 8)
    return -(-num_tokens // step) * step


@functools.cache
def _compiled() -> Any:
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_COMPILED)
    # Beyond the limit a full graph raises; without, all scores would be computed.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _block_mask(last: Tensor, position: Tensor, window: int | None) -> BlockMask:
    """Which blocks of keys a block of queries sees in part, and which in full, from the bounds of
    each block alone: no T x T mask exists.
    """
    lasts, positions = last.view(-1, BLOCK), position.view(-1, BLOCK)
    number = torch.arange(len(lasts), device=last.device)
    query, key = number[:, None], number[None, :]
    first, after = query * BLOCK, (query + 1) * BLOCK
    seen = (key <= query) & (lasts.amax(1)[None, :] > first)
    full = (key < query) & (lasts.amin(1)[None, :] >= after)
    if window is not None:
        least, most = positions.amin(1), positions.amax(1)
        seen &= least[:, None] - most[None, :] < window
        full &= most[:, None] - least[None, :] < window
    full &= seen
    partly, wholly = _listed(seen & ~full), _listed(full)
    return BlockMask.from_kv_blocks(
        *partly, *wholly, BLOCK_SIZE=BLOCK, mask_mod=_sees(last, position, window)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, N) numbers of marked blocks of each row, (1, 1, N, N) their indices first."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return blocks.sum(1).int()[None, None], order[None, None].contiguous()


def _sees(
    last: Tensor, position: Tensor, window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < last[key])

    if window is None:
        return sees
    width = window

    def sees_within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = position[query] - position[key] < width
        return (key <= query) & (query < last[key]) & near

    return sees_within
