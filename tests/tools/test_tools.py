"""Tools: schema, checks, and every way to fail."""

import asyncio
import dataclasses
import enum
import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from agent_r1 import ToolEnv, tool
from agent_r1.errors import CallError, ConfigError
from agent_r1.tools.dispatcher import Dispatcher
from agent_r1.tools.function_tool import FunctionTool
from agent_r1.types import MalformedCall, ToolCall
from tests import ROOT


@tool
def search(query: str, k: int = 3, mode: Literal["fast", "good"] = "fast") -> list[str]:
    """Find documents.

    Searches everything there is.

    Args:
        query: What to look for.
        k: How many to return.
    """
    return [f"{query}-{mode}"] * k


@tool(timeout=0.2)
def sleepy(seconds: float) -> str:
    """Sleep."""
    time.sleep(seconds)
    return "awake"


@tool(timeout=0.2)
async def sleepy_async(seconds: float) -> str:
    """Sleep."""
    await asyncio.sleep(seconds)
    return "awake"


@tool
def broken() -> str:
    """Raise."""
    raise KeyError("no such thing")


@tool
def own_timeout() -> str:
    """Raise what a socket raises."""
    raise TimeoutError("server gone")


@tool(isolated=True, timeout=20)
def pid() -> int:
    """The process."""
    print("noise on stdout")
    return os.getpid()


@tool(isolated=True, timeout=20)
def crash() -> None:
    """Die."""
    os._exit(7)


@tool(isolated=True, timeout=20)
def isolated_error() -> None:
    """Raise."""
    raise ValueError("inside")


@tool(isolated=True, timeout=3.0)
def isolated_hang(path: str) -> None:
    """Hang, having written down the process."""
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)


def call(tool, **arguments):
    return asyncio.run(tool.run(ToolCall(tool.name, arguments)))


def test_schema_comes_from_signature_and_docstring():
    assert search.schema == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Find documents.\n\nSearches everything there is.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"description": "What to look for.", "type": "string"},
                    "k": {"default": 3, "description": "How many to return.", "type": "integer"},
                    "mode": {"default": "fast", "enum": ["fast", "good"], "type": "string"},
                },
                "required": ["query"],
            },
        },
    }


def test_result_is_raw_and_the_function_stays_callable():
    assert call(search, query="x", k=2).value == ["x-fast", "x-fast"]
    assert search("y", k=1) == ["y-fast"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, "query"),
        ({"query": "x", "k": "many"}, "k"),
        ({"query": "x", "color": "red"}, "color"),
        ({"query": "x", "mode": "slow"}, "mode"),
    ],
)
def test_wrong_arguments_are_explained(arguments, names):
    result = call(search, **arguments)
    assert result.error == "invalid_arguments"
    assert names in result.detail


def test_an_exception_is_a_result():
    result = call(broken)
    assert result.error == "exception"
    assert "KeyError" in result.detail


def test_a_tools_own_timeout_error_is_an_exception_not_our_time_limit():
    result = call(own_timeout)
    assert (result.error, own_timeout.health.hanging) == ("exception", 0)


def test_time_limit_of_sync_and_async_tools():
    start = time.perf_counter()
    assert call(sleepy, seconds=5).error == "timeout"
    assert call(sleepy_async, seconds=5).error == "timeout"
    assert time.perf_counter() - start < 3
    assert sleepy.health.hanging == 1
    assert sleepy_async.health.hanging == 0
    assert call(sleepy, seconds=0).value == "awake"
    assert call(sleepy_async, seconds=0).value == "awake"


def test_an_abandoned_thread_is_a_daemon_so_that_the_process_can_end():
    call(sleepy, seconds=3)
    assert all(t.daemon for t in threading.enumerate() if t.name == "tool-sleepy")


def test_a_tool_that_cancels_or_exits_harms_nobody():
    @tool
    async def cancelled() -> None:
        """Cancel."""
        raise asyncio.CancelledError

    @tool
    async def exits() -> None:
        """Exit."""
        raise SystemExit(1)

    @tool(isolated=True, timeout=20)
    def exits_isolated() -> None:
        """Exit."""
        sys.exit(0)

    assert (call(cancelled).error, call(cancelled).detail) == ("exception", "CancelledError")
    assert call(exits).error == "exception"
    assert call(exits_isolated).error == "crash"


