"""The cache of keys and values on a GPU: one tensor, a slot for each token of any sequence.

Sequences need not lie together there: a pass gathers what its tokens see by a table of slots. So
nothing is moved or copied when sessions come and go, and the tensor's address stays, as a captured
graph needs it. (A CPU, on which gathering costs as much as attention, has blocks: ``kv_cache``.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from agent_r1.rollout.native.kv_cache import (
    NO_SLOTS,
    CachedSequence,
    KVCache,
    SharedPrefix,
    Slots,
)


class SlotCache(KVCache):
    """As ``KVCache``, for at most ``num_slots`` tokens.

    ``storage`` is (L, 2, S, K, D). Slot 0 is nobody's: what is written there is never seen.
    """

    def __init__(self, shape: tuple[int, int, int], like: Tensor, num_slots: int) -> None:
        super().__init__(shape, like)
        layers, heads, width = shape
        # Zeros, since even what a mask hides must be finite.
        self.storage = like.new_zeros(layers, 2, num_slots + 1, heads, width)
        self._free: Slots = np.arange(num_slots, 0, -1)
        self._num_free = num_slots

    def empty(self, num_tokens: int) -> Tensor:
        """Keys and values are not held by sequence: no layers."""
        return self.like.new_empty(0, 2, 0, 0, 0)

    def open(
        self,
        prefix: SharedPrefix | None,
        token_ids: Sequence[int] = (),
        donor: CachedSequence | None = None,
    ) -> CachedSequence:
        sequence = super().open(prefix, token_ids)
        sequence.slots = self._copied(donor, len(token_ids))
        return sequence

    def close(self, sequence: CachedSequence) -> None:
        super().close(sequence)
        self._give_back(sequence.slots)
        sequence.slots = NO_SLOTS

    def place(self, sequence: CachedSequence, num_tokens: int, *, most: int) -> None:
        """Gives a sequence all slots that are promised to it, so that they stay as they are while
        it is sampled.
        """
        if (missing := most - len(sequence.slots)) > 0:
            sequence.slots = np.concatenate([sequence.slots, self._new(missing)])

    def park(self, sequence: CachedSequence) -> None:
        """Takes back the slots that a sequence does not use."""
        used = len(sequence.token_ids)
        self._give_back(sequence.slots[used:])
        sequence.slots = sequence.slots[:used]

    def grow(
        self,
        parent: SharedPrefix | None,
        token_ids: Sequence[int],
        donor: CachedSequence | None = None,
    ) -> SharedPrefix:
        prefix = super().grow(parent, token_ids)
        prefix.slots = self._copied(donor, len(token_ids))
        return prefix

    def _drop(self, prefix: SharedPrefix) -> None:
        super()._drop(prefix)
        self._give_back(prefix.slots)

    def _split(self, prefix: SharedPrefix, length: int) -> SharedPrefix:
        slots = prefix.slots
        upper = super()._split(prefix, length)
        upper.slots, prefix.slots = slots[:length], slots[length:]
        return upper

    def _copied(self, donor: CachedSequence | None, num_tokens: int) -> Slots:
        slots = self._new(num_tokens)
        if donor is not None and num_tokens:
            into, source = (
                torch.tensor(x, device=self.storage.device)
                for x in (slots, donor.slots[:num_tokens])
            )
            self.storage[:, :, into] = self.storage[:, :, source]
        return slots

    def _new(self, num: int) -> Slots:
        assert num <= self._num_free, "the scheduler admits what fits"
        self._num_free -= num
        return self._free[self._num_free : self._num_free + num].copy()

    def _give_back(self, slots: Slots) -> None:
        self._free[self._num_free : self._num_free + len(slots)] = slots
        self._num_free += len(slots)


def path_slots(holder: CachedSequence | SharedPrefix) -> Slots:
    """Where the tokens of a prefix or sequence lie, from position 0 on."""
    above = holder.parent if isinstance(holder, SharedPrefix) else holder.prefix
    parts = [prefix.slots for prefix in above.path()] if above else []
    return np.concatenate([*reversed(parts), holder.slots])
