"""MCP: real server processes, by stdio and HTTP; killed, hung, started again."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import agent_r1
from agent_r1 import Task, ToolEnv
from agent_r1.errors import ConfigError
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.rollout import Rollout
from agent_r1.tools.failure_policy import FailurePolicy
from agent_r1.tools.mcp.connection import MAX_TIMEOUTS, Connection, connect
from agent_r1.tools.mcp.settings import McpServer
from agent_r1.types import StopReason, ToolCall
from agent_r1.utils.scope import scope
from tests import ROOT
from tests.fakes import CharRenderer, ScriptedEngine
from tests.servers import free_port, start, stop

SERVER = '''
import os, sys, time
from mcp.server.mcpserver import MCPServer

server = MCPServer("toy", log_level="ERROR")
counter = 0

@server.tool()
def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b

@server.tool()
async def wait(seconds: float) -> str:
    """Wait."""
    import anyio
    await anyio.sleep(seconds)
    return "awake"

@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("boom")

@server.tool()
def die() -> str:
    """End the process."""
    os._exit(3)

@server.tool()
def refuse() -> str:
    """Answer with an error of the protocol."""
    from mcp import MCPError
    raise MCPError(code=-32602, message="refused")

@server.tool()
def count() -> str:
    """Count the calls of this process."""
    global counter
    counter += 1
    return f"{counter} in {os.getpid()}"

server.run(sys.argv[1], **({"port": int(sys.argv[2])} if len(sys.argv) > 2 else {}))
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("mcp") / "server.py"
    path.write_text(SERVER)
    return str(path)


def stdio(script, **settings):
    return McpServer(command=(sys.executable, script, "stdio"), **settings)


async def call(connection, name, timeout=None, **arguments):
    (tool,) = [tool for tool in await connection.tools() if tool.name == name]
    made = ToolCall(name, arguments)
    return tool.check(made) or await tool.run(made, timeout)


def use(server, work):
    """Runs ``work(connection)`` and closes the connection."""

    async def main():
        connection = Connection("toy", server)
        try:
            return await work(connection)
        finally:
            await connection.close()

    return asyncio.run(main())


def test_tools_their_schemas_and_results(script):
    async def work(connection):
        tools = await connection.tools()
        assert [tool.name for tool in tools] == ["add", "wait", "fail", "die", "refuse", "count"]
        assert tools[0].schema == {
            "type": "function",
            "function": {
                "name": "add",
                "description": "Add two numbers.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "a": {"type": "integer"},
                        "b": {"default": 1, "type": "integer"},
                    },
                    "required": ["a"],
                },
            },
        }
        assert (await call(connection, "add", a=2, b=3)).value == "5"
        wrong = await call(connection, "add", a="x")
        assert (wrong.error, wrong.detail) == (
            "invalid_arguments",
            "a: 'x' is not of type 'integer'",
        )
        failed = await call(connection, "fail")
        assert (failed.error, failed.by_agent) == ("rejected", True)
        assert "boom" in failed.detail

    use(stdio(script), work)


def test_an_error_that_is_an_answer_restarts_nothing(script):
    async def work(connection):
        waiting = asyncio.ensure_future(call(connection, "wait", seconds=0.5))
        await asyncio.sleep(0.2)
        refused = await call(connection, "refuse")
        assert (refused.error, refused.by_agent) == ("rejected", True)
        assert "refused" in refused.detail
        assert (await waiting).value == "awake"
        assert connection.num_starts == 1

    use(stdio(script), work)


def test_whose_fault_an_error_is_can_be_said(script):
    async def work(connection):
        assert (await call(connection, "fail")).error == "exception"

    use(stdio(script, is_error="exception"), work)


def test_a_server_that_dies_is_started_again(script):
    async def work(connection):
        died = await call(connection, "die")
        assert died.error == "crash"
        assert "the server is gone" in died.detail
        pid = int((await call(connection, "count")).value.split(" ")[-1])
        assert connection.num_starts == 2
        waiting = asyncio.ensure_future(call(connection, "wait", seconds=30))
        await asyncio.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        assert (await waiting).error == "crash"  # at once, not after its time limit
        assert (await call(connection, "add", a=1)).value == "2"
        assert connection.num_starts == 3

    use(stdio(script), work)


def test_a_slow_call_is_a_timeout_and_a_server_that_hangs_is_started_again(script):
    async def work(connection):
        first = (await call(connection, "count")).value
        for _ in range(MAX_TIMEOUTS):
            assert (await call(connection, "wait", timeout=0.1, seconds=30)).error == "timeout"
        again = (await call(connection, "count")).value
        assert again.startswith("1 in")
        assert again != first
        assert connection.num_starts == 2

    use(stdio(script), work)


def test_streamable_http_and_a_server_that_goes_and_comes_back(script):
    port = free_port()
    command = [sys.executable, script, "streamable-http", str(port)]
    server = McpServer(url=f"http://127.0.0.1:{port}/mcp", headers={"X-Key": "k"}, timeout=10)
    process = start(command, port)

    async def work(connection):
        nonlocal process
        assert (await call(connection, "add", a=1)).value == "2"
        stop(process)
        assert (await call(connection, "add", a=1)).error == "crash"
        assert (await call(connection, "add", a=1)).error == "crash"
        process = start(command, port)
        assert (await call(connection, "add", a=1)).value == "2"

    try:
        use(server, work)
    finally:
        stop(process)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"command": ("no-such-command",)}, "no-such-command"),
        ({"command": (sys.executable, "-c", "pass")}, "Connection closed"),
        ({"command": (sys.executable, "-c", "import time; time.sleep(60)"),
          "connect_timeout": 0.5}, "not up within 0.5 seconds"),
        ({"url": "http://127.0.0.1:9/mcp"}, "Connect"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_be_reached_is_an_error_before_the_run(server, message):
    with pytest.raises(ConfigError, match=rf"env\.mcp\.toy: .*{message}"):
        use(McpServer(**server), lambda connection: connection.tools())


def test_settings_are_checked(script):
    with pytest.raises(ValueError, match="give a command, or a url"):
        McpServer()
    with pytest.raises(ConfigError, match="no tool 'ad'; did you mean 'add'"):
        use(stdio(script, tools=("ad",)), lambda connection: connection.tools())


# In environments ----------------------------------------------------------------------------------

COUNT = '<tool_call>{"name": "count", "arguments": {}}</tool_call>'


class Env(ToolEnv):
    def score(self, answer):
        return 1.0


def play(settings, *lines, attempts=3):
    rollout = Rollout(
        lambda: Env(settings), ScriptedEngine(*lines), CharRenderer(), Limits(turns=5)
    )
    work = rollout.run([Task("t", "Q")], attempts=attempts, temperature=1.0, seed=0)
    return asyncio.run(work)[0].trajectories


@pytest.mark.parametrize("per", ["run", "episode"])
def test_one_server_for_the_run_or_one_for_each_episode(script, per):
    settings = Env.Settings(name="env", mcp={f"toy-{per}": stdio(script, per=per)})
    with scope():
        trajectories = [*play(settings, COUNT, "end"), *play(settings, COUNT, "end")]  # two loops
    seen = [t.steps[0].observation[0].content for t in trajectories]
    counts = sorted(int(text.split(" ")[0]) for text in seen)
    assert counts == (list(range(1, 7)) if per == "run" else [1] * 6)


@pytest.mark.parametrize("per", ["run", "episode"])
def test_what_is_made_outside_of_a_scope_ends_with_its_environment(script, per):
    """Wherever it is closed: nobody else would."""

    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "mcp"]

    before = len(threads())
    env = Env(Env.Settings(name="env", mcp={"toy": stdio(script, per=per)}))
    assert len(threads()) == before, "nothing is begun before it is needed"

    async def used():
        await env.reset(Task("t", "Q"), 0)
        (result,) = await env.run_tools([ToolCall("add", {"a": 1})])
        return result.value

    assert asyncio.run(used()) == "2"
    assert len(threads()) == before + 1
    with scope():
        asyncio.run(env.close())
    assert len(threads()) == before


def test_a_policy_retries_over_a_crash(script):
    die = '<tool_call>{"name": "die", "arguments": {}}</tool_call>'
    settings = Env.Settings(
        name="env",
        mcp={"toy-retry": stdio(script)},
        failure={"count": FailurePolicy(retries=2, backoff=0.01)},
    )
    (trajectory,) = play(settings, die, COUNT, "end", attempts=1)
    assert trajectory.steps[0].events == ("fault/crash:die",)
    assert trajectory.steps[1].observation[0].content.startswith("1 in")
    assert trajectory.stop is StopReason.DONE


def test_names_must_differ(script):
    settings = Env.Settings(name="env", mcp={"a": stdio(script), "b": stdio(script, timeout=9)})
    rollout = Rollout(lambda: Env(settings), ScriptedEngine("end"), CharRenderer(), Limits())
    with pytest.raises(ConfigError, match="there is a tool 'add' already"):
        asyncio.run(rollout.run([Task("t", "Q")], attempts=1, temperature=1.0, seed=0))


def test_the_example_trains_through_a_kill(tmp_path, monkeypatch):
    """The tiny base, whose search is in another process; the process is killed under it."""
    monkeypatch.chdir(ROOT)
    command = [sys.executable, "examples/mcp_server.py", "questions"]
    questions = tmp_path / "questions.jsonl"
    questions.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    marker = f"--run-{os.getpid()}"
    overrides = {
        "threads": 1, "train.iterations": 2, "train.tasks": 4, "train.attempts": 4,
        "evaluation": {"every": 0}, "env.tasks": str(questions), "env.failure": {},
        "env.mcp.facts.command": [
            sys.executable, "-c",
            f"import os, sys; sys.argv = ['{marker}', 'stdio']\n"
            "from agent_r1.tasks.hopworld import world as hopworld\n"
            "search, calls = hopworld.search_facts, []\n"
            "def dies(*args):\n"
            "    calls.append(args)\n"
            "    return os._exit(9) if len(calls) == 8 else search(*args)\n"
            "hopworld.search_facts = dies\n"
            "exec(open('examples/mcp_server.py').read())",
        ],
    }  # fmt: skip
    with scope():
        result = agent_r1.train("examples/mcp.toml", run=tmp_path / "run", overrides=overrides)
        (server,) = connect(result.recipe.env.mcp)
    figures = [row["figures"] for row in result.metrics[1:]]
    assert len(figures) == 2
    assert all("stop/fault" not in f for f in figures)
    assert server.num_starts > 1


RAW = '''
"""A server by hand, which sends what real servers send."""
import json, os, sys
mode = sys.argv[1]
S = {"type": "string"}
SCHEMAS = {
    "flag": {"type": "object", "properties": {"x": {"type": "object", "required": True}}},
    "nowhere": {"type": "object", "properties": {"x": {"$ref": "#/$defs/Gone"}}},
    "web": {"type": "object", "properties": {"x": {"$ref": sys.argv[-1]}}},
    "draft4": {"type": "object", "properties": {"x": {"minimum": 0, "exclusiveMinimum": True}}},
    "letters": {"type": "object", "properties": {"x": {**S, "pattern": "^\\\\p{L}+$"}}},
    "slow": {"type": "object", "properties": {"x": {**S, "pattern": "^(b|bb)+$"}}},
    "any": {"type": "object", "properties": {"x": {"type": "anything"}}},
}
if mode == "untyped":
    SCHEMAS = {"good": SCHEMAS["any"], "empty": {}}
CONTENTS = {
    "resource": [{"type": "text", "text": "1 file"},
                 {"type": "resource", "resource": {"uri": "f:///a", "text": "Opens at six."}}],
    "link": [{"type": "resource_link", "uri": "f:///b", "name": "notes", "description": "hours"}],
    "image": [{"type": "image", "data": "aGk=", "mimeType": "image/png"}],
    "structured": [],
}
def answer(m):
    method = m["method"]
    if method == "initialize":
        return {"protocolVersion": m["params"]["protocolVersion"], "capabilities": {"tools": {}},
                "serverInfo": {"name": "raw", "version": "1"}}
    if method == "tools/list":
        if mode == "silent":
            return None
        others = dict.fromkeys([*CONTENTS, "variable"], {"type": "object"})
        named = {**SCHEMAS, **others}
        page = {"tools": [{"name": n, "inputSchema": s} for n, s in named.items()]}
        return {**page, "nextCursor": "again"} if mode == "endless" else page
    if method == "tools/call":
        name = m["params"]["name"]
        if name == "variable":
            text = os.environ.get("SERVER_KEY")
            return {"content": [{"type": "text", "text": str(text)}]}
        if name in CONTENTS:
            extra = {"structuredContent": {"opens": 6}} if name == "structured" else {}
            return {"content": CONTENTS[name], **extra}
        return {"content": [{"type": "text", "text": json.dumps(m["params"]["arguments"])}]}
    return {"code": -32601, "message": "no such method"}
for line in sys.stdin:
    m = json.loads(line)
    if "id" in m and (found := answer(m)) is not None:
        kind = "error" if "code" in found else "result"
        print(json.dumps({"jsonrpc": "2.0", "id": m["id"], kind: found}), flush=True)
'''


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("raw") / "raw.py"
    path.write_text(RAW)
    return str(path)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("silent", "did not list its tools"),
        ("endless", "never ends"),
        ("untyped", r"tools\.1\.inputSchema\.type: Field required; its list of tools is not as"),
    ],
)
def test_a_list_of_tools_that_does_not_come_or_end_or_hold_is_an_error(raw, mode, words):
    server = McpServer(command=(sys.executable, raw, mode), connect_timeout=2)
    with pytest.raises(ConfigError, match=words):
        use(server, lambda connection: connection.tools())


def test_schemas_that_cannot_be_used_leave_the_check_to_the_server(raw):
    """No reach for the network, no exception, no pattern that holds up all."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

    listener = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{listener.server_port}/schema.json"
    values = {"flag": {}, "nowhere": 1, "web": 1, "draft4": 0.5, "letters": "\u00fc", "any": 1}
    values |= {"slow": "b" * 60 + "!"}

    async def work(connection):
        results = {}
        for name, value in values.items():
            start = time.monotonic()
            results[name] = await call(connection, name, x=value)
            assert time.monotonic() - start < 2
        wrong = await call(connection, "letters", x="12")
        return results, wrong

    results, wrong = use(McpServer(command=(sys.executable, raw, "", url)), work)
    listener.shutdown()
    assert {name: r.error for name, r in results.items()} == dict.fromkeys(values)
    assert (wrong.error, asked) == ("invalid_arguments", [])


