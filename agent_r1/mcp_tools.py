"""Tools of MCP servers, in any tool environment.

    [env.mcp.search]
    command = ["python", "server.py"]       # a process of ours, spoken to by stdio
    # or: url = "http://localhost:8000/mcp"   (streamable HTTP)

A server is connected to when the first episode needs it and serves all of them; it lives in a
thread with an event loop of its own. A server that has died is started
again, or connected to again, by the next call; calls that were under way are a ``crash`` that the
agent sees, or what the tool's failure policy says. Needs the extra ``agent-r1[mcp]``.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import importlib.util
import logging
import os
import re
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, Self, TypeVar
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, ValidationError, model_validator

from agent_r1.config import ConfigError, Section, nearest
from agent_r1.failure import FailurePolicy, Health
from agent_r1.text import as_text, clean, clean_json, printable
from agent_r1.tools import ToolError, ToolResult, strip_titles
from agent_r1.types import ToolCall

T = TypeVar("T")
_REACHED: set[tuple[str, str]] = set()
"""Servers that have answered in this process."""
_SECRET = re.compile(
    r"(^|[_-])(api_?key|key|token|secret|password|passwd|passphrase|pass|pwd|pat|auth|access"
    r"|credentials?|authorization|cookie|bearer)([_-]|$)|(password|passwd|secret|token|apikey)$",
    re.IGNORECASE,
)
"""Names of what is likely to be one, if it is at least so long:"""
SECRET_LENGTH = 8
_KNOWN_SECRET = re.compile(
    r"\b(sk-|ghp_|github_pat_|glpat-|xox[bp]-|hf_|AKIA)[\w-]{8,}|://[^/\s:@]*:[^/\s@]+@"
)
"""What has the form of one, under whatever name; the last is a password in a URL."""
_expanded: dict[str, str] = {}
"""What stood for a reference to our environment, and the reference: no message shows it."""
MAX_KEYWORDS = 2_000
"""Of a schema, to check the arguments of one call; beyond them it is left to the server."""
_REFERENCE = re.compile(r"\$\$|\$(\w+)|\$\{(\w+)\}")
MAX_LOGGED = 20
"""Lines of the SDK's log."""
_BRANCHING = ("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if")
PATTERN_SECONDS = 0.05
"""For one pattern of a schema."""
MAX_TIMEOUTS = 3
"""In a row, after which a server is taken to hang and is started again."""


class McpServer(Section):
    """One server.

    Attributes:
        command: Starts it, to be spoken to by stdio; ``python`` is the one that runs us. ``env``:
            its environment variables besides ``PATH``, ``HOME`` and the like; it inherits no other.
        url: Where it listens (streamable HTTP); ``headers`` go with every request.
            In ``env``, ``headers`` and ``url``, ``$NAME`` or ``${NAME}`` stands for an environment
            variable of ours (``$$`` for a ``$``): so a secret is not stored with the run.
        tools: Those that the agent gets; by default all.
        timeout: Seconds for one call.
        connect_timeout: Seconds until it must be up, and again until it has listed its tools.
        per: One server for the whole ``run``, or one for each ``episode`` if it keeps a state.
        is_error: What a result means that the server marks as an error: a call that the agent
            should have written otherwise, or a failure of the server's.
    """

    command: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    url: str = ""
    headers: dict[str, str] = Field(default_factory=dict)
    tools: tuple[str, ...] = ()
    timeout: float = Field(30.0, gt=0)
    connect_timeout: float = Field(30.0, gt=0)
    per: Literal["run", "episode"] = "run"
    is_error: Literal["rejected", "exception"] = "rejected"

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.command) == bool(self.url):
            raise ValueError("give a command, or a url")
        for where, name, value in self._texts():
            clear = _REFERENCE.sub("", value)
            is_path = where.startswith("env.") and value.startswith(("/", "~", "."))
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
            named = _SECRET.search(name) and len(clear) >= SECRET_LENGTH and not is_path
            if named or _KNOWN_SECRET.search(clear):
                cure = "write '$NAME' here"
                if where.startswith("command"):
                    cure = "give it to the server in env, as '$NAME'"
                raise ValueError(
                    f"{where}: it looks like a secret, and what stands here is stored with the "
                    f"run; put it into an environment variable and {cure}"
                )
        return self

    def _texts(self) -> Iterator[tuple[str, str, str]]:
        """Where a text stands, what it is called there, and the text."""
        for table, values in (("env", self.env), ("headers", self.headers)):
            for name, value in values.items():
                yield f"{table}.{name}", name, value
        yield "url", "", self.url
        for name, value in parse_qsl(urlsplit(self.url).query):
            yield f"url ({name})", name, value
        for before, word in zip(("", *self.command), self.command, strict=False):
            option, is_one, value = word.partition("=")
            if is_one:
                yield f"command ({option})", option.lstrip("-"), value
            elif before.startswith("-") and "=" not in before:
                yield f"command ({before})", before.lstrip("-"), word
            else:
                yield "command", "", word

    def expanded(self, table: dict[str, str]) -> dict[str, str]:
        """``env`` or ``headers`` with our environment variables put in."""
        return {key: _REFERENCE.sub(_from_environment, text) for key, text in table.items()}

    def expanded_url(self) -> str:
        return _REFERENCE.sub(_from_environment, self.url)


