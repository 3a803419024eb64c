"""The servers of an engine: started or found, given weights, watched, made ready again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import httpx

from agent_r1.errors import RunError
from agent_r1.rollout.remote.server import OwnProcess, Server
from agent_r1.rollout.remote.weights import WeightFolders
from agent_r1.rollout.remote.wire import RefusedError, ServerFaultError, Wire
from agent_r1.utils.log import LOG
from agent_r1.utils.text import describe

MAX_FAULTS = 3
"""Wrong or lost answers in a row after which a server counts as broken."""
PAUSE_SECONDS = 0.2
"""Between two looks at a server that is not ready."""
REPAIR_SECONDS = 2.0
"""After a repair that failed."""
TELL_SECONDS = 20.0
"""After so long a wait the user is told what is waited for."""


class Fleet:
    """See the module's docstring.

    Args:
        wire: The servers' dialect.
        weights: The versions that they are given.
        urls: Addresses of running servers; empty for servers of the run's own.
        launch: Starts the process of the server of that index; returns its address, too.
        count: Number of servers of the run's own.
        outage, timeout: See ``RemoteSettings``.
        prove: Raises ``ConfigError`` for a server that does not sample right.
        settled: Who holds it is the only one to work with the policy.
        is_learning: Whether the learner holds it: servers are then not to blame for an outage.
    """

    def __init__(
        self,
        wire: Wire,
        weights: WeightFolders,
        *,
        urls: tuple[str, ...],
        launch: Callable[[int], tuple[str, OwnProcess]],
        count: int,
        outage: float,
        timeout: float,
        prove: Callable[[Server], Awaitable[None]],
        settled: asyncio.Lock,
        is_learning: Callable[[], bool],
    ) -> None:
        self._wire, self._weights, self._launch, self._prove = wire, weights, launch, prove
        self._outage, self._settled, self._is_learning = outage, settled, is_learning
        self._lost = time.monotonic()  # when the last ready server was
        self._is_closed = False
        self._client = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            timeout=None,
            trust_env=bool(urls),  # a proxy is not for our own
            follow_redirects=True,
        )
        self.servers = [Server(url, self._client, timeout) for url in urls or [""] * count]
        self._has_own = not urls
        self._changed = asyncio.Event()
        self._repairs: set[asyncio.Task[None]] = set()
        self.num_repairs = 0
        self.first_fault = ""

    async def start(self) -> None:
        """Returns when all servers have the present weights; raises ``ServerFaultError`` or
        ``RefusedError``.
        """
        await asyncio.gather(*map(self._make_ready, self.servers))

    @property
    def outage(self) -> str | None:
        """Why no server can be asked at the moment, if so."""
        if any(server.is_ready for server in self.servers):
            return None
        return self.first_fault or "no server is ready"

    async def least_loaded(self) -> Server:
        """The server for a new session; waits for one."""
        await self.someone_is_ready()
        return min((s for s in self.servers if s.is_ready), key=lambda server: server.load)

    async def someone_is_ready(self) -> None:
        """Waits for a server; a ``RunError`` if there has been none for the time of an outage."""
        while not any(server.is_ready for server in self.servers):
            left = self._lost + self._outage - time.monotonic()
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), max(0.0, left))
            except TimeoutError as error:
                if self._is_learning():
                    self.forgive()
                if time.monotonic() < self._lost + self._outage:  # forgiven meanwhile
                    continue
                raise RunError(
                    f"no server of the engine works for {self._outage:g} s (engine.outage); "
                    f"the first fault: {self.first_fault}"
                ) from error

    def forgive(self) -> None:
        """The outage, if there is one, counts from now on."""
        self._lost = time.monotonic()

    async def update(self) -> None:
        """Gives the present weights to all that are ready; who does not take them is repaired."""

        async def one(server: Server) -> None:
            age = server.age
            try:
                async with server.lock:
                    await self._load(server)
            except (ServerFaultError, RefusedError) as error:
                self.note(server, age, ServerFaultError(str(error), is_gone=True))

        await asyncio.gather(*(one(server) for server in self.servers if server.is_ready))
        await self.someone_is_ready()

    def note(self, server: Server, age: int, error: ServerFaultError) -> None:
        """A fault of a server, asked at that ``age``: it is repaired if it is gone, or fails again
        and again. Faults of its life before a repair do not count.
        """
        self.first_fault = self.first_fault or f"{server.url}: {error}"
        if age != server.age or self._is_closed:
            return
        server.faults += not error.is_busy
        if server.is_ready and (error.is_gone or server.faults >= MAX_FAULTS):
            server.is_ready = False
            self.forgive()
            task = asyncio.ensure_future(self._repair(server))
            self._repairs.add(task)
            task.add_done_callback(self._repairs.discard)

    @property
    def in_use(self) -> set[int]:
        """Versions of weights that servers are reading, or may read again: adapters of requests."""
        reading = {server.reading for server in self.servers}
        asked = {self._weights.number(name) for server in self.servers for name in +server.asked}
        return {version for version in reading | asked if version is not None}

    async def close(self) -> None:
        """Ends the servers of the run's own."""
        self._is_closed = True
        for task in self._repairs:
            task.cancel()
        await asyncio.gather(*self._repairs, return_exceptions=True)
        await asyncio.gather(*(s.process.end() for s in self.servers if s.process))
        await self._client.aclose()

    async def _repair(self, server: Server) -> None:
        """Makes a server ready again, however often that fails: those who need one give up. New
        weights may be enough; if not, it is started again.
        """
        anew = False
        while True:
            try:
                await self._make_ready(server, anew=anew or server.ended() is not None)
                break
            except Exception as error:
                LOG.warning(f"a server of the engine is not ready yet: {error}")
                anew = True
                await asyncio.sleep(REPAIR_SECONDS)
        self.num_repairs += 1

    async def _make_ready(self, server: Server, *, anew: bool = True) -> None:
        """Starts a server's process if it is the run's own and is wanted ``anew``, waits until it
        answers, gives it the present weights, and has it proven.
        """
        async with server.lock:
            server.reading = self._weights.present  # by its start
            if self._has_own and anew:
                if server.process is not None:
                    await server.process.end()
                server.url, server.process = self._launch(self.servers.index(server))
            await self._answers(server, 0.0 if self._has_own and not anew else self._outage)
            server.adapters.clear()
            async with self._settled:
                given = -1
                while given != self._weights.present:  # new ones may have come meanwhile
                    given = self._weights.present
                    await self._load(server)
                await self._prove(server)
            server.is_ready, server.faults, server.age = True, 0, server.age + 1
        self._changed.set()

    async def _answers(self, server: Server, seconds: float) -> None:
        """Waits until the server answers; ``ServerFaultError`` when it has ended, or so late."""
        start, is_told = time.monotonic(), False
        while True:
            try:
                return await server.must_be_healthy()
            except ServerFaultError as error:
                waited = time.monotonic() - start
                if (ended := server.ended()) or waited > seconds:
                    why = ended or f"{error}\n{server.process.tail() if server.process else ''}"
                    raise ServerFaultError(f"{server.url}: {why}".strip()) from error
                if waited > TELL_SECONDS and not is_told:
                    is_told = True
                    LOG.info(f"waiting for the engine's server {server.url}: {error}")
            await asyncio.sleep(PAUSE_SECONDS)

    async def _load(self, server: Server) -> None:
        version = server.reading = self._weights.present
        path, name = self._weights.path(version), self._weights.name(version)
        try:
            with server.no_time_limits():
                await self._wire.load(server, path, name)
        except (LookupError, TypeError, AttributeError) as error:
            raise ServerFaultError(f"an answer that is none: {describe(error)}") from error
        finally:
            server.reading = None
