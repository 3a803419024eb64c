"""Tools of MCP servers, in any tool environment.

    [env.mcp.search]
    command = ["python", "server.py"]       # a child process, reached by stdio
    # or: url = "http://localhost:8000/mcp"   (streamable HTTP)

A server is connected to when the first episode needs it and serves all of a run; it lives in a
thread with an event loop of its own. A server that has died is started again, or connected to
again, by the next call; calls that were under way are a ``crash`` that the agent sees, or what the
tool's failure policy says. Needs the extra ``agent-r1[mcp]``.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import logging
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic import ValidationError

from agent_r1.config.section import nearest
from agent_r1.errors import ConfigError
from agent_r1.tools.arguments import strip_titles
from agent_r1.tools.base import ToolError, ToolResult
from agent_r1.tools.failure_policy import FailurePolicy, Health
from agent_r1.tools.mcp.schema import checker_of
from agent_r1.tools.mcp.settings import EXPANDED, McpServer
from agent_r1.types import ToolCall
from agent_r1.utils.scope import current_scope, shared
from agent_r1.utils.text import as_text, clean, clean_json

T = TypeVar("T")


MAX_LOGGED = 20
"""Most lines of the SDK's log."""


MAX_TIMEOUTS = 3
"""Time-outs in a row after which a server counts as hung and is restarted."""


class Connection:
    """A session with a server, opened when needed and opened again after it was lost.

    Attributes:
        num_starts: Number of times it was opened.
    """

    def __init__(self, name: str, server: McpServer) -> None:
        self.name, self.server = name, server
        self._alone = current_scope() is None  # nobody else closes it and its thread
        self._thread = shared(_Thread, _Thread)
        self.num_starts = 0
        self._client: Any = None
        self._keeper: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._num_timeouts = 0
        self._lock: asyncio.Lock | None = None
        self._tools: list[McpTool] | None = None

    async def tools(self) -> list[McpTool]:
        """The server's tools, listed once.

        Raises:
            ConfigError: The server cannot be reached, or lacks a tool named in ``tools``.
        """
        if self._tools is None:
            server = self.name, self.server.model_dump_json()
            reached: set[tuple[str, str]] = shared("MCP servers that have answered", set)
            try:
                listed = await self._thread.run(self._list())
            except ConfigError as error:
                raise ConfigError(f"env.mcp.{self.name}: {error}") from error
            except Exception as error:  # whatever the transport raises
                if server in reached:
                    raise  # a fault of this episode alone
                where = self.server.url or " ".join(self.server.command)
                cure = "does it run by hand?" if self.server.command else "does it listen there?"
                if isinstance(error, ValidationError):
                    cure = "its list of tools is not as the protocol wants it: mend that there"
                raise ConfigError(
                    f"env.mcp.{self.name}: {where!r}: {_in_words(error)}; {cure}"
                ) from error
            reached.add(server)
            known = {tool.name: tool for tool in listed}
            if len(known) < len(listed):
                raise ConfigError(f"env.mcp.{self.name}: it lists two tools of one name")
            for name in self.server.tools:
                if name not in known:
                    raise ConfigError(
                        f"env.mcp.{self.name}.tools: no tool {name!r}{nearest(name, [*known])}"
                    )
            wanted = self.server.tools or [*known]
            self._tools = [McpTool(self, known[name]) for name in wanted]
        return self._tools

    async def call(self, tool: str, arguments: dict[str, Any], timeout: float) -> Any:
        """The server's result."""
        return await self._thread.run(self._call(tool, arguments, timeout))

    async def close(self) -> None:
        if self._keeper is not None:
            await self._thread.run(self._close())
        if self._alone:
            self._thread.close()

    @property
    def of_episode(self) -> bool:
        """Whether it ends with its episode."""
        return self._alone or self.server.per == "episode"

    # In the servers' thread ----------------------------------------------------------------------

    async def _list(self) -> list[Any]:
        client = await self._connected()
        found: list[Any] = []
        seen: set[str] = set()
        try:
            async with asyncio.timeout(seconds := self.server.connect_timeout):
                page = await client.list_tools()
                found += page.tools
                while cursor := page.next_cursor:
                    if cursor in seen:
                        raise ConnectionError(f"its list of tools never ends: {cursor!r} again")
                    seen.add(cursor)
                    page = await client.list_tools(cursor=cursor)
                    found += page.tools
        except TimeoutError as error:
            self._drop(client)
            raise ConnectionError(f"it did not list its tools in {seconds:g} seconds") from error
        return found

    async def _call(self, tool: str, arguments: dict[str, Any], timeout: float) -> Any:
        client = await self._connected()  # the time limit excludes the start
        try:
            async with asyncio.timeout(timeout):
                result = await client.call_tool(tool, arguments)
        except TimeoutError:
            self._num_timeouts += 1
            if self._num_timeouts >= MAX_TIMEOUTS:
                self._drop(client)
            raise
        except Exception as error:
            if not _is_answer(error):
                self._drop(client)
            raise
        self._num_timeouts = 0
        return result

    async def _connected(self) -> Any:
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:
            if self._client is None:
                ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                self._stop, self._num_timeouts = asyncio.Event(), 0
                self._keeper = asyncio.create_task(self._keep(ready, self._stop))
                try:
                    async with asyncio.timeout(seconds := self.server.connect_timeout):
                        self._client = await ready
                except TimeoutError as error:
                    self._keeper.cancel()
                    raise ConnectionError(f"not up within {seconds:g} seconds") from error
                except BaseException:
                    self._keeper.cancel()
                    raise
                self.num_starts += 1
            return self._client

    async def _keep(self, ready: asyncio.Future[Any], stop: asyncio.Event) -> None:
        """Holds a session open within one task, as its cancel scopes require."""
        try:
            async with _client(self.server) as client:
                ready.set_result(client)
                await stop.wait()
        except Exception as error:  # the server's end of it, or ours when it ended first
            if not ready.done():
                ready.set_exception(error)

    def _drop(self, client: Any) -> None:
        """Discards a session that no longer works; the next call opens a new one."""
        if self._client is client:
            self._client = None
            self._stop.set()

    async def _close(self) -> None:
        keeper = self._keeper
        self._drop(self._client)
        if keeper is not None:
            await asyncio.wait({keeper}, timeout=10)


