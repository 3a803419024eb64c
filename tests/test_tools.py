"""Tools: schema, checks, and every way to fail."""

import asyncio
import os
import sys
import threading
import time
from typing import Literal

import pytest

from agent_r1 import tool
from agent_r1.dispatch import Dispatcher
from agent_r1.types import MalformedCall, ToolCall


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
    from agent_r1.config import load_object

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


def test_calls_of_one_action_run_concurrently_and_keep_their_order():
    @tool(timeout=5)
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
