"""Isolated tools: each call in a fresh Python process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle

from agent_r1.errors import CallError


class CrashError(Exception):
    """The process of an isolated tool ended without a result."""


class _RemoteError(Exception):
    """An exception raised in the process of an isolated tool; shown under its own name."""


async def in_process(call: Callable[[], Any]) -> Any:
    """Runs ``call`` in a fresh Python process (``agent_r1.tools.isolated``) that is killed when
    we stop waiting.
    """
    path = [*map(str, sys.path)]
    start = f"import sys; sys.path[:] = {path!r}; from agent_r1.tools.isolated import main; main()"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # do not import from the current folder
        "-c",
        start,
        str(os.getpid()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.suppress(ConnectionError):  # it may end before it has read all
            process.stdin.write(cloudpickle.dumps(call))
            await process.stdin.drain()
        process.stdin.close()
        # Not to the end of the stream: processes that the tool started may hold it open.
        size = int.from_bytes(await process.stdout.readexactly(8), "big")
        output = await process.stdout.readexactly(size)
    except asyncio.IncompleteReadError as error:
        await process.wait()
        raise CrashError(f"ended with exit code {process.returncode}") from error
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
        await process.wait()
    ok, value = cloudpickle.loads(output)
    if ok:
        return value
    name, text, rejected = value
    if rejected:
        raise CallError(text)
    raise type(name, (_RemoteError,), {})(text)
