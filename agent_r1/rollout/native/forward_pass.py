"""One forward pass of the engine: one new token of each session that is sampling, and all new
tokens of those that have just asked.

Order of the tokens: one per sampling session, block by block; then the runs of new tokens, as a
tree, since sessions share their common prefixes.

Shape letters: T tokens of the pass, R sequences of a block, N keys, H query heads, K key-value
heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from agent_r1.model.attention_kernels import attend, join
from agent_r1.model.tree_attention import Part, Span, attend_parts, tree_parts
from agent_r1.rollout.native.kv_cache import Block, CachedSequence, KVCache, SharedPrefix


@dataclass(eq=False)
class Run:
    """New tokens that have not been computed, and the runs below that continue them.

    Attributes:
        sequences: Sequences with these tokens.
        prefix: Holds the tokens if shared; else every sequence gets a copy.
    """

    token_ids: Sequence[int]
    sequences: list[CachedSequence]
    above: SharedPrefix | None
    position: int
    prefix: SharedPrefix | None = None
    below: list[Run] = field(default_factory=list)


@dataclass
class _Slice:
    """The sampling sequences of a block: tokens [start, end) of the pass, and where they lie in the
    block.
    """

    block: Block
    start: int
    end: int
    index: Tensor
    """Place of each token's sequence in the block."""
    place: Tensor
    """Place of each token's key in its sequence."""
    length: Tensor
    """(R,) keys of each sequence of the block, the new one included."""
    base: Tensor
    """(R,) position of each sequence's first key."""
    whole: bool
    """Whether token i is sequence i."""
    bias: dict[int | None, Tensor] = field(default_factory=dict)