class McpTool:
    """A tool of a server, as ``Tool``."""

    returns = str

    def __init__(self, connection: Connection, tool: Any) -> None:
        self._connection = connection
        self._parameters: dict[str, Any] = tool.input_schema
        self.name: str = tool.name
        # The order of calls does not matter to a tool that only reads.
        self.parallel = bool(getattr(tool.annotations, "read_only_hint", False))
        self.description: str = tool.description or ""
        self.timeout = connection.server.timeout
        self.failure = FailurePolicy()
        key = (Health, connection.name, connection.server.model_dump_json(), self.name)
        self.health = shared(key, Health)  # one for all episodes, however many servers they have
        self._validator = checker_of(self._parameters)

    @property
    def schema(self) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {}, **strip_titles(self._parameters)}
        parameters.pop("$schema", None)
        if isinstance(parameters.get("additionalProperties"), bool):
            del parameters["additionalProperties"]  # says nothing that a model needs
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def check(self, call: ToolCall) -> ToolResult | None:
        """The failed result for arguments that break the tool's own schema; if the schema cannot be
        used, the server checks them.
        """
        if self._validator is None:
            return None
        try:
            problems = [
                f"{'.'.join(map(str, error.path)) or self.name}: {error.message[:200]}"
                for error in self._validator(call.arguments)
            ]
        except Exception:  # a reference to nowhere, a recursion without end
            return None
        if not problems:
            return None
        return ToolResult(call, error="invalid_arguments", detail="; ".join(problems))

    async def run(self, call: ToolCall, timeout: float | None = None) -> ToolResult:
        """Calls the server. Never raises an ``Exception``."""
        seconds = self.timeout if timeout is None else timeout
        try:
            arguments = clean_json(call.arguments)
            result = await self._connection.call(self.name, arguments, seconds)
        except TimeoutError:
            detail = f"{self.name} gave no result within {seconds:g} seconds"
            return ToolResult(call, error="timeout", detail=detail)
        except Exception as error:  # whatever the transport raises
            if _is_answer(error):
                # An answer that the client does not accept is not the agent's mistake.
                said_no = not isinstance(error, RuntimeError | ValueError)
                kind: ToolError = self._connection.server.is_error if said_no else "exception"
                return ToolResult(call, error=kind, detail=f"{self.name}: {_in_words(error)}")
            detail = f"{self.name}: the server is gone: {_in_words(error)}"
            return ToolResult(call, error="crash", detail=detail)
        text, unshown = _text_of(result)
        if result.is_error:
            text = text or f"{self.name} failed and did not say why"
            return ToolResult(call, error=self._connection.server.is_error, detail=text)
        events = (f"fault/not_text:{self.name}",) if unshown else ()
        return ToolResult(call, value=text, events=events)


