"""Passes in which every session samples one token and nobody enters, without the launches: on a GPU
the whole pass, from tokens to drawn tokens, is captured once for a size and replayed.

One transfer takes a pass's inputs to the device and one brings back what was drawn. Where nothing
can be captured, on a CPU, the same function runs plainly; tests compare it there.

Shape letters: R rows, one a sequence; N keys of a row; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from agent_r1.errors import RunError
from agent_r1.model.policy import Policy
from agent_r1.rollout.native.kv_cache import NO_SLOTS, CachedSequence, Slots
from agent_r1.rollout.native.request import Request
from agent_r1.rollout.native.slot_cache import SlotCache, path_slots
from agent_r1.rollout.native.slot_pass import attend_rows
from agent_r1.rollout.sampling import NOT_FINITE, draw_plain

MIN_KEYS = 256
FEW_ROWS = (1, 4, 16, 64)


class DecodeGraphs:
    """The captured passes of an engine, by size, for one cache."""

    def __init__(self, policy: Policy, cache: SlotCache) -> None:
        self._policy = policy
        self._cache = cache
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._memory = Memory() if policy.device.type == "cuda" else None

    @staticmethod
    def serves(requests: Sequence[Request]) -> bool:
        """Whether their sampling is of the plain kind, which is drawn within the pass."""
        return all(r.sampling.top_p == 1.0 and not r.sampling.top_k for r in requests)

    def run(self, sequences: Sequence[CachedSequence], requests: Sequence[Request]) -> None:
        """The next token of each request; its last one is added to its sequence."""
        size = num_rows(len(sequences)), num_keys(max(s.end for s in sequences) + 1)
        if size not in self._passes:
            self._passes[size] = _Pass(self._policy, self._cache, self._memory, *size)
        found = self._passes[size].run(sequences, requests)
        for sequence, request, (token_id, logprob, entropy, total) in zip(
            sequences, requests, found, strict=False
        ):
            if not np.isfinite(total):
                raise RunError(NOT_FINITE)
            sequence.token_ids.append(request.token_ids[-1])
            request.note(int(token_id), float(logprob), float(entropy))


class Memory:
    """What all graphs share: they run one after another, and what they keep lies elsewhere."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()


class _Pass:
    """A pass of one size: its inputs and outputs stay where they are, as a graph needs it.

    ``inputs`` is (R, 5): token, position, uniform number, temperature (1 if greedy), greedy or not.
    """

    def __init__(
        self, policy: Policy, cache: SlotCache, memory: Memory | None, rows: int, keys: int
    ) -> None:
        self._policy, self._storage = policy, cache.storage
        device = cache.storage.device
        self._host = torch.zeros(rows, 5, dtype=torch.float64)
        self._host[:, 3] = 1.0
        self._inputs = self._host.to(device)
        self._table = torch.zeros(rows, keys, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(rows, 4, dtype=torch.float64, device=device)
        self._rows: list[Slots] = [NO_SLOTS] * rows
        self._graph = self._capture(memory) if memory else None

    def run(
        self, sequences: Sequence[CachedSequence], requests: Sequence[Request]
    ) -> list[list[float]]:
        """(R, 4): token, log-probability, entropy, and the normaliser, which tells by being finite
        that all is well.
        """
        self._fill_table(sequences)
        host = self._host
        host[:, :2], host[:, 2:] = 0.0, torch.tensor([0.0, 1.0, 0.0])
        host[: len(requests)] = torch.tensor(
            [
                [
                    request.token_ids[-1],
                    sequence.end,
                    request.uniforms[len(request.token_ids)],
                    request.sampling.temperature or 1.0,
                    request.sampling.temperature == 0.0,
                ]
                for sequence, request in zip(sequences, requests, strict=True)
            ],
            dtype=torch.float64,
        )
        self._inputs.copy_(host)
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        return self._drawn.tolist()

    def _fill_table(self, sequences: Sequence[CachedSequence]) -> None:
        """Writes the slots of the rows that changed: arrays of slots are replaced, never changed in
        place. A row without a sequence has slot 0 alone, where its pass may write.
        """
        rows = [sequence.slots for sequence in sequences]
        rows += [NO_SLOTS] * (len(self._rows) - len(rows))
        changed = [row for row, slots in enumerate(rows) if slots is not self._rows[row]]
        if not changed:
            return
        table = np.zeros((len(changed), self._table.shape[1]), np.int64)
        for number, row in enumerate(changed):
            if row < len(sequences):
                slots = path_slots(sequences[row])[: table.shape[1]]
                table[number, : len(slots)] = slots
        device = self._table.device
        self._table[torch.tensor(changed, device=device)] = torch.tensor(table, device=device)
        self._rows = rows

    def _capture(self, memory: Memory) -> torch.cuda.CUDAGraph:
        memory.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(memory.stream):  # kernels are loaded outside of the capture
            self._compute()
        torch.cuda.current_stream().wait_stream(memory.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=memory.pool, stream=memory.stream, capture_error_mode="thread_local"
        ):
            self._compute()
        return graph

    def _compute(self) -> None:
        token, position, uniform, temperature, greedy = self._inputs.unbind(1)
        tree = _Rows(self._storage, self._table, position.long())
        with self._policy.packed():
            hidden = self._policy.hidden(token.long(), position.long(), tree)
        drawn = draw_plain(self._policy.logits(hidden), uniform, temperature.float(), greedy.bool())
        self._drawn.copy_(drawn)


class _Rows:
    """The ``Tree`` of a pass with one query a row."""

    def __init__(self, storage: Tensor, table: Tensor, position: Tensor) -> None:
        self._storage, self._table, self._position = storage, table, position[:, None]
        self._slot = table.gather(1, self._position).squeeze(1)

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
        kv[0, self._slot] = key[0].transpose(0, 1)
        kv[1, self._slot] = value[0].transpose(0, 1)
        rows = query[0].unsqueeze(2)
        return attend_rows(kv, rows, self._position, self._table, scale, window).permute(2, 0, 1, 3)


def num_rows(num: int) -> int:
    """Rows of the pass for so many sequences: sizes are few, for each is captured."""
    return next((few for few in FEW_ROWS if few >= num), -(-num // 64) * 64)


def num_keys(num: int) -> int:
    """Keys of the pass for sequences of at most so many: a power of two."""
    return max(MIN_KEYS, 1 << (num - 1).bit_length())
