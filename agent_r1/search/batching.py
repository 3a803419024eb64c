"""Answers queries in one batch if episodes ask them at the same time."""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeAlias

import numpy as np

from agent_r1.search import Passage
from agent_r1.utils.text import clean

Query: TypeAlias = tuple[str, int]
"""Text, and number of passages wanted."""
Answer: TypeAlias = list[Passage] | Exception
_Waiting: TypeAlias = list[tuple[Query, "asyncio.Future[Answer]"]]


class BatchedSearcher:
    """Base of searchers that answer many queries at once. Implement ``look_up``, which runs in a
    thread, one call at a time, or ``answer``.
    """

    one_at_a_time: ClassVar[bool] = True
    """Whether a batch waits for the batch before; else batches are answered concurrently."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, _Waiting] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self._seconds = array("d")

    def look_up(self, queries: Sequence[Query]) -> Sequence[Answer]:
        """The passages of each query; an exception in their place fails only that query."""
        raise NotImplementedError(f"{type(self).__name__} has neither look_up nor answer")

    async def answer(self, queries: Sequence[Query]) -> Sequence[Answer]:
        """As ``look_up``, without blocking the event loop."""

        def alone() -> Sequence[Answer]:
            with self._lock:
                return self.look_up(queries)

        return await asyncio.to_thread(alone)

    async def search(self, query: str, k: int) -> list[Passage]:
        start = time.perf_counter()
        query = clean(query)
        loop = asyncio.get_running_loop()
        if loop not in self._waiting:  # the queue lives no longer than somebody waits in it
            self._waiting[loop] = []
            self._tasks.add(task := loop.create_task(self._serve(loop)))
            task.add_done_callback(self._tasks.discard)
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting[loop].append(((query, k), future))
        answer = await future
        if isinstance(answer, Exception):
            raise answer
        self._seconds.append(time.perf_counter() - start)
        return list(answer)

    def report(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, array("d")
        figures = {"queries": float(len(seconds))}
        if seconds:
            p50, p99 = 1000 * np.percentile(seconds, (50, 99))
            figures |= {"p50_ms": float(p50), "p99_ms": float(p99)}
        return figures

    async def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answers the waiting queries, batch after batch, until none is left."""
        waiting = self._waiting[loop]
        try:
            while waiting:
                size = 0
                while size != len(waiting):  # let all that can ask now do so first
                    size = len(waiting)
                    await asyncio.sleep(0)
                asked: defaultdict[Query, list[asyncio.Future[Answer]]] = defaultdict(list)
                for query, future in waiting:
                    if not future.done():  # else given up
                        asked[query].append(future)
                waiting.clear()
                if self.one_at_a_time:
                    await self._give(asked)
                else:
                    self._tasks.add(task := loop.create_task(self._give(asked)))
                    task.add_done_callback(self._tasks.discard)
        finally:
            del self._waiting[loop]
            for _, future in waiting:
                future.cancel()

    async def _give(self, asked: Mapping[Query, Sequence[asyncio.Future[Answer]]]) -> None:
        """Answers a batch."""
        try:
            for query, answer in zip(asked, await self._answers([*asked]), strict=True):
                for future in asked[query]:
                    if not future.done():
                        future.set_result(answer)
        finally:
            for futures in asked.values():
                for future in futures:
                    future.cancel()  # does nothing to one that is done

    async def _answers(self, queries: Sequence[Query]) -> Sequence[Answer]:
        if not queries:
            return []
        try:
            answers = await self.answer(queries)
            if len(answers) != len(queries):
                raise ValueError(f"{len(answers)} answers to {len(queries)} queries")
            return answers
        except Exception as error:  # raised again by each query's ``search``
            return [error] * len(queries)
