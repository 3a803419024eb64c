"""Keys and values along the tree of tokens: what the engine has computed and need not again.

A *trunk* is a run of tokens that several sessions share, held once. A *row* is what one session has
beyond its trunk. Rows being sampled lie in *slabs*, one tensor for rows of like length, so that one
call serves them all; the row of a session that waits for its tools is taken out, to its own length.

Shape letters: L layers, R rows, K key-value heads, N tokens, D head width; 2 is keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from agent_r1.tree import common_prefix

MIN_TRUNK = 64
"""Shorter shared runs are computed once but stored with every row: fewer calls per token."""
MIN_SLAB = 128


@dataclass(eq=False)
class Trunk:
    """A shared run of tokens; ``kv`` is (L, 2, K, N, D), filled layer by layer."""

    parent: Trunk | None
    token_ids: tuple[int, ...]
    kv: Tensor
    users: int = 0
    """Rows and trunks right below."""
    last_used: int = 0

    @property
    def start(self) -> int:
        """Position of its first token."""
        return self.parent.end if self.parent else 0

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    def path(self) -> Iterator[Trunk]:
        """From here up to the root."""
        node: Trunk | None = self
        while node is not None:
            yield node
            node = node.parent


@dataclass(eq=False)
class Row:
    """The tokens of one session beyond its trunk that have been computed."""

    trunk: Trunk | None
    token_ids: list[int] = field(default_factory=list)
    slab: Slab | None = None
    index: int = 0
    parked: Tensor | None = None
    """(L, 2, K, N, D) while the row is in no slab."""

    @property
    def base(self) -> int:
        """Position of the first token of its own."""
        return self.trunk.end if self.trunk else 0

    @property
    def end(self) -> int:
        return self.base + len(self.token_ids)

    @property
    def kv(self) -> Tensor:
        """(L, 2, K, N, D)."""
        if self.slab is None:
            assert self.parked is not None
            return self.parked[:, :, :, : len(self.token_ids)]
        return self.slab.kv[:, :, self.index, :, : len(self.token_ids)]

    def history(self) -> Iterator[int]:
        """All its tokens, the trunk's first."""
        for trunk in reversed([*self.trunk.path()] if self.trunk else []):
            yield from trunk.token_ids
        yield from self.token_ids

    @property
    def capacity(self) -> int:
        """Tokens that it takes memory for."""
        return self.slab.capacity if self.slab else len(self.token_ids)


class Slab:
    """Rows of at most ``capacity`` tokens; ``kv`` is (L, 2, R, K, capacity, D), the first rows in
    use.
    """

    def __init__(self, capacity: int, shape: tuple[int, int, int], like: Tensor) -> None:
        layers, heads, width = shape
        self.capacity = capacity
        self.rows: list[Row] = []
        self.kv = like.new_zeros(layers, 2, 0, heads, capacity, width)

    def add(self, row: Row) -> None:
        """Takes in a row that is in no slab."""
        if len(self.rows) == self.kv.shape[2]:
            shape = list(self.kv.shape)
            shape[2] = max(8, 2 * len(self.rows))
            larger = self.kv.new_zeros(shape)  # pages that are not written take no memory yet
            larger[:, :, : len(self.rows)] = self.kv
            self.kv = larger
        index = len(self.rows)
        if row.token_ids:
            self.kv[:, :, index, :, : len(row.token_ids)] = row.kv
        self.rows.append(row)
        row.slab, row.index, row.parked = self, index, None

    def remove(self, row: Row) -> None:
        """Takes a row out; the last one moves into its place."""
        last = self.rows.pop()
        if last is not row:
            num = len(last.token_ids)
            self.kv[:, :, row.index, :, :num] = self.kv[:, :, last.index, :, :num]
            self.rows[row.index] = last
            last.index = row.index
        row.slab = None