def test_an_isolated_tool_of_a_file_named_in_a_recipe(tmp_path):
    """Its process cannot import that file as a module."""
    from agent_r1.config.registry import load_object

    (tmp_path / "mine.py").write_text(
        "from agent_r1 import tool\n"
        "def helper(x):\n    return 2 * x\n"
        "@tool(isolated=True, timeout=20)\n"
        'def double(x: int) -> int:\n    """Double."""\n    return helper(x)\n'
    )
    assert call(load_object(f"{tmp_path / 'mine.py'}:double", what="tool"), x=4).value == 8


def test_isolated_tools_run_in_a_process_of_their_own():
    result = call(pid)
    assert isinstance(result.value, int)
    assert result.value != os.getpid()


def test_isolated_failures():
    assert (call(crash).error, "7" in call(crash).detail) == ("crash", True)
    result = call(isolated_error)
    assert (result.error, result.detail) == ("exception", "ValueError: inside")


def test_an_isolated_tool_is_killed_on_time_out(tmp_path):
    assert call(isolated_hang, path=str(tmp_path / "pid")).error == "timeout"
    assert isolated_hang.health.hanging == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@tool(isolated=True, timeout=20)
def leaves_somebody(path: str) -> int:
    """Starts a process that holds on to all that it was given, and answers."""
    if (child := os.fork()) == 0:
        time.sleep(60)
    Path(path).write_text(str(child))
    return child


