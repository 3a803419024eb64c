"""One forward pass of the engine on a ``SlotCache``: each layer stores its new keys and values,
then every run of queries attends to the slots of its own path, whoever computed them, in few calls.

Shape letters: T tokens of the pass, B rows, Q and N queries and keys of a row, H query heads, K
key-value heads, D head width, S slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agent_r1.rollout.native.forward_pass import Run
from agent_r1.rollout.native.kv_cache import CachedSequence, Slots
from agent_r1.rollout.native.slot_cache import SlotCache, path_slots

MAX_QUERIES = 256
"""Queries of a row; longer runs are cut, which bounds the memory of a row's mask."""
MAX_SCORES = 2**25
"""Queries times keys of the rows that are run at once, for each head."""


@dataclass(slots=True, frozen=True)
class _Row:
    """Tokens [start, end) of the pass at positions from ``position`` on, and all they may see."""

    start: int
    end: int
    position: int
    slots: Slots


@dataclass(slots=True, frozen=True)
class _Rows:
    """Rows with about the same number of queries, filled up to the longest with its first token.

    Attributes:
        tokens: (B, Q), of the pass. positions: (B, Q).
        table: (B, N), the slot of each row's key at position 0, 1, ...; 0 beyond the last.
    """

    tokens: Tensor
    positions: Tensor
    table: Tensor


def _alike(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows of similar numbers of queries, together as far as their scores stay few."""

    def width(row: _Row) -> int:
        """Queries, rounded up to a power of two."""
        return 1 << (row.end - row.start - 1).bit_length()

    ordered = sorted(rows, key=lambda row: (width(row), len(row.slots)))
    for queries, members in itertools.groupby(ordered, key=width):
        some: list[_Row] = []
        for row in members:
            if some and (len(some) + 1) * queries * len(row.slots) > MAX_SCORES:
                yield some
                some = []
            some.append(row)
        yield some


class SlotPass:
    """Lays out a pass and serves as its ``Tree``; arguments as of ``ForwardPass``."""

    def __init__(
        self, cache: SlotCache, sampling: Sequence[tuple[CachedSequence, int]], runs: Sequence[Run]
    ) -> None:
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.last: dict[CachedSequence, int] = {}
        self._storage = cache.storage
        self._sampling = sampling
        self._runs: list[Run] = []
        self._source: list[int] = []
        self._slots: list[Slots] = []
        rows = [self._lay(sequence, token_id) for sequence, token_id in sampling]
        for run in runs:
            rows += self._lay_run(run)
        device = self._storage.device
        if rows:
            self._into = torch.tensor(np.concatenate(self._slots), device=device)
            self._from = torch.tensor(self._source, device=device)
        self._rows = [self._filled(some) for some in _alike(rows)]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def commit(self) -> None:
        """Adds the new tokens, now computed, to their sequences."""
        for sequence, token_id in self._sampling:
            sequence.token_ids.append(token_id)
        for run in self._runs:
            if run.prefix is None:
                for sequence in run.sequences:
                    sequence.token_ids += run.token_ids

    def _lay(self, sequence: CachedSequence, token_id: int) -> _Row:
        index, own = len(self.token_ids), len(sequence.token_ids)
        self.token_ids.append(token_id)
        self.positions.append(sequence.end)
        self.last[sequence] = index
        self._store([index], sequence.slots[own : own + 1])
        return _Row(index, index + 1, sequence.end, path_slots(sequence)[: sequence.end + 1])

    def _lay_run(self, run: Run) -> list[_Row]:
        start = len(self.token_ids)
        end = start + len(run.token_ids)
        after = run.position + len(run.token_ids)
        self.token_ids += run.token_ids
        self.positions += range(run.position, after)
        self._runs.append(run)
        for sequence in run.sequences:
            self.last[sequence] = end - 1
        if run.prefix is not None:
            self._store(range(start, end), run.prefix.slots)
        else:
            for sequence in run.sequences:
                own = slice(run.position - sequence.base, after - sequence.base)
                self._store(range(start, end), sequence.slots[own])
        path = path_slots(run.prefix or run.sequences[0])
        rows = []
        for first in range(start, end, MAX_QUERIES):
            stop = min(first + MAX_QUERIES, end)
            at = run.position + first - start
            rows.append(_Row(first, stop, at, path[: at + stop - first]))
        for child in run.below:
            rows += self._lay_run(child)
        return rows

    def _store(self, tokens: Sequence[int], slots: Slots) -> None:
        self._source += tokens
        self._slots.append(slots)

    def _filled(self, rows: Sequence[_Row]) -> _Rows:
        num_queries = max(row.end - row.start for row in rows)
        num_keys = max(len(row.slots) for row in rows)
        tokens, positions = np.empty((2, len(rows), num_queries), np.int64)
        table = np.zeros((len(rows), num_keys), np.int64)
        for number, row in enumerate(rows):
            size = row.end - row.start
            tokens[number, :size] = np.arange(row.start, row.end)
            tokens[number, size:] = row.start
            positions[number] = tokens[number] - row.start + row.position
            table[number, : len(row.slots)] = row.slots
        device = self._storage.device
        return _Rows(*(torch.tensor(x, device=device) for x in (tokens, positions, table)))

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
        kv = self._storage[layer]
        kv[0, self._into] = key[0].transpose(0, 1)[self._from]
        kv[1, self._into] = value[0].transpose(0, 1)[self._from]
        out = torch.empty_like(query)
        for rows in self._rows:
            found = attend_rows(
                kv, query[0, :, rows.tokens], rows.positions, rows.table, scale, window
            )
            out[0, :, rows.tokens] = found  # a token that fills up is written the same again
        return out


def attend_rows(
    kv: Tensor,
    query: Tensor,
    positions: Tensor,
    table: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of each row's queries to the keys in its slots, up to each query's own position.

    Args:
        kv: (2, S, K, D), of a layer. query: (H, B, Q, D).
        positions: (B, Q). table: (B, N).
        window: A query sees itself and the ``window - 1`` tokens before it; ``None``: all before.

    Returns:
        (H, B, Q, D).
    """
    heads, num_rows, num_queries, width = query.shape
    key, value = (
        x.index_select(0, table.flatten()).view(*table.shape, -1, width).transpose(1, 2) for x in kv
    )
    distance = positions[:, :, None] - torch.arange(table.shape[1], device=table.device)
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    # Heads that share keys become queries: (B, K, H / K * Q, D).
    groups = heads // key.shape[1]
    mask = visible[:, None, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
    folded = query.transpose(0, 1).reshape(num_rows, key.shape[1], -1, width)
    out = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=mask, scale=scale
    )
    return out.reshape(num_rows, heads, num_queries, width).transpose(0, 1)
