"""Tools: typed functions that a model can call. A tool says what happened; what it means is the
environment's business.

    @tool(timeout=5)
    def search(query: str, k: int = 3) -> list[str]:
        '''Find documents.

        Args:
            query: What to look for.
            k: How many documents to return.
        '''

The schema the model reads comes from the signature and the Google-style docstring. Arguments are
validated by pydantic. Nothing a tool does can raise here: every way to fail is a ``ToolResult``
with an ``error``. A call that the agent should have written otherwise, the tool's author rejects
with ``CallError``; every other exception is the tool's own failure.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, overload

import cloudpickle
import docstring_parser
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo

from agent_r1.failure import FailurePolicy, Health
from agent_r1.types import MalformedCall, ToolCall

ToolError = Literal[
    "malformed_call",
    "unknown_tool",
    "invalid_arguments",
    "rejected",
    "exception",
    "timeout",
    "crash",
    "unavailable",
]
"""Every way in which a call can fail, by name; the first four are the agent's own mistakes."""
AGENT_ERRORS = ("malformed_call", "unknown_tool", "invalid_arguments", "rejected")


class CallError(Exception):
    """Raised by a tool for a call that the agent should have written otherwise: a name that does
    not exist, a query that is not valid. The agent sees the message; it counts as its mistake.
    """


@dataclass(slots=True, frozen=True)
class ToolResult:
    """What happened when a call was run.

    Attributes:
        call: The call as the agent wrote it.
        value: What the tool returned; ``None`` when it failed.
        error: How it failed, or ``None``.
        detail: The failure in words that the agent can act on.
        events: All that went wrong on the way, earlier tries included: ``"fault/timeout:search"``,
            ``"mistake/unknown_tool"``, ``"noise/drop:search"``.
    """

    call: ToolCall | MalformedCall
    value: Any = None
    error: ToolError | None = None
    detail: str = ""
    events: tuple[str, ...] = ()

    @property
    def by_agent(self) -> bool:
        """Whether it failed by the agent's own mistake."""
        return self.error in AGENT_ERRORS


class AnyTool(Protocol):
    """What is needed of a tool to offer it and to run it: a ``Tool``, or one of another process.

    Attributes:
        name: As the model writes it.
        schema: As OpenAI-style JSON schema.
        timeout: Seconds until a call is given up, unless the policy says otherwise.
        failure: What happens when it fails.
        health: What is known of it, over all episodes.
        returns: The type of its results, ``Any`` if unknown.
    """

    name: str
    timeout: float
    failure: FailurePolicy
    health: Health
    returns: Any

    @property
    def schema(self) -> dict[str, Any]: ...

    def check(self, call: ToolCall) -> ToolResult | None:
        """The mistake in the call, if there is one; the tool is not run."""
        ...

    async def run(self, call: ToolCall, timeout: float | None = None) -> ToolResult:
        """Runs a call. Never raises an ``Exception``."""
        ...


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class Tool:
    """A function with a schema, a time limit and a way to run it. Use the ``@tool`` decorator to
    make one.

    Attributes:
        name: The function's name.
        description: The docstring without its sections.
        timeout: Seconds until a call is given up.
        isolated: Run each call in a process of its own, which is killed on time-out.
        failure: What happens when it fails.
        health: Shared by all episodes; ``health.hanging`` counts the calls of a synchronous tool
            that ran into the time limit and whose threads, which cannot be killed, still run.
        returns: What the function is annotated to return.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        timeout: float = 30.0,
        isolated: bool = False,
        failure: FailurePolicy | None = None,
    ) -> None:
        if timeout <= 0:
            raise ValueError(f"tool {fn.__name__!r}: timeout must be > 0 seconds, got {timeout}")
        if isolated and inspect.iscoroutinefunction(fn):
            raise ValueError(
                f"tool {fn.__name__!r}: isolated=True is for synchronous functions; "
                "drop it or 'async'"
            )
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.name = fn.__name__
        self.timeout = timeout
        self.isolated = isolated
        self.failure = failure or FailurePolicy()
        self.health = Health()
        self.returns = inspect.signature(fn, eval_str=True).return_annotation
        if self.returns is inspect.Signature.empty:
            self.returns = Any
        self._owner: Any = None
        doc = docstring_parser.parse(
            inspect.getdoc(fn) or "", docstring_parser.DocstringStyle.GOOGLE
        )
        parts = (doc.short_description, doc.long_description)
        self.description = "\n\n".join(part for part in parts if part)
        if not self.description:
            raise ValueError(f"tool {self.name!r} has no docstring; it is what the model reads")
        self._arguments = _arguments_model(fn, {p.arg_name: p.description for p in doc.params})

    def __get__(self, owner: Any, owner_type: type | None = None) -> Tool:
        """A tool defined in a class body is bound to the instance, like a method."""
        if owner is None:
            return self
        bound = object.__new__(Tool)
        bound.__dict__.update(self.__dict__)
        bound._owner = owner
        owner.__dict__[self.name] = bound
        return bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The plain function, for code that is not a model."""
        return self.fn(*self._self_args(), *args, **kwargs)

    def _self_args(self) -> tuple[Any, ...]:
        return () if self._owner is None else (self._owner,)

    @property
    def schema(self) -> dict[str, Any]:
        """The function as OpenAI-style JSON schema, which chat templates expect."""
        parameters = {"type": "object", **strip_titles(self._arguments.model_json_schema())}
        parameters.pop("additionalProperties", None)
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def check(self, call: ToolCall) -> ToolResult | None:
        """What is wrong with the arguments, if anything."""
        try:
            self._arguments.model_validate(call.arguments)
        except ValidationError as error:
            return ToolResult(call, error="invalid_arguments", detail=_explain(error))
        return None

    async def run(self, call: ToolCall, timeout: float | None = None) -> ToolResult:
        """Validates the arguments and runs the function within the time limit. Never raises an
        ``Exception``.
        """
        if (wrong := self.check(call)) is not None:
            return wrong
        model = self._arguments.model_validate(call.arguments)
        arguments = {name: getattr(model, name) for name in type(model).model_fields}
        seconds = self.timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds) as limit:
                return ToolResult(call, value=await self._call(arguments))
        except _CrashError as error:
            return ToolResult(call, error="crash", detail=f"{self.name} {error}")
        except (asyncio.CancelledError, SystemExit) as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the episode is being cancelled; else it is the tool's own doing
            return ToolResult(call, error="exception", detail=type(error).__name__)
        except CallError as error:
            return ToolResult(call, error="rejected", detail=str(error))
        except Exception as error:  # whatever the tool's author raises is an observation
            if not limit.expired():  # a TimeoutError may also be the tool's own
                detail = f"{type(error).__name__}: {error}"
                return ToolResult(call, error="exception", detail=detail)
        detail = f"{self.name} gave no result within {seconds:g} seconds"
        return ToolResult(call, error="timeout", detail=detail)

    async def _call(self, arguments: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self.fn):
            return await self.fn(*self._self_args(), **arguments)
        call = functools.partial(self.fn, *self._self_args(), **arguments)
        if self.isolated:
            return await _in_process(call)
        return await in_thread(call, self.name, hangs=self.health.hangs)


