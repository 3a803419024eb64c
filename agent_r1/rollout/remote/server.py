"""One server of an engine: its address, its health and, where it is the run's own, its process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from agent_r1.rollout.remote.wire import MODEL, RefusedError, ServerFaultError
from agent_r1.utils.text import describe

END_SECONDS = 8.0
"""Time for a server to end by itself before it is killed."""
LOG_LINES = 25
KEEPER = """
import os, signal, subprocess, sys, threading
signal.signal(signal.SIGTERM, lambda *_: None)  # the server's to obey; this process waits for it
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def watch():
    sys.stdin.buffer.read()  # ends when the process that holds the other end does, killed or not
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
os._exit(server.wait() & 255)
"""
"""Stands between a run and its server, so that a run that is killed leaves nothing behind."""


class Server:
    """A server that answers at ``url``, asked through a client that others use, too.

    Attributes:
        is_ready: It may be asked: it answers, and its weights are known.
        load: Number of sessions that stick to it.
        faults: Failures since it last did what it was asked.
        age: How often it was made ready.
        reading: Version of the weights that it is reading from the disk.
        asked: Models (adapters, too) of the requests to sample that it is at work on.
    """

    def __init__(self, url: str, client: httpx.AsyncClient, limit: float) -> None:
        self.url, self._client, self._limit = url.rstrip("/"), client, limit
        self.is_ready, self.load, self.faults, self.age = False, 0, 0, 0
        self.reading: int | None = None
        self.adapters: list[str] = []
        self.asked: Counter[str] = Counter()
        self._limits: set[asyncio.Timeout] = set()
        self._is_loading = False
        self.lock = asyncio.Lock()  # one change of weights at a time
        self.process: OwnProcess | None = None

    async def get(self, path: str, *, seconds: float) -> Any:
        return await self._ask("GET", path, None, asyncio.timeout(seconds))

    async def post(self, path: str, body: Any = None, *, seconds: float) -> Any:
        return await self._ask("POST", path, body, asyncio.timeout(seconds))

    @property
    def model(self) -> str:
        return self.adapters[-1] if self.adapters else MODEL

    async def sample(self, path: str, body: Any, *, session: str) -> Any:
        model = self.model
        limit = asyncio.timeout(None if self._is_loading else self._limit)
        self.asked[model] += 1
        self._limits.add(limit)
        try:
            return await self._ask("POST", path, body, limit, {"x-session-id": session})
        except RefusedError as error:
            if model != MODEL and model in str(error):
                raise ServerFaultError(f"it has lost its adapter: {error}", is_gone=True) from error
            raise
        finally:
            self._limits.discard(limit)
            self.asked[model] -= 1

    @contextlib.contextmanager
    def no_time_limits(self) -> Iterator[None]:
        """Requests to sample rest meanwhile, and that time is not theirs."""
        now = asyncio.get_running_loop().time
        left = {
            limit: when - now()
            for limit in self._limits
            if (when := limit.when()) is not None and not limit.expired()
        }
        for limit in left:
            limit.reschedule(None)
        self._is_loading = True
        try:
            yield
        finally:
            self._is_loading = False
            for limit in self._limits:
                if not limit.expired():
                    limit.reschedule(now() + left.get(limit, self._limit))

    async def must_be_healthy(self) -> None:
        """Raises as ``get`` if the server does not say that it is; all kinds have this route."""
        await self.get("/health", seconds=10.0)

    async def _ask(
        self,
        method: str,
        path: str,
        body: Any,
        limit: asyncio.Timeout,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        content = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", **headers}
        start = time.monotonic()
        try:
            async with limit:  # httpx's own are for each read
                answer = await self._client.request(
                    method, self.url + path, content=content, headers=headers
                )
            if answer.status_code < 300:
                return _content(answer)
        except TimeoutError as error:
            waited = time.monotonic() - start
            raise ServerFaultError(f"no answer within {waited:.3g} s", is_gone=True) from error
        except httpx.ConnectError as error:
            raise ServerFaultError(describe(error), is_gone=True) from error
        except (httpx.HTTPError, ValueError) as error:
            raise ServerFaultError(describe(error)) from error
        said = f"status {answer.status_code} for {path.partition('?')[0]}: {answer.text[:400]}"
        if (is_busy := answer.status_code == 429) or answer.status_code >= 500:
            wait = answer.headers.get("retry-after", "")
            seconds = float(wait) if wait.isdigit() else 0.0
            raise ServerFaultError(said, is_busy=is_busy, wait=seconds)
        raise RefusedError(said)

    def ended(self) -> str | None:
        """How the server's own process ended; ``None`` if it runs, or is not ours."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        return f"the server ended with code {code}:\n{self.process.tail()}"


def _content(answer: httpx.Response) -> Any:
    """JSON where it is some; some routes answer with a sentence."""
    try:
        return answer.json()
    except ValueError:
        if "json" in answer.headers.get("content-type", ""):
            raise
        return answer.text


class OwnProcess:
    """A server's process, with all that it starts."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self._keeper = subprocess.Popen(
                [sys.executable, "-S", "-c", KEEPER, *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to handle
            )

    def poll(self) -> int | None:
        """Its exit code, or ``None`` while it runs."""
        return self._keeper.poll()

    def tail(self) -> str:
        """The last lines of its log."""
        if not self.log.exists():
            return ""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_LINES:])

    async def end(self) -> None:
        """Ends it and waits; kills it if it does not obey."""
        self._signal(signal.SIGTERM)
        for _ in range(int(END_SECONDS / 0.05)):
            if self._keeper.poll() is not None:
                break
            await asyncio.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """Ends it at once, with all that it has started."""
        self._signal(signal.SIGKILL)
        self._keeper.wait()
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._keeper.pid, number)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