def test_every_kind_of_content_is_shown_or_said(raw):
    async def work(connection):
        names = ("resource", "link", "structured", "image")
        return [await call(connection, name) for name in names]

    found = use(McpServer(command=(sys.executable, raw, "")), work)
    assert [r.value for r in found] == [
        "1 file\nOpens at six.", "notes f:///b hours", '{"opens": 6}', "[not text: image]",
    ]  # fmt: skip
    assert found[-1].events == ("fault/not_text:image",)


def test_a_secret_is_taken_from_our_environment_and_never_stored(raw, monkeypatch):
    server = McpServer(command=(sys.executable, raw, ""), env={"SERVER_KEY": "v-${OUR_KEY}$$"})
    monkeypatch.delenv("OUR_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"env.mcp.toy: \$OUR_KEY: there is no such"):
        use(server, lambda connection: connection.tools())
    monkeypatch.setenv("OUR_KEY", "s3cret")
    assert use(server, lambda c: call(c, "variable")).value == "v-s3cret$"
    assert "s3cret" not in server.model_dump_json()
    with pytest.raises(ValueError, match=r"headers.Authorization: it looks like a secret") as error:
        McpServer(url="http://x", headers={"Authorization": "Bearer abcdefgh"})
    assert "abcdefgh" not in str(error.value.errors()[0]["msg"])