class _CrashError(Exception):
    """The process of an isolated tool ended without a result."""


class _RemoteError(Exception):
    """An exception raised in the process of an isolated tool; shown under its own name."""


async def in_thread(
    call: Callable[[], Any], name: str, hangs: Callable[[int], None] = lambda by: None
) -> Any:
    """Runs ``call`` in a daemon thread. Cancelling abandons the thread, which a pool would wait
    for at exit; ``hangs`` is told so with 1, and with -1 when the thread comes to its end.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()
    lock, state = threading.Lock(), {"ended": False, "given up": False}

    def mark(what: str) -> bool:
        """Notes one of the two and says whether the other was there before."""
        with lock:
            state[what] = True
            return all(state.values())

    def settle(value: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            future.set_exception(error)
        else:  # SystemExit and the like must not end the run
            future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))

    def target() -> None:
        value, error = None, None
        try:
            value = context.run(call)
        except BaseException as caught:  # handed over, not swallowed
            error = caught
        if mark("ended"):
            hangs(-1)
        if not loop.is_closed():
            try:
                loop.call_soon_threadsafe(settle, value, error)
            except RuntimeError:
                return  # the loop closed meanwhile: nobody waits for an abandoned call

    threading.Thread(target=target, name=f"tool-{name}", daemon=True).start()
    try:
        return await future
    except asyncio.CancelledError:
        hangs(1)
        if mark("given up"):
            hangs(-1)
        raise


async def _in_process(call: Callable[[], Any]) -> Any:
    """Runs ``call`` in a fresh Python process (``agent_r1.isolated``) that is killed when we stop
    waiting.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "agent_r1.isolated",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        output, _ = await process.communicate(
            cloudpickle.dumps((sys.path, cloudpickle.dumps(call)))
        )
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0 or not output:
        raise _CrashError(f"ended with exit code {process.returncode}")
    ok, value = cloudpickle.loads(output)
    if ok:
        return value
    name, text, rejected = value
    if rejected:
        raise CallError(text)
    raise type(name, (_RemoteError,), {})(text)


@overload
def tool(fn: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *, timeout: float = ..., isolated: bool = ..., failure: FailurePolicy | None = ...
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    timeout: float = 30.0,
    isolated: bool = False,
    failure: FailurePolicy | None = None,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Makes a function, or a method of an environment, callable by the model; see the module's
    docstring.
    """
    if fn is not None:
        return Tool(fn)
    return functools.partial(Tool, timeout=timeout, isolated=isolated, failure=failure)


def _arguments_model(
    fn: Callable[..., Any], descriptions: dict[str, str | None]
) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    parameters = list(inspect.signature(fn, eval_str=True).parameters.values())
    if parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    for parameter in parameters:
        where = f"tool {fn.__name__!r}, parameter {parameter.name!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"{where}: a model cannot fill *args or **kwargs; name each argument")
        if parameter.annotation is parameter.empty:
            raise ValueError(f"{where}: has no type annotation, so there is no schema for it")
        default = ... if parameter.default is parameter.empty else parameter.default
        info: FieldInfo = FieldInfo(default=default, description=descriptions.get(parameter.name))
        fields[parameter.name] = (parameter.annotation, info)
    model: type[BaseModel] = create_model(fn.__name__, __base__=_Arguments, **fields)
    return model


def strip_titles(schema: Any) -> Any:
    """Drops pydantic's generated titles, which cost prompt tokens and say nothing."""
    if isinstance(schema, list):
        return [strip_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: strip_titles(sub) for name, sub in value.items()}
        if key in ("properties", "$defs")
        else strip_titles(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }


def _explain(error: ValidationError) -> str:
    problems = []
    for item in error.errors(include_url=False):
        where = ".".join(map(str, item["loc"]))
        given = "" if item["type"] == "missing" else f" (got {item['input']!r:.80})"
        problems.append(f"{where}: {item['msg']}{given}")
    return "; ".join(problems)
