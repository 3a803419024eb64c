"""What an optimiser step reports, summed over its micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from agent_r1.learner.micro_batch import MicroBatch
from agent_r1.types import PerToken, StepKey


class Sums:
    """Numbers stay on the device until they are asked for, once a mini-batch: asking waits for all
    that it has to do.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._terms: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._tables: defaultdict[str, list[tuple[MicroBatch, Tensor]]] = defaultdict(list)

    def add(self, **terms: Tensor) -> None:
        """Numbers, by the names of their sums."""
        for name, term in terms.items():
            self._terms[name].append(term.detach())

    def add_rows(self, micro: MicroBatch, **rows: Tensor) -> None:
        """(A,) numbers of a micro-batch's action tokens, by the names of their tables."""
        for name, row in rows.items():
            self._tables[name].append((micro, row.detach()))

    def total(self, name: str) -> float:
        """A sum; 0 if there is nothing in it."""
        total = 0.0
        for number in self._numbers(name):  # `sum` adds otherwise from Python 3.12 on
            total += number
        return total

    def largest(self, name: str) -> float:
        """The largest of its numbers, NaN left out; 0 if there are none."""
        return max([0.0, *self._numbers(name)])

    def table(self, name: str) -> dict[StepKey, PerToken]:
        """A table's numbers, each step's own; empty if there are none."""
        found: dict[StepKey, PerToken] = {}
        for micro, row in self._tables.get(name, ()):
            found |= by_step(micro.keys, micro.lengths, row)
        return found

    def _numbers(self, name: str) -> list[float]:
        terms = self._terms.get(name)
        return torch.stack(terms).tolist() if terms else []


def by_step(
    keys: Sequence[StepKey], lengths: Sequence[int], per_token: Tensor
) -> dict[StepKey, PerToken]:
    """(A,) numbers of action tokens, each step's own.

    Args:
        keys: (S,), the steps. lengths: (S,), their action tokens.
        per_token: (A,), step after step.
    """
    rest = iter(per_token.tolist())
    return {key: tuple(islice(rest, n)) for key, n in zip(keys, lengths, strict=True)}