def is_gone(pid, seconds=5.0):
    """Whether a process ends within that time; one that nobody has collected yet has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_what_an_isolated_tool_leaves_running_is_ended_and_does_not_hold_its_result(tmp_path):
    begun = time.monotonic()
    result = call(leaves_somebody, path=str(tmp_path / "pid"))
    assert result.error is None
    assert time.monotonic() - begun < 15
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_an_isolated_tool_does_not_outlive_who_called_it(tmp_path):
    code = (
        "import asyncio\n"
        "from agent_r1.types import ToolCall\n"
        "from tests.tools.test_tools import isolated_hang\n"
        f"call = ToolCall('isolated_hang', {{'path': {str(tmp_path / 'pid')!r}}})\n"
        "asyncio.run(isolated_hang.run(call, 60.0))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_calls_declared_parallel_run_together_and_keep_their_order():
    @tool(timeout=5, parallel=True)
    async def wait(seconds: float) -> float:
        """Wait."""
        await asyncio.sleep(seconds)
        return seconds

    calls = (
        ToolCall("wait", {"seconds": 0.3}),
        MalformedCall("{", "not JSON"),
        ToolCall("nothing", {}),
        ToolCall("wait", {"seconds": 0.1}),
    )
    start = time.perf_counter()
    results = asyncio.run(Dispatcher({"wait": wait}).run(calls))
    assert time.perf_counter() - start < 0.39
    assert [r.error for r in results] == [None, "malformed_call", "unknown_tool", None]
    assert [r.value for r in results] == [0.3, None, None, 0.1]
    assert "wait" in results[2].detail


@pytest.mark.parametrize("kind", ["async", "plain", "isolated"])
def test_calls_of_one_turn_run_in_the_order_written(kind, tmp_path):
    log = tmp_path / "log"

    def note(what: str, seconds: float) -> str:
        """Note."""
        with log.open("a") as file:
            file.write(f"{what} begins\n")
        time.sleep(seconds)
        with log.open("a") as file:
            file.write(f"{what} ends\n")
        return what

    async def note_too(what: str, seconds: float) -> str:
        """Note."""
        await asyncio.sleep(0)
        return note(what, seconds)

    made = FunctionTool(note_too if kind == "async" else note, isolated=kind == "isolated")
    calls = [ToolCall(made.name, {"what": w, "seconds": s}) for w, s in (("a", 0.2), ("b", 0.0))]
    results = asyncio.run(Dispatcher({made.name: made}).run(calls))
    assert [r.value for r in results] == ["a", "b"]
    assert log.read_text().splitlines() == ["a begins", "a ends", "b begins", "b ends"]


class Place(enum.Enum):
    NORTH = "north"


def parameters_of(fn):
    return FunctionTool(fn).schema["function"]["parameters"]


def test_signatures_as_pydantic_users_write_them():
    def f(
        city: str = Field(description="Name of the city"),
        days: int = Field(3, le=7),
        unit: Annotated[str, Field(description="C or F", examples=["C"])] = "C",
        place: Annotated[Place, "Where"] = Place.NORTH,
        documented: Annotated[int, Field(ge=1, description="Not this")] = 1,
        options: dict = {"title": "kept"},  # noqa: B006
    ) -> str:
        """Weather.

        Args:
            documented: The docstring goes first.
        """
        return f"{city} {days} {unit} {place}"

    schema = parameters_of(f)
    assert schema["required"] == ["city"]
    found = schema["properties"]
    assert found["city"]["description"] == "Name of the city"
    assert (found["days"]["default"], found["days"]["maximum"]) == (3, 7)
    assert (found["unit"]["description"], found["unit"]["examples"]) == ("C or F", ["C"])
    assert found["place"]["description"] == "Where"
    assert found["documented"] == {
        "default": 1, "description": "The docstring goes first.", "minimum": 1, "type": "integer",
    }  # fmt: skip
    assert found["options"]["default"] == {"title": "kept"}
    result = call(FunctionTool(f), city="Oslo", place="north")
    assert result.value == "Oslo 3 C Place.NORTH"
    assert call(FunctionTool(f)).error == "invalid_arguments"
    assert "days" in call(FunctionTool(f), city="Oslo", days=50).detail


def test_what_a_model_cannot_fill_is_refused_by_name():
    def positional(x: int, /) -> int:
        """No."""
        return x

    def underscore(_q: str) -> str:
        """No."""
        return _q

    def config(model_config: int) -> int:
        """No."""
        return model_config

    def stream(n: int):
        """No."""
        yield n

    def field(x: int = dataclasses.field(default=1)) -> int:
        """No."""
        return x

    for fn, names in (
        (positional, "'positional', parameter 'x': it is positional-only"),
        (underscore, "'underscore', parameter '_q'"),
        (config, "'config', parameter 'model_config'"),
        (stream, "'stream': it yields"),
        (field, "'field', parameter 'x': dataclasses.field"),
    ):
        with pytest.raises(ValueError, match=names):
            FunctionTool(fn)


def test_whatever_is_awaitable_is_awaited():
    async def inner(x: int) -> int:
        """Double."""
        await asyncio.sleep(0)
        return 2 * x

    @functools.wraps(inner)
    def wrapped(*args, **kwargs):
        return inner(*args, **kwargs)

    class Object:
        """Double."""

        async def __call__(self, x: int) -> int:
            return await inner(x)

    for fn in (wrapped, functools.partial(inner), Object()):
        assert call(FunctionTool(fn), x=3).value == 6
    assert FunctionTool(Object()).name == "Object"


def test_text_that_is_no_text_never_leaves_a_tool():
    @tool
    def fails(x: str) -> str:
        """Fail."""
        raise CallError("\ud83d")

    assert call(fails, x="").detail == "\ufffd"


def test_two_tools_of_one_name_and_an_override_without_tool_are_errors():
    @tool
    def look(x: int) -> int:
        """Look."""
        return x

    class Base(ToolEnv):
        @tool
        def look(self, x: int) -> int:
            """Look."""
            return x

    class Twice(Base):
        tools = (look,)

    with pytest.raises(ConfigError, match="two tools named 'look'"):
        Twice()
    with pytest.raises(ValueError, match=r"Plain\.look takes the place of a tool"):

        class Plain(Base):
            def look(self, x):
                return x

    class Without(Base):
        look = None

    class Better(Base):
        @tool
        def look(self, x: int) -> int:
            """Look better."""
            return -x

    assert Without().schemas == []
    assert [s["function"]["description"] for s in Better().schemas] == ["Look better."]


def test_what_cannot_be_a_tool_is_refused_at_once():
    with pytest.raises(ValueError, match="docstring"):

        @tool
        def silent(x: int) -> int:
            return x

    with pytest.raises(ValueError, match="'x'"):

        @tool
        def untyped(x) -> int:
            """Doc."""
            return x

    with pytest.raises(ValueError, match="kwargs"):

        @tool
        def wild(**anything: int) -> int:
            """Doc."""
            return 0

    with pytest.raises(ValueError, match="isolated"):

        @tool(isolated=True)
        async def both() -> int:
            """Doc."""
            return 0


def test_python_is_the_same(tmp_path):
    @tool(isolated=True, timeout=20)
    def version() -> str:
        """Version."""
        return sys.version

    assert call(version).value == sys.version