class ForwardPass:
    """Lays out a pass and serves as its ``Tree``.

    Args:
        cache: Keys and values, old and new.
        sampling: Sequences that get one token each, with the token.
        runs: The trees of new tokens.
    """

    def __init__(
        self, cache: KVCache, sampling: Sequence[tuple[CachedSequence, int]], runs: Sequence[Run]
    ) -> None:
        self.device = cache.like.device
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.last: dict[CachedSequence, int] = {}
        """Index of each sequence's last token: where its next one is predicted."""
        self._slices = list(self._lay_sampling(sampling))
        self._spans: list[Span] = []
        self._runs: list[tuple[Run, int, int]] = []
        self._under: dict[SharedPrefix, list[int]] = {}
        for sequence, index in self.last.items():
            self._note_above(sequence.prefix, range(index, index + 1))
        for run in runs:
            self._lay_run(run)
        self._new = {run.prefix for run, _, _ in self._runs}
        self._parts: dict[int | None, list[Part]] = {}
        self._seen: dict[
            int | None, list[tuple[SharedPrefix | CachedSequence, slice | Tensor, Tensor | None]]
        ] = {}

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def commit(self) -> None:
        """Adds the new tokens, now computed, to their sequences."""
        for piece in self._slices:
            for token, index in enumerate(piece.index.tolist(), piece.start):
                piece.block.sequences[index].token_ids.append(self.token_ids[token])
        for run, _, _ in self._runs:
            if run.prefix is None:
                for sequence in run.sequences:
                    sequence.token_ids += run.token_ids

    # Layout ------------------------------------------------------------------------------------

    def _lay_sampling(self, sampling: Sequence[tuple[CachedSequence, int]]) -> Iterator[_Slice]:
        by_block: dict[int, list[tuple[CachedSequence, int]]] = {}
        for sequence, token_id in sampling:
            assert sequence.block is not None
            by_block.setdefault(sequence.block.capacity, []).append((sequence, token_id))
        for _, pairs in sorted(by_block.items()):
            pairs.sort(key=lambda pair: pair[0].index)
            block = pairs[0][0].block
            assert block is not None
            start = len(self.token_ids)
            for sequence, token_id in pairs:
                self.last[sequence] = len(self.token_ids)
                self.token_ids.append(token_id)
                self.positions.append(sequence.end)
            yield _Slice(
                block,
                start,
                len(self.token_ids),
                torch.tensor([sequence.index for sequence, _ in pairs], device=self.device),
                torch.tensor(
                    [len(sequence.token_ids) for sequence, _ in pairs], device=self.device
                ),
                torch.tensor(
                    [len(sequence.token_ids) + 1 for sequence in block.sequences],
                    device=self.device,
                ),
                torch.tensor([sequence.base for sequence in block.sequences], device=self.device),
                whole=len(pairs) == len(block.sequences),
            )

    def _lay_run(self, run: Run) -> None:
        """Adds a run and those below it."""
        start, slot = len(self.token_ids), len(self._spans)
        end = start + len(run.token_ids)
        self.token_ids += run.token_ids
        self.positions += range(run.position, run.position + len(run.token_ids))
        self._note_above(run.above, range(start, end))
        self._runs.append((run, start, end))
        self._spans.append(Span(start, end, end, run.position))
        for sequence in run.sequences:
            self.last[sequence] = end - 1
        for child in run.below:
            self._lay_run(child)
        self._spans[slot] = Span(start, end, len(self.token_ids), run.position)

    def _note_above(self, prefix: SharedPrefix | None, tokens: range) -> None:
        for node in prefix.path() if prefix else ():
            self._under.setdefault(node, []).extend(tokens)

    # Attention ---------------------------------------------------------------------------------

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
        sampled = self._sampled(layer, query, key, value, scale=scale, window=window)
        if len(self._slices) == 1 and not self._runs:
            ((_, out, lse),) = sampled
        else:
            out = torch.empty_like(query)
            lse = query.new_empty(query.shape[:3], dtype=torch.float32)
            for tokens, part, part_lse in sampled:
                out[:, :, tokens], lse[:, :, tokens] = part, part_lse
        if window not in self._parts:
            self._parts[window] = tree_parts(self._spans, window, self.device)
        attend_parts(query, key, value, self._parts[window], scale, out, lse)
        for holder, some, mask in self._pasts(window):
            past = holder.kv[layer]
            keys_values = past[None, 0], past[None, 1]
            found, found_lse = attend(query[:, :, some], *keys_values, scale=scale, mask=mask)
            whole, whole_lse = out[:, :, some], lse[:, :, some]
            join(whole, whole_lse, found, found_lse)
            if not isinstance(some, slice):  # then they are copies
                out[:, :, some], lse[:, :, some] = whole, whole_lse
        self._store(layer, key, value)
        return out

    def _sampled(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Tokens of sampling sequences, what they get (1, H, B, D), and (1, H, B)."""
        for piece in self._slices:
            tokens = slice(piece.start, piece.end)
            both = [x[0, :, tokens].transpose(0, 1) for x in (query, key, value)]
            part, part_lse = self._sample(piece, layer, *both, **options)
            yield tokens, part.transpose(0, 1)[None], part_lse.t()[None]

    def _sample(
        self,
        piece: _Slice,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """One query per sequence against all its keys: (B, H, D) to (B, H, D) and (B, H)."""
        kv = piece.block.kv[layer]
        if window not in piece.bias:
            piece.bias[window] = self._row_bias(piece, query, window)
        bias = piece.bias[window]
        num_rows, longest = bias.shape[0], bias.shape[-1]
        kv[:, piece.index, :, piece.place] = torch.stack((key, value), 1)
        if not piece.whole:
            spread = query.new_zeros(num_rows, *query.shape[1:])
            spread[piece.index] = query
            query = spread
        out, lse = attend(
            query.unsqueeze(2),
            kv[0, :num_rows, :, :longest],
            kv[1, :num_rows, :, :longest],
            scale=scale,
            mask=bias,
        )
        out, lse = out.squeeze(2), lse.squeeze(2)
        return (out, lse) if piece.whole else (out[piece.index], lse[piece.index])

    def _row_bias(self, piece: _Slice, like: Tensor, window: int | None) -> Tensor:
        """(R, 1, 1, N): 0 where a sequence's new token may look, else minus infinity."""
        length = piece.length[:, None]
        keys = torch.arange(int(piece.length.max()), device=self.device)[None]
        visible = keys < length
        if window is not None:
            visible &= keys >= length - window
        bias = torch.zeros(visible.shape, dtype=like.dtype, device=self.device)
        return bias.masked_fill_(~visible, float("-inf"))[:, None, None]

    def _pasts(
        self, window: int | None
    ) -> list[tuple[SharedPrefix | CachedSequence, slice | Tensor, Tensor | None]]:
        """Holders of earlier keys, except sequences being sampled; the tokens that attend to them,
        and the mask where a window cuts keys off.
        """
        if window not in self._seen:
            pasts: list[tuple[SharedPrefix | CachedSequence, list[int]]] = [
                (run.sequences[0], list(range(start, end)))  # mostly a turn's observation
                for run, start, end in self._runs
                if len(run.sequences) == 1 and run.prefix is None and run.sequences[0].token_ids
            ]
            # A prefix of this very pass is part of its tree.
            pasts += [(t, tokens) for t, tokens in self._under.items() if t not in self._new]
            seen = [(holder, *self._reach(holder, tokens, window)) for holder, tokens in pasts]
            self._seen[window] = [(h, some, mask) for h, some, mask in seen if some is not None]
        return self._seen[window]

    def _reach(
        self, holder: SharedPrefix | CachedSequence, tokens: list[int], window: int | None
    ) -> tuple[slice | Tensor | None, Tensor | None]:
        """The tokens whose window reaches the keys of a prefix or sequence, if any."""
        start = holder.start if isinstance(holder, SharedPrefix) else holder.base
        end = start + len(holder.token_ids)
        mask = None
        if window is not None:
            tokens = [i for i in tokens if self.positions[i] - window < end - 1]
            at = [self.positions[i] for i in tokens]
            if at and max(at) - window >= start:
                keys = torch.arange(start, end, device=self.device)
                mask = torch.tensor(at, device=self.device)[:, None] - keys[None] < window
        if not tokens:
            return None, None
        if tokens[-1] - tokens[0] + 1 == len(tokens):
            return slice(tokens[0], tokens[-1] + 1), mask
        return torch.tensor(tokens, device=self.device), mask

    def _store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keys and values of the runs go to their prefix or to every sequence that has them."""
        for run, start, end in self._runs:
            if run.prefix is not None:
                kv = run.prefix.kv[layer]
                kv[0], kv[1] = key[0, :, start:end], value[0, :, start:end]
                continue
            for sequence in run.sequences:
                assert sequence.block is not None
                first = run.position - sequence.base
                kv = sequence.block.kv[layer, :, sequence.index, :, first : first + end - start]
                kv[0], kv[1] = key[0, :, start:end], value[0, :, start:end]
