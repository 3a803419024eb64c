"""The one thread in which a run's models sample: the event loop goes on meanwhile (tools, clocks,
servers), and two engines never compete for the same cores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from agent_r1.utils.scope import current_scope, shared

T = TypeVar("T")


class ModelThread:
    """Runs one call after another."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "model", initializer=_with_the_same_cores)

    async def run(self, call: Callable[[], T]) -> T:
        """What ``call`` gives. Cancelling does not stop it; a later call waits for its end."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def close(self) -> None:
        """Waits for the call at work and ends the thread."""
        try:
            await asyncio.to_thread(self._executor.shutdown)
        except RuntimeError:  # the end of the process
            self._executor.shutdown(wait=False)


class EngineThread:
    """The model thread of the current scope; outside of any scope, one of the engine's own."""

    def __init__(self) -> None:
        self._own: ModelThread | None = None

    async def run(self, call: Callable[[], T]) -> T:
        """As ``ModelThread.run``."""
        if current_scope() is not None:
            return await shared(ModelThread, ModelThread).run(call)
        self._own = self._own or ModelThread()
        return await self._own.run(call)


def _with_the_same_cores() -> None:
    import torch

    torch.set_num_threads(torch.get_num_threads())  # OpenMP counts for each thread apart
