"""The process in which an isolated tool runs: a pickled call on stdin, a pickled result on stdout.

It protects the run from a tool that hangs, crashes or eats a core. It is no sandbox: the tool has
the rights of the user, the network and the disk.
"""

import asyncio
import inspect
import os
import sys
from collections.abc import Awaitable
from typing import Any


def main() -> None:
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
    out.write(cloudpickle.dumps(result))
    out.close()


async def _finished(work: Awaitable[Any]) -> Any:
    return await work


if __name__ == "__main__":
    main()
