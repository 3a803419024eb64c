"""Tasks that are made when they are asked for, so that a hundred thousand of them cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from agent_r1.types import Task


class LazyTasks(Sequence[Task]):
    """``make(index)`` for each index below ``length``; the task must depend on nothing else."""

    def __init__(self, length: int, make: Callable[[int], Task]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._length))]
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._make(index)
