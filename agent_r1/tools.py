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
import contextlib
import copy
import dataclasses
import functools
import inspect
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, overload

import cloudpickle
import docstring_parser
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticUserError,
    ValidationError,
    create_model,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import PydanticJsonSchemaWarning

from agent_r1.failure import FailurePolicy, Health
from agent_r1.text import clean, describe
from agent_r1.types import MalformedCall, ToolCall
from agent_r1.waiting import EPISODE_THREAD, ExpiredError, in_thread, within

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
        parallel: Whether its calls of one turn may run at the same time, in any order.
    """

    name: str
    timeout: float
    parallel: bool
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
        parallel: Run it beside other such calls of the same turn. Else the calls of a turn run in
            the order written, and those of plain functions in the one thread of their episode.
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
        parallel: bool = False,
        failure: FailurePolicy | None = None,
    ) -> None:
        if isinstance(fn, staticmethod | classmethod):
            raise ValueError(
                "@tool goes on a plain function or method, not on a static or class one"
            )
        written = _written(fn)
        named: Any = fn
        while isinstance(named, functools.partial):
            named = named.func
        self.name: str = getattr(named, "__name__", type(named).__name__)
        if timeout <= 0:
            raise ValueError(f"tool {self.name!r}: timeout must be > 0 seconds, got {timeout}")
        self.is_async = inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(written)
        if isolated and self.is_async:
            raise ValueError(
                f"tool {self.name!r}: isolated=True is for synchronous functions; "
                "drop it or 'async'"
            )
        if inspect.isgeneratorfunction(written) or inspect.isasyncgenfunction(written):
            raise ValueError(
                f"tool {self.name!r}: it yields its result bit by bit; a model reads one result: "
                "return it whole"
            )
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.timeout = timeout
        self.isolated = isolated
        self.parallel = parallel
        self.failure = failure or FailurePolicy()
        self.health = Health()
        self.returns = _signature(fn, self.name).return_annotation
        if self.returns is inspect.Signature.empty:
            self.returns = Any
        self._owner: Any = None
        docstring = inspect.getdoc(written)
        if docstring is None and not inspect.isroutine(fn):
            docstring = inspect.getdoc(type(fn))  # of an object that can be called
        doc = docstring_parser.parse(docstring or "", docstring_parser.DocstringStyle.GOOGLE)
        parts = (doc.short_description, doc.long_description)
        self.description = "\n\n".join(part for part in parts if part)
        if not self.description:
            raise ValueError(f"tool {self.name!r} has no docstring; it is what the model reads")
        descriptions = {p.arg_name: p.description for p in doc.params if p.description}
        self._arguments = _arguments_model(fn, self.name, descriptions)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", PydanticJsonSchemaWarning)
                parameters = strip_titles(self._arguments.model_json_schema())
        except (PydanticUserError, PydanticJsonSchemaWarning) as error:
            raise ValueError(
                f"tool {self.name!r}: there is no JSON schema for a parameter or its default, so a "
                f"model cannot fill it: {error}"
            ) from error
        self._parameters = {"type": "object", **parameters}
        self._parameters.pop("additionalProperties", None)

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
        parameters = copy.deepcopy(self._parameters)
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def check(self, call: ToolCall) -> ToolResult | None:
        """What is wrong with the arguments, if anything."""
        valid = self._validated(call)
        return valid if isinstance(valid, ToolResult) else None

    def _validated(self, call: ToolCall) -> BaseModel | ToolResult:
        try:
            return self._arguments.model_validate(call.arguments)
        except ValidationError as error:
            return ToolResult(call, error="invalid_arguments", detail=_explain(error))

    async def run(self, call: ToolCall, timeout: float | None = None) -> ToolResult:
        """Validates the arguments and runs the function within the time limit. Never raises an
        ``Exception``.
        """
        model = self._validated(call)
        if isinstance(model, ToolResult):
            return model
        arguments = {name: getattr(model, name) for name in type(model).model_fields}
        seconds = self.timeout if timeout is None else timeout
        try:
            value = await within(
                seconds, functools.partial(self._call, arguments), self.health.hangs
            )
            return ToolResult(call, value=value)
        except ExpiredError:
            detail = f"{self.name} gave no result within {seconds:g} seconds"
            return ToolResult(call, error="timeout", detail=detail)
        except _CrashError as error:
            return ToolResult(call, error="crash", detail=f"{self.name} {error}")
        except CallError as error:
            return ToolResult(call, error="rejected", detail=clean(str(error)))
        except Exception as error:  # whatever the tool's author raises is an observation
            return ToolResult(call, error="exception", detail=describe(error))

    @property
    def needs_thread(self) -> bool:
        """Whether it is plain code, which runs in the thread of its episode."""
        return not (self.is_async or self.isolated or self.parallel)

    async def _call(self, arguments: dict[str, Any]) -> Any:
        call = functools.partial(self.fn, *self._self_args(), **arguments)
        if self.is_async:
            return await call()
        if self.isolated:
            return await _in_process(call)
        thread = EPISODE_THREAD.get()
        if thread is None or self.parallel:
            value = await in_thread(call, f"tool-{self.name}", self.health.hangs)
        else:
            value = await thread.run(call, self.health.hangs)
        # A plain wrapper round an asynchronous function gives something to wait for.
        return await value if inspect.isawaitable(value) else value


class _CrashError(Exception):
    """The process of an isolated tool ended without a result."""


class _RemoteError(Exception):
    """An exception raised in the process of an isolated tool; shown under its own name."""


async def _in_process(call: Callable[[], Any]) -> Any:
    """Runs ``call`` in a fresh Python process (``agent_r1.isolated``) that is killed when we stop
    waiting.
    """
    start = f"import sys; sys.path[:] = {sys.path!r}; from agent_r1.isolated import main; main()"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # what lies in the current folder is not to be imported
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
        # Not to the end of the stream: what the tool leaves running may hold it open.
        size = int.from_bytes(await process.stdout.readexactly(8), "big")
        output = await process.stdout.readexactly(size)
    except asyncio.IncompleteReadError as error:
        await process.wait()
        raise _CrashError(f"ended with exit code {process.returncode}") from error
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


@overload
def tool(fn: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *,
    timeout: float = ...,
    isolated: bool = ...,
    parallel: bool = ...,
    failure: FailurePolicy | None = ...,
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    timeout: float = 30.0,
    isolated: bool = False,
    parallel: bool = False,
    failure: FailurePolicy | None = None,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Makes a function, or a method of an environment, callable by the model. The schema that the
    model reads comes from the signature (pydantic's ``Field`` as default or in ``Annotated``
    included) and the Google-style docstring.

    Args:
        fn: The function; sync or async. What it returns is shown to the agent as text.
        timeout: Seconds until a call is given up; the agent then sees that.
        isolated: Run each call in a process of its own, which is killed on time-out.
        parallel: Let it run beside other such calls of the same turn. By default the calls of a
            turn run in the order written, those of plain functions in one thread an episode.
        failure: What happens when it fails; by default the agent sees it.

    Raises:
        ValueError: The function has no docstring, or a parameter that a model cannot fill.
    """
    if fn is not None:
        return Tool(fn)
    return functools.partial(
        Tool, timeout=timeout, isolated=isolated, parallel=parallel, failure=failure
    )