def _from_environment(reference: re.Match[str]) -> str:
    if reference[0] == "$$":
        return "$"
    name = reference[1] or reference[2]
    if name not in os.environ:
        raise ConfigError(f"${name}: there is no such environment variable; export it")
    value = os.environ[name]
    if printable(value.replace("\n", "\r")) != value:
        raise ConfigError(
            f"${name}: it holds a line end or another control character, as of a file that was "
            "read whole; take that out"
        )
    if len(value) >= SECRET_LENGTH:
        _expanded[value] = reference[0]
    return value


class Connection:
    """A session with a server, opened when needed and opened again after it was lost.

    Attributes:
        num_starts: How often it was opened.
    """

    def __init__(self, name: str, server: McpServer) -> None:
        self.name, self.server = name, server
        self.num_starts = 0
        self._client: Any = None
        self._keeper: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._num_timeouts = 0
        self._lock: asyncio.Lock | None = None
        self._tools: list[McpTool] | None = None

    async def tools(self) -> list[McpTool]:
        """What the server offers, asked once.

        Raises:
            ConfigError: It cannot be reached, or has no tool of a name that was asked for.
        """
        if self._tools is None:
            server = self.name, self.server.model_dump_json()
            try:
                listed = await _elsewhere(self._list())
            except ConfigError as error:
                raise ConfigError(f"env.mcp.{self.name}: {error}") from error
            except Exception as error:  # whatever the transport raises
                if server in _REACHED:
                    raise  # a fault of this episode alone
                where = self.server.url or " ".join(self.server.command)
                cure = "does it run by hand?" if self.server.command else "does it listen there?"
                if isinstance(error, ValidationError):
                    cure = "its list of tools is not as the protocol wants it: mend that there"
                raise ConfigError(
                    f"env.mcp.{self.name}: {where!r}: {_in_words(error)}; {cure}"
                ) from error
            _REACHED.add(server)
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
        return await _elsewhere(self._call(tool, arguments, timeout))

    async def close(self) -> None:
        await _elsewhere(self._close())

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
        client = await self._connected()  # starting it is not the call's time
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
        """Holds a session open from within one task, as its scopes require."""
        try:
            async with _client(self.server) as client:
                ready.set_result(client)
                await stop.wait()
        except Exception as error:  # the server's end of it, or ours when it ended first
            if not ready.done():
                ready.set_exception(error)

    def _drop(self, client: Any) -> None:
        """Lets a session go that is no good any more; the next call opens another."""
        if self._client is client:
            self._client = None
            self._stop.set()

    async def _close(self) -> None:
        keeper = self._keeper
        self._drop(self._client)
        if keeper is not None:
            await asyncio.wait({keeper}, timeout=10)


