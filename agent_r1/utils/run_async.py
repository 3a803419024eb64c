"""One place where synchronous code waits for asynchronous code, in one event loop for the whole
process: what lives longer than one call (clients, locks, pools) may belong to a loop.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import functools
import logging
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from agent_r1.utils.blocked import watched
from agent_r1.utils.text import describe, place_of

T = TypeVar("T")
_AT_WORK = threading.Lock()
"""Held while the process's loop runs."""
EXIT_SECONDS = 1.0
"""What is left in the loop at the end of the process has so long to obey its cancellation."""


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Runs ``work`` to its end, also from within a running loop (a notebook), then in a thread of
    its own. Whoever comes while the process's loop is at work, as a tool that asks another agent,
    gets a loop for himself.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(work)
    result: list[T] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            result.append(_run(work))
        except BaseException as error:  # raised again below, in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=target, name="agent-r1")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _run(work: Coroutine[Any, Any, T]) -> T:
    if not _AT_WORK.acquire(blocking=False):
        return asyncio.run(work)
    try:
        with watched(_runner().get_loop()):
            return _runner().run(work, context=contextvars.copy_context())
    finally:
        _AT_WORK.release()


@functools.cache
def _runner() -> asyncio.Runner:
    runner = asyncio.Runner()
    runner.get_loop().set_exception_handler(_tell)
    atexit.register(_close, runner.get_loop())
    return runner


def _tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What code of others left behind: a task whose error nobody asked for, a callback's error."""
    error = context.get("exception")
    why = f": {describe(error)}{place_of(error)}" if isinstance(error, BaseException) else ""
    logging.getLogger("agent_r1").warning("%s%s", context.get("message"), why)


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Ends what is left, but waits for nobody who does not want to end."""
    if loop.is_running() or loop.is_closed():
        return
    loop.set_exception_handler(lambda *_: None)  # nobody reads it any more
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left, timeout=EXIT_SECONDS))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