def _written(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function that somebody wrote, below ``functools.partial`` and callable objects."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if not (inspect.isroutine(fn) or inspect.isclass(fn)):
        return type(fn).__call__
    return fn


def _signature(fn: Callable[..., Any], name: str) -> inspect.Signature:
    try:
        return inspect.signature(fn, eval_str=True)
    except NameError as error:
        raise ValueError(f"tool {name!r}: an annotation cannot be resolved: {error}") from error


def _arguments_model(
    fn: Callable[..., Any], name: str, descriptions: dict[str, str]
) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    parameters = list(_signature(fn, name).parameters.values())
    if parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    for parameter in parameters:
        where = f"tool {name!r}, parameter {parameter.name!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"{where}: a model cannot fill *args or **kwargs; name each argument")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"{where}: it is positional-only, and a model names its arguments; drop the '/'"
            )
        if parameter.annotation is parameter.empty:
            raise ValueError(f"{where}: has no type annotation, so there is no schema for it")
        if parameter.name.startswith(("_", "model_")) and hasattr(BaseModel, parameter.name):
            raise ValueError(f"{where}: pydantic uses that name for itself; choose another")
        if parameter.name.startswith("_"):
            raise ValueError(f"{where}: a name with '_' in front is private; choose another")
        if isinstance(parameter.default, dataclasses.Field):
            raise ValueError(f"{where}: dataclasses.field is no default; use pydantic's Field")
        fields[parameter.name] = _field(parameter, descriptions.get(parameter.name))
        try:
            create_model(name, __base__=_Arguments, **{parameter.name: fields[parameter.name]})
        except (NameError, TypeError, ValueError, PydanticUserError) as error:
            raise ValueError(f"{where}: {str(error).splitlines()[0]}") from error
    model: type[BaseModel] = create_model(name, __base__=_Arguments, **fields)
    return model


def _field(parameter: inspect.Parameter, described: str | None) -> tuple[Any, Any]:
    """A parameter as pydantic's field. Its description is the docstring's, else the one that
    ``Field`` or a text in ``Annotated`` gives.
    """
    annotation, default = parameter.annotation, parameter.default
    texts = [item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, str)]
    fields = [i for i in getattr(annotation, "__metadata__", ()) if isinstance(i, FieldInfo)]
    has_description = any(field.description for field in fields)
    description = described or (texts[0] if texts and not has_description else None)
    if isinstance(default, FieldInfo):
        if description is not None:
            default = FieldInfo.merge_field_infos(default, description=description)
        return annotation, default
    if description is not None:
        annotation = Annotated[annotation, Field(description=description)]
    return annotation, ... if default is parameter.empty else default


def strip_titles(schema: Any) -> Any:
    """Drops pydantic's generated titles, which cost prompt tokens and say nothing."""
    if isinstance(schema, list):
        return [strip_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: strip_titles(sub) for name, sub in value.items()}
        if key in ("properties", "$defs")
        else value
        if key in ("default", "const", "enum", "examples")
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
