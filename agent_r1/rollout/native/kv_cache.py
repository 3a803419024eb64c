"""Keys and values along the tree of tokens, kept so that nothing is computed twice.

A *shared prefix* is a run of tokens that several sessions share, held once. A *cached sequence* is
one session's tokens beyond its prefix. Sequences being sampled lie in *blocks*, one tensor for
sequences of similar length, so that one call serves them all. While a session waits for its tools,
its sequence is parked: copied out of the block at its own length.

Shape letters: L layers, R sequences, K key-value heads, N tokens, D head width; 2 is keys and
values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from agent_r1.tree import common_prefix

MIN_PREFIX = 64
"""Shorter shared runs are computed once but stored with every sequence: fewer calls per token."""
MIN_BLOCK = 128
Slots = np.ndarray[Any, np.dtype[np.int64]]
NO_SLOTS: Slots = np.empty(0, np.int64)


@dataclass(eq=False)
class SharedPrefix:
    """A shared run of tokens. ``kv`` is (L, 2, K, N, D), filled layer by layer; with a
    ``SlotCache`` it is empty and ``slots`` (N,) says where they are.
    """

    parent: SharedPrefix | None
    token_ids: tuple[int, ...]
    kv: Tensor
    slots: Slots = field(default_factory=lambda: NO_SLOTS)
    users: int = 0
    """Sequences and prefixes right below."""
    last_used: int = 0

    @property
    def start(self) -> int:
        """Position of its first token."""
        return self.parent.end if self.parent else 0

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    def path(self) -> Iterator[SharedPrefix]:
        """From here up to the root."""
        node: SharedPrefix | None = self
        while node is not None:
            yield node
            node = node.parent


@dataclass(eq=False)
class CachedSequence:
    """The tokens of one session beyond its prefix that have been computed."""

    prefix: SharedPrefix | None
    token_ids: list[int] = field(default_factory=list)
    block: Block | None = None
    index: int = 0
    parked: Tensor | None = None
    """(L, 2, K, N, D) while the sequence is in no block."""
    slots: Slots = field(default_factory=lambda: NO_SLOTS)
    """With a ``SlotCache``: its tokens' places, and places for tokens to come."""

    @property
    def base(self) -> int:
        """Position of its first token."""
        return self.prefix.end if self.prefix else 0

    @property
    def end(self) -> int:
        return self.base + len(self.token_ids)

    @property
    def kv(self) -> Tensor:
        """(L, 2, K, N, D)."""
        if self.block is None:
            assert self.parked is not None
            return self.parked[:, :, :, : len(self.token_ids)]
        return self.block.kv[:, :, self.index, :, : len(self.token_ids)]

    def history(self) -> Iterator[int]:
        """All its tokens, the prefix's first."""
        for prefix in reversed([*self.prefix.path()] if self.prefix else []):
            yield from prefix.token_ids
        yield from self.token_ids

    @property
    def capacity(self) -> int:
        """Tokens that memory is allocated for."""
        return self.block.capacity if self.block else max(len(self.slots), len(self.token_ids))


class Block:
    """Sequences of at most ``capacity`` tokens; ``kv`` is (L, 2, R, K, capacity, D), its first
    ``len(sequences)`` places in use.
    """

    def __init__(self, capacity: int, shape: tuple[int, int, int], like: Tensor) -> None:
        layers, heads, width = shape
        self.capacity = capacity
        self.sequences: list[CachedSequence] = []
        self.kv = like.new_zeros(layers, 2, 0, heads, capacity, width)

    def add(self, sequence: CachedSequence) -> None:
        """Takes in a sequence that is in no block."""
        if len(self.sequences) == self.kv.shape[2]:
            shape = list(self.kv.shape)
            shape[2] = max(8, 2 * len(self.sequences))
            larger = self.kv.new_zeros(shape)  # pages that are not written take no memory yet
            larger[:, :, : len(self.sequences)] = self.kv
            self.kv = larger
        index = len(self.sequences)
        if sequence.token_ids:
            self.kv[:, :, index, :, : len(sequence.token_ids)] = sequence.kv
        self.sequences.append(sequence)
        sequence.block, sequence.index, sequence.parked = self, index, None

    def remove(self, sequence: CachedSequence) -> None:
        """Takes a sequence out; the last one moves into its place."""
        last = self.sequences.pop()
        if last is not sequence:
            num = len(last.token_ids)
            self.kv[:, :, sequence.index, :, :num] = self.kv[:, :, last.index, :, :num]
            self.sequences[sequence.index] = last
            last.index = sequence.index
        sequence.block = None


