"""The process in which an isolated tool runs: a pickled call on stdin, a pickled result on stdout.

It protects the run from a tool that hangs, crashes or eats a core. It is no sandbox: the tool has
the rights of the user, the network and the disk.
"""

import asyncio
import contextlib
import ctypes
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable
from typing import Any


def main() -> None:
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    with contextlib.suppress(AttributeError, OSError):  # Linux: also where no thread gets to run
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the tool prints must not mix with the result
    import cloudpickle

    from agent_r1.tools import CallError

    payload = sys.stdin.buffer.read()
    path, pickled = cloudpickle.loads(payload)
    sys.path[:] = path
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


def _end_with(parent: int) -> None:
    """Ends this process and what it started when the one that waits for it is gone: nobody else
    would.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpgrp(), signal.SIGKILL)


async def _finished(work: Awaitable[Any]) -> Any:
    return await work


if __name__ == "__main__":
    main()
