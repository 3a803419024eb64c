"""The process in which an isolated tool runs: a pickled call on stdin, a pickled result on stdout.

The process protects the run from a tool that hangs, crashes or uses up a core. This is no sandbox:
the tool has the user's rights, the network and the disk.
"""

import asyncio
import contextlib
import ctypes
import inspect
import os
import signal
import sys
import time
from collections.abc import Awaitable
from typing import Any


def main() -> None:
    _watch(int(sys.argv[1]))
    with contextlib.suppress(AttributeError, OSError):  # Linux: at once
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the tool prints must not mix with the result
    import cloudpickle

    from agent_r1.errors import CallError

    pickled = sys.stdin.buffer.read()
    try:
        value = cloudpickle.loads(pickled)()
        if inspect.isawaitable(value):
            value = asyncio.run(_finished(value))
        result = (True, value)
    except Exception as error:
        result = (False, (type(error).__name__, str(error), isinstance(error, CallError)))
    pickled = cloudpickle.dumps(result)
    out.write(len(pickled).to_bytes(8, "big") + pickled)
    out.close()


def _watch(trainer: int) -> None:
    """Starts a watchdog: once this process or the waiting trainer is gone, the watchdog kills the
    whole process group, itself included.
    """
    process = os.getpid()
    if os.fork():
        return
    os.closerange(0, 3)
    while os.getppid() == process and _lives(trainer):
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


async def _finished(work: Awaitable[Any]) -> Any:
    return await work