class KVCache:
    """All prefixes, sequences and blocks of an engine, for one version of the weights.

    Args:
        shape: Layers, key-value heads, head width.
        like: A tensor of the device and type that keys and values have.
    """

    def __init__(self, shape: tuple[int, int, int], like: Tensor) -> None:
        self.shape = shape
        self.like = like
        self.prefixes: list[SharedPrefix] = []
        self.sequences: dict[CachedSequence, None] = {}
        self.blocks: dict[int, Block] = {}
        self._clock = 0

    @property
    def prefix_tokens(self) -> int:
        """Tokens of all prefixes."""
        return sum(len(prefix.token_ids) for prefix in self.prefixes)

    def empty(self, num_tokens: int) -> Tensor:
        """(L, 2, K, N, D), to be filled."""
        layers, heads, width = self.shape
        return self.like.new_empty(layers, 2, heads, num_tokens, width)

    def open(
        self,
        prefix: SharedPrefix | None,
        token_ids: Sequence[int] = (),
        donor: CachedSequence | None = None,
    ) -> CachedSequence:
        """A new sequence below a prefix, its first tokens' keys and values copied from a donor."""
        sequence = CachedSequence(prefix, [*token_ids], parked=self._take(donor, len(token_ids)))
        self.sequences[sequence] = None
        self._use(prefix)
        return sequence

    def close(self, sequence: CachedSequence) -> None:
        del self.sequences[sequence]
        self._leave_block(sequence)
        sequence.parked = None
        if sequence.prefix is not None:
            sequence.prefix.users -= 1

    def place(self, sequence: CachedSequence, num_tokens: int, *, most: int) -> None:
        """Puts a sequence into a block with room for ``num_tokens``, if it is in none. ``most``
        tokens are promised to it.
        """
        capacity = block_size(num_tokens)
        if sequence.block is None or sequence.block.capacity < capacity:
            if capacity not in self.blocks:
                self.blocks[capacity] = Block(capacity, self.shape, self.like)
            if sequence.block is not None:
                self.park(sequence)
            self.blocks[capacity].add(sequence)

    def park(self, sequence: CachedSequence) -> None:
        """Copies a sequence out of its block, at its own length."""
        if sequence.block is not None:
            sequence.parked = sequence.kv.clone()
            self._leave_block(sequence)

    def grow(
        self,
        parent: SharedPrefix | None,
        token_ids: Sequence[int],
        donor: CachedSequence | None = None,
    ) -> SharedPrefix:
        """A new prefix below another, copied from the beginning of a donor or to be filled."""
        prefix = SharedPrefix(parent, tuple(token_ids), self._take(donor, len(token_ids)))
        self._use(parent)
        self.prefixes.append(prefix)
        return prefix

    def _take(self, donor: CachedSequence | None, num_tokens: int) -> Tensor:
        return donor.kv[:, :, :, :num_tokens].clone() if donor else self.empty(num_tokens)

    def match_or_split(self, token_ids: Sequence[int]) -> SharedPrefix | None:
        """The deepest prefix with which ``token_ids`` begin. A prefix that agrees only in part, but
        in ``MIN_PREFIX`` tokens, is split there.
        """
        prefix: SharedPrefix | None = None
        while True:
            depth = prefix.end if prefix else 0
            rest = tuple(token_ids[depth : depth + MIN_PREFIX])
            below = [t for t in self.prefixes if t.parent is prefix]
            alike = [t for t in below if _begins_alike(t.token_ids[:MIN_PREFIX], rest)]
            if not alike:
                return prefix
            prefix = alike[0]
            shared = common_prefix(prefix.token_ids, token_ids[depth:])
            if shared < len(prefix.token_ids):
                return self._split(prefix, shared)

    def donor(
        self, prefix: SharedPrefix | None, token_ids: Sequence[int]
    ) -> tuple[CachedSequence | None, int]:
        """The sequence below a prefix that shares most with ``token_ids``, and how many."""
        best, length = None, 0
        for sequence in self.sequences:
            if sequence.prefix is prefix:
                shared = common_prefix(sequence.token_ids, token_ids)
                if shared > length:
                    best, length = sequence, shared
        return best, length

    def prune(self, num_tokens: int) -> None:
        """Evicts unused prefixes, least recently used first, until ``num_tokens`` are free or none
        is left.
        """
        while num_tokens > 0:
            unused = [prefix for prefix in self.prefixes if not prefix.users]
            if not unused:
                return
            oldest = min(unused, key=lambda prefix: prefix.last_used)
            self._drop(oldest)
            num_tokens -= len(oldest.token_ids)

    def _drop(self, prefix: SharedPrefix) -> None:
        self.prefixes.remove(prefix)
        if prefix.parent is not None:
            prefix.parent.users -= 1

    def _leave_block(self, sequence: CachedSequence) -> None:
        """Leaves the block, which is freed when empty."""
        if (block := sequence.block) is not None:
            block.remove(sequence)
            if not block.sequences:
                del self.blocks[block.capacity]

    def _use(self, prefix: SharedPrefix | None) -> None:
        self._clock += 1
        if prefix is not None:
            prefix.users += 1
            for node in prefix.path():
                node.last_used = self._clock

    def _split(self, prefix: SharedPrefix, length: int) -> SharedPrefix:
        """Splits a prefix and returns the upper part; what was below stays below the lower."""
        # Copies, so that either part can be freed without the other.
        upper = SharedPrefix(
            prefix.parent, prefix.token_ids[:length], prefix.kv[:, :, :, :length].clone()
        )
        prefix.parent, prefix.token_ids = upper, prefix.token_ids[length:]
        prefix.kv = prefix.kv[:, :, :, length:].clone()
        upper.users, upper.last_used = 1, prefix.last_used
        self.prefixes.append(upper)
        return upper


def _begins_alike(run: tuple[int, ...], token_ids: tuple[int, ...]) -> bool:
    """Whether ``token_ids`` begin with the whole run, ``MIN_PREFIX`` tokens at most."""
    return len(run) <= len(token_ids) and run == token_ids[: len(run)]


def block_size(num_tokens: int) -> int:
    """The capacity of the block for a sequence of so many tokens: a power of two."""
    return max(MIN_BLOCK, 1 << max(num_tokens - 1, 0).bit_length())