def _is_answer(error: BaseException) -> bool:
    """Whether the server answered, with an error or in a form the client does not accept."""
    from mcp import MCPError
    from mcp_types import CONNECTION_CLOSED

    if isinstance(error, MCPError):
        return error.error.code != CONNECTION_CLOSED
    return isinstance(error, RuntimeError | ValueError)


def _in_words(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):  # of the transport's own tasks
        error = error.exceptions[0]
    if isinstance(error, ValidationError):  # of what a server sent
        found = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
    said = str(error)
    for value, reference in EXPANDED.items():
        said = said.replace(value, reference)
    return f"{type(error).__name__}: {said[:200]}".rstrip(": ")


def _text_of(result: Any) -> tuple[str, bool]:
    """A result's contents as text, and whether some of them are not text."""
    texts = [_shown(content) for content in result.content]
    shown = [text for text in texts if text is not None]
    structured = getattr(result, "structured_content", None)
    if not any(shown) and structured is not None:
        shown = [as_text(structured)]
    kinds = [c.type for c, text in zip(result.content, texts, strict=True) if text is None]
    return clean("\n".join([*shown, *(f"[not text: {kind}]" for kind in kinds)])), bool(kinds)


def _shown(content: Any) -> str | None:
    """One content: its text or its link; ``None`` if neither."""
    if content.type == "text":
        return str(content.text)
    if content.type == "resource":
        text = getattr(content.resource, "text", None)
        return None if text is None else str(text)
    if content.type == "resource_link":
        words = (content.title or content.name, str(content.uri), content.description)
        return " ".join(word for word in words if word)
    return None


@asynccontextmanager
async def _client(server: McpServer) -> AsyncIterator[Any]:
    """An open session."""
    from mcp import Client
    from mcp.client.stdio import StdioServerParameters, stdio_client
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared._httpx_utils import create_mcp_http_client

    if server.command:
        command, *args = server.command
        command = sys.executable if command == "python" else command
        variables = server.expanded(server.env)
        parameters = StdioServerParameters(command=command, args=args, env=variables)
        async with Client(stdio_client(parameters)) as client:
            yield client
        return
    async with (
        create_mcp_http_client(headers=server.expanded(server.headers)) as http,
        Client(streamable_http_client(server.expanded_url(), http_client=http)) as client,
    ):
        yield client


class _OneLine(logging.Handler):
    """Prints each message of the SDK's log once, as one line instead of a traceback."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if said in self._seen or len(self._seen) >= MAX_LOGGED:
            return
        self._seen.add(said)
        error = record.exc_info[1] if record.exc_info else None
        why = f" ({_in_words(error)})" if error is not None else ""
        print(f"mcp: {clean(said + why):.300} (repeats are not shown)", file=sys.stderr)


def _tame_log() -> None:
    logger = logging.getLogger("mcp")
    if not any(isinstance(handler, _OneLine) for handler in logger.handlers):
        logger.addHandler(_OneLine())
        logger.propagate = False


class _Thread:
    """The servers' own event loop, in a thread of its own: they are served while the run learns."""

    def __init__(self) -> None:
        _tame_log()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._thread.ident is None:
            self._thread.start()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def close(self) -> None:
        if self._loop.is_closed():
            return
        if self._thread.ident is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(1.0)
        if not self._thread.is_alive():
            self._loop.close()


def connect(servers: Mapping[str, McpServer]) -> list[Connection]:
    """A connection to each server, opened when it is first used; one that serves the whole run is
    closed with it.
    """
    if servers and importlib.util.find_spec("mcp") is None:
        raise ConfigError("env.mcp needs the package: pip install 'agent-r1[mcp]'")
    return [_connection(name, server) for name, server in servers.items()]


def _connection(name: str, server: McpServer) -> Connection:
    make = functools.partial(Connection, name, server)
    if server.per == "episode":
        return make()
    return shared((Connection, name, server.model_dump_json()), make)