class McpTool:
    """A tool of a server, as ``AnyTool``."""

    returns = str

    def __init__(self, connection: Connection, tool: Any) -> None:
        self._connection = connection
        self._parameters: dict[str, Any] = tool.input_schema
        self.name: str = tool.name
        # A server that only reads does not care for the order of its calls.
        self.parallel = bool(getattr(tool.annotations, "read_only_hint", False))
        self.description: str = tool.description or ""
        self.timeout = connection.server.timeout
        self.failure = FailurePolicy()
        self.health = _health(connection.name, connection.server.model_dump_json(), self.name)
        self._validator = _validator(self._parameters)

    @property
    def schema(self) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {}, **strip_titles(self._parameters)}
        parameters.pop("$schema", None)
        if isinstance(parameters.get("additionalProperties"), bool):
            del parameters["additionalProperties"]  # says nothing that a model needs
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def check(self, call: ToolCall) -> ToolResult | None:
        """What is wrong with the arguments by the tool's own schema; a schema that cannot be used
        leaves that to the server.
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
                # What the client does not accept of the server's is not the agent's mistake.
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
    """Whether the server is there and has said no, or what the client does not accept."""
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
    for value, reference in _expanded.items():
        said = said.replace(value, reference)
    return f"{type(error).__name__}: {said[:200]}".rstrip(": ")


@functools.cache
def _health(server: str, settings: str, tool: str) -> Health:
    """One for all episodes, however many servers they have."""
    return Health()


def _validator(schema: dict[str, Any]) -> Any:
    """What checks arguments by a schema; ``None`` for one that is not valid itself. It reaches for
    nothing outside the schema, and a pattern has a time limit.
    """
    import jsonschema
    import referencing

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema, format_checker=jsonschema.FormatChecker(()))
    except Exception:  # its author's mistake, in whatever form
        return None
    known = kind.VALIDATORS
    left = [MAX_KEYWORDS]
    limited = jsonschema.validators.extend(
        kind,
        {
            **{name: _counted(known[name], left) for name in _BRANCHING if name in known},
            "pattern": _pattern,
            "patternProperties": lambda *_: (),
            **{
                name: _unless_patterns(known[name])
                for name in ("additionalProperties", "unevaluatedProperties")
                if name in known
            },
        },
    )
    checker = limited(schema, registry=referencing.Registry())

    def problems(arguments: Any) -> Iterator[Any]:
        left[0] = MAX_KEYWORDS
        yield from checker.iter_errors(arguments)

    return problems


def _counted(check: Any, left: list[int]) -> Any:
    """A keyword that leads to other schemas, which may lead to others in turn, two from each."""

    def limited(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RecursionError("a schema that takes too long")
        return check(validator, value, instance, schema)

    return limited


def _unless_patterns(check: Any) -> Any:
    """A check of further properties, left to the server where patterns say which are further."""

    def limited(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        return () if "patternProperties" in schema else check(validator, value, instance, schema)

    return limited


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
    import jsonschema
    import regex

    if isinstance(value, str):
        with contextlib.suppress(regex.error, TimeoutError):  # then the server decides
            if regex.search(pattern, value, timeout=PATTERN_SECONDS) is None:
                yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _text_of(result: Any) -> tuple[str, bool]:
    """A result's contents as text, and whether something in it is none."""
    texts = [_shown(content) for content in result.content]
    shown = [text for text in texts if text is not None]
    structured = getattr(result, "structured_content", None)
    if not any(shown) and structured is not None:
        shown = [as_text(structured)]
    kinds = [c.type for c, text in zip(result.content, texts, strict=True) if text is None]
    return clean("\n".join([*shown, *(f"[not text: {kind}]" for kind in kinds)])), bool(kinds)


def _shown(content: Any) -> str | None:
    """One content: its text, or where it is to be had."""
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
    """What the SDK logs of a server, each thing once and in a line instead of a traceback."""

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


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The servers' own event loop, in a thread of its own."""
    _tame_log()
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="mcp", daemon=True).start()
    return loop


async def _elsewhere(work: Coroutine[Any, Any, T]) -> T:
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, _loop()))


@functools.cache
def shared(name: str, server_json: str) -> Connection:
    """The one connection of a run to a server."""
    connection = Connection(name, McpServer.model_validate_json(server_json))
    atexit.register(
        lambda: asyncio.run_coroutine_threadsafe(connection._close(), _loop()).result(15)
    )
    return connection


def connect(servers: Mapping[str, McpServer]) -> list[Connection]:
    """A connection to each server, opened when it is first used."""
    if servers and importlib.util.find_spec("mcp") is None:
        raise ConfigError("env.mcp needs the package: pip install 'agent-r1[mcp]'")
    return [
        shared(name, server.model_dump_json()) if server.per == "run" else Connection(name, server)
        for name, server in servers.items()
    ]
