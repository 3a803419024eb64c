"""Tools: typed functions that a model can call. A tool says what happened; the environment
decides what that means.

    @tool(timeout=5)
    def search(query: str, k: int = 3) -> list[str]:
        '''Find documents.

        Args:
            query: What to look for.
            k: How many documents to return.
        '''

The schema the model reads comes from the signature and the Google-style docstring. Arguments are
validated by pydantic. Nothing a tool does can raise here: every way to fail is a ``ToolResult``
with an ``error``. To reject a call that the agent should have written otherwise, a tool raises
``CallError``; every other exception is the tool's own failure.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, overload

from pydantic import (
    BaseModel,
    PydanticUserError,
    ValidationError,
)
from pydantic.json_schema import PydanticJsonSchemaWarning

from agent_r1.errors import CallError, ExpiredError
from agent_r1.tools.arguments import (
    arguments_model,
    as_written,
    descriptions_of,
    explain_problems,
    signature_of,
    strip_titles,
)
from agent_r1.tools.base import ToolResult
from agent_r1.tools.failure_policy import FailurePolicy, Health
from agent_r1.tools.process import CrashError, in_process
from agent_r1.types import ToolCall
from agent_r1.utils.scope import current_scope
from agent_r1.utils.text import clean, describe
from agent_r1.utils.waiting import EPISODE_THREAD, in_thread, within


class FunctionTool:
    """A function with a schema, a time limit and a way to run it. Use the ``@tool`` decorator to
    make one.

    Attributes:
        name: The function's name.
        description: The docstring without its sections.
        timeout: Seconds until a call is given up.
        isolated: Run each call in a new process, which is killed on time-out.
        parallel: Run calls at the same time as other parallel calls of the turn. Else the calls of
            a turn run in the order written, those of plain functions in their episode's one thread.
        failure: Policy for failed calls.
        returns: The function's annotated return type.
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
        written = as_written(fn)
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
        self._health = Health()
        self.returns = signature_of(fn, self.name).return_annotation
        if self.returns is inspect.Signature.empty:
            self.returns = Any
        self._owner: Any = None
        self.description, descriptions = descriptions_of(fn, written)
        if not self.description:
            raise ValueError(f"tool {self.name!r} has no docstring; it is what the model reads")
        self._arguments = arguments_model(fn, self.name, descriptions)
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

    def __get__(self, owner: Any, owner_type: type | None = None) -> FunctionTool:
        """A tool defined in a class body is bound to the instance, like a method."""
        if owner is None:
            return self
        bound = object.__new__(FunctionTool)
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
    def health(self) -> Health:
        """What is known of the tool over all episodes of a run; ``hanging`` counts the calls of a
        synchronous tool that ran into the time limit and whose threads, which cannot be killed,
        still run.
        """
        here = current_scope()
        return self._health if here is None else here.shared((Health, self._arguments), Health)

    @property
    def schema(self) -> dict[str, Any]:
        """The function as OpenAI-style JSON schema, which chat templates expect."""
        parameters = copy.deepcopy(self._parameters)
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def check(self, call: ToolCall) -> ToolResult | None:
        """The failed result for wrong arguments, or ``None``."""
        valid = self._validated(call)
        return valid if isinstance(valid, ToolResult) else None

    def _validated(self, call: ToolCall) -> BaseModel | ToolResult:
        try:
            return self._arguments.model_validate(call.arguments)
        except ValidationError as error:
            return ToolResult(call, error="invalid_arguments", detail=explain_problems(error))

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
        except CrashError as error:
            return ToolResult(call, error="crash", detail=f"{self.name} {error}")
        except CallError as error:
            return ToolResult(call, error="rejected", detail=clean(str(error)))
        except Exception as error:  # whatever the tool's author raises is an observation
            return ToolResult(call, error="exception", detail=describe(error))

    @property
    def needs_thread(self) -> bool:
        """Whether the tool is plain code that runs in its episode's thread."""
        return not (self.is_async or self.isolated or self.parallel)

    async def _call(self, arguments: dict[str, Any]) -> Any:
        call = functools.partial(self.fn, *self._self_args(), **arguments)
        if self.is_async:
            return await call()
        if self.isolated:
            return await in_process(call)
        thread = EPISODE_THREAD.get()
        if thread is None or self.parallel:
            value = await in_thread(call, f"tool-{self.name}", self.health.hangs)
        else:
            value = await thread.run(call, self.health.hangs)
        # A plain wrapper around an asynchronous function returns an awaitable.
        return await value if inspect.isawaitable(value) else value


@overload
def tool(fn: Callable[..., Any], /) -> FunctionTool: ...


@overload
def tool(
    *,
    timeout: float = ...,
    isolated: bool = ...,
    parallel: bool = ...,
    failure: FailurePolicy | None = ...,
) -> Callable[[Callable[..., Any]], FunctionTool]: ...


def tool(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    timeout: float = 30.0,
    isolated: bool = False,
    parallel: bool = False,
    failure: FailurePolicy | None = None,
) -> FunctionTool | Callable[[Callable[..., Any]], FunctionTool]:
    """Makes a function, or a method of an environment, callable by the model. The schema that the
    model reads comes from the signature (pydantic's ``Field`` as default or in ``Annotated``
    included) and the Google-style docstring.

    Args:
        fn: The function; sync or async. What it returns is shown to the agent as text.
        timeout: Seconds until a call is given up; the agent then sees that.
        isolated: Run each call in a new process, which is killed on time-out.
        parallel: Run calls at the same time as other parallel calls of the turn. By default the
            calls of a turn run in the order written, plain functions in one thread per episode.
        failure: Policy for failed calls; by default the agent sees the failure.

    Raises:
        ValueError: The function has no docstring, or a parameter that a model cannot fill.
    """
    if fn is not None:
        return FunctionTool(fn)
    return functools.partial(
        FunctionTool, timeout=timeout, isolated=isolated, parallel=parallel, failure=failure
    )
