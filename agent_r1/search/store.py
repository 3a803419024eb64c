"""Passages on disk, read one at a time: many processes share the pages, none holds the corpus."""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from agent_r1.search import Passage


class PassageStore:
    """The passages that ``store`` wrote to a folder, by position."""

    def __init__(self, folder: Path) -> None:
        self._starts = np.load(folder / "starts.npy", mmap_mode="r")
        with (folder / "passages.jsonl").open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, position: int) -> Passage:
        if not 0 <= position < len(self):
            raise IndexError(position)
        start, end = self._starts[position : position + 2]
        return Passage(*json.loads(self._bytes[start:end]))


def store(passages: Iterable[Passage], folder: Path) -> Iterator[Passage]:
    """Writes passages to a folder and passes them on."""
    starts = array("q", [0])
    with (folder / "passages.jsonl").open("wb") as file:
        for passage in passages:
            row = json.dumps([passage.id, passage.title, passage.text], ensure_ascii=False)
            starts.append(starts[-1] + file.write(row.encode() + b"\n"))
            yield passage
    np.save(folder / "starts.npy", np.asarray(starts))