class Cache:
    """All trunks, rows and slabs of an engine, for one version of the weights.

    Args:
        shape: Layers, key-value heads, head width.
        like: A tensor of the device and type that keys and values have.
    """

    def __init__(self, shape: tuple[int, int, int], like: Tensor) -> None:
        self.shape = shape
        self.like = like
        self.trunks: list[Trunk] = []
        self.rows: dict[Row, None] = {}
        self.slabs: dict[int, Slab] = {}
        self._clock = 0

    @property
    def trunk_tokens(self) -> int:
        """Tokens of all trunks."""
        return sum(len(trunk.token_ids) for trunk in self.trunks)

    def empty(self, num_tokens: int) -> Tensor:
        """(L, 2, K, N, D), to be filled."""
        layers, heads, width = self.shape
        return self.like.new_empty(layers, 2, heads, num_tokens, width)

    def open(self, trunk: Trunk | None) -> Row:
        """A new row below a trunk."""
        row = Row(trunk, parked=self.empty(0))
        self.rows[row] = None
        self._use(trunk)
        return row

    def close(self, row: Row) -> None:
        del self.rows[row]
        self._leave_slab(row)
        row.parked = None
        if row.trunk is not None:
            row.trunk.users -= 1

    def place(self, row: Row, num_tokens: int) -> None:
        """Sees to it that a row lies in a slab with room for so many tokens."""
        capacity = slab_size(num_tokens)
        if row.slab is None or row.slab.capacity < capacity:
            if capacity not in self.slabs:
                self.slabs[capacity] = Slab(capacity, self.shape, self.like)
            if row.slab is not None:
                self.park(row)
            self.slabs[capacity].add(row)

    def park(self, row: Row) -> None:
        """Takes a row out of its slab, to its own length."""
        if row.slab is not None:
            row.parked = row.kv.clone()
            self._leave_slab(row)

    def grow(self, parent: Trunk | None, token_ids: Sequence[int], kv: Tensor) -> Trunk:
        """A new trunk below another."""
        trunk = Trunk(parent, tuple(token_ids), kv)
        self._use(parent)
        self.trunks.append(trunk)
        return trunk

    def match(self, token_ids: Sequence[int]) -> Trunk | None:
        """The deepest trunk whose path begins ``token_ids``; one that agrees in a long part only
        is split there.
        """
        trunk: Trunk | None = None
        while True:
            depth = trunk.end if trunk else 0
            rest = tuple(token_ids[depth : depth + MIN_TRUNK])
            below = [t for t in self.trunks if t.parent is trunk]
            alike = [t for t in below if _begins_alike(t.token_ids[:MIN_TRUNK], rest)]
            if not alike:
                return trunk
            trunk = alike[0]
            shared = common_prefix(trunk.token_ids, token_ids[depth:])
            if shared < len(trunk.token_ids):
                return self._split(trunk, shared)

    def donor(self, trunk: Trunk | None, token_ids: Sequence[int]) -> tuple[Row | None, int]:
        """The row below a trunk that begins ``token_ids`` furthest, and how far."""
        best, length = None, 0
        for row in self.rows:
            if row.trunk is trunk:
                shared = common_prefix(row.token_ids, token_ids)
                if shared > length:
                    best, length = row, shared
        return best, length

    def prune(self, num_tokens: int) -> None:
        """Lets go of the longest unused trunks until so many tokens are free of them, or none is
        left.
        """
        while num_tokens > 0:
            unused = [trunk for trunk in self.trunks if not trunk.users]
            if not unused:
                return
            oldest = min(unused, key=lambda trunk: trunk.last_used)
            self.trunks.remove(oldest)
            if oldest.parent is not None:
                oldest.parent.users -= 1
            num_tokens -= len(oldest.token_ids)

    def _leave_slab(self, row: Row) -> None:
        """A slab that nobody is left in is given back."""
        if (slab := row.slab) is not None:
            slab.remove(row)
            if not slab.rows:
                del self.slabs[slab.capacity]

    def _use(self, trunk: Trunk | None) -> None:
        self._clock += 1
        if trunk is not None:
            trunk.users += 1
            for node in trunk.path():
                node.last_used = self._clock

    def _split(self, trunk: Trunk, length: int) -> Trunk:
        """Parts a trunk in two and returns the upper part; what was below stays below the lower."""
        # Copies, so that either part can be let go without the other.
        upper = Trunk(trunk.parent, trunk.token_ids[:length], trunk.kv[:, :, :, :length].clone())
        trunk.parent, trunk.token_ids = upper, trunk.token_ids[length:]
        trunk.kv = trunk.kv[:, :, :, length:].clone()
        upper.users, upper.last_used = 1, trunk.last_used
        self.trunks.append(upper)
        return upper


def _begins_alike(run: tuple[int, ...], token_ids: tuple[int, ...]) -> bool:
    """Whether a run of at most ``MIN_TRUNK`` tokens stands whole at the beginning."""
    return len(run) <= len(token_ids) and run == token_ids[: len(run)]


def slab_size(num_tokens: int) -> int:
    """The capacity of the slab for a row of so many tokens: a power of two."""
    return max(MIN_SLAB, 1 << max(num_tokens - 1, 0).bit_length())
