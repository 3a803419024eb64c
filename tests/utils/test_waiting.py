"""Waiting for the code of others: one loop for all, threads, deadlines."""

import asyncio
import sqlite3
import threading
import time

import pytest

import agent_r1
from agent_r1 import Task, ToolCall, ToolEnv, Transition, tool
from agent_r1.envs.lifecycle import close_env
from agent_r1.errors import ExpiredError
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.rollout import Rollout
from agent_r1.types import StopReason
from agent_r1.utils.scope import held_up, run_async, scope
from agent_r1.utils.waiting import OwnThread, in_thread, telling, within
from tests.fakes import CharRenderer, ScriptedEngine

CALL = '<tool_call>{"name": "%s", "arguments": {}}</tool_call>'


def play(env, *lines, limits=None, attempts=1):
    rollout = Rollout(env, ScriptedEngine(*lines), CharRenderer(), limits or Limits())
    (group,) = run_async(rollout.run([Task("t", "Q")], attempts=attempts, temperature=1.0, seed=0))
    return group.trajectories


# One loop ------------------------------------------------------------------------------------


def test_what_takes_long_is_said_while_it_lasts(caplog):
    with telling("tasks() has not returned yet", every=0.02):
        time.sleep(0.1)
    assert caplog.messages[:2] == ["tasks() has not returned yet (0 s)"] * 2
    said = len(caplog.messages)
    time.sleep(0.1)
    assert len(caplog.messages) <= said + 1


def test_what_belongs_to_a_loop_lives_from_call_to_call():
    lock, queue = asyncio.Lock(), asyncio.Queue()

    async def use(value):
        async with lock:
            await queue.put(value)
            await asyncio.sleep(0)
            return asyncio.get_running_loop(), await queue.get()

    with scope():
        loops = {run_async(use(n))[0] for n in range(3)}
        assert len(loops) == 1

        async def notebook():  # a loop of somebody else's runs already
            return run_async(use(4))[0]

        assert asyncio.run(notebook()) in loops
    assert all(loop.is_closed() for loop in loops)


def test_code_in_the_loop_may_ask_for_another_run():
    async def inner():
        return 1

    async def outer():
        return run_async(inner()) + await in_thread(lambda: run_async(inner()), "x")

    assert run_async(outer()) == 2


class Client:
    """As the clients of HTTP and of databases: bound to the loop that it was first used in."""

    def __init__(self):
        self.loop = None

    async def get(self):
        self.loop = self.loop or asyncio.get_running_loop()
        if self.loop is not asyncio.get_running_loop():
            raise RuntimeError("Event loop is closed")
        await asyncio.sleep(0)
        return "42"


def test_a_client_works_in_every_iteration_validation_and_play(tmp_path):
    file = tmp_path / "my.py"
    file.write_text(
        "from agent_r1 import Task, ToolEnv\n"
        "from tests.utils.test_waiting import Client\n"
        "CLIENT = Client()\n"
        "class Mine(ToolEnv):\n"
        "    @classmethod\n"
        "    def tasks(cls, settings, split):\n"
        "        return [Task(f'{split}{n}', 'say') for n in range(4)]\n"
        "    async def score(self, answer):\n"
        "        return len(await CLIENT.get()) + hash(answer) % 2\n"
    )
    with scope():
        run = agent_r1.train(
            {"env": f"{file}:Mine"},
            run=tmp_path / "run",
            overrides={
                "train": {"iterations": 2, "tasks": 1, "attempts": 2},
                "limits": {"turns": 1, "tokens_per_turn": 3, "tokens": 300},
                "evaluation": {"every": 1, "tasks": 2},
            },
        )
        agent = agent_r1.load(tmp_path / "run")
        for _ in range(2):
            assert agent.play("say").fault is None
    assert [row["figures"].get("stop/fault") for row in run.metrics[1:]] == [None, None]
    assert all(row["validation"]["total"]["faults"] == 0 for row in run.metrics)
    fault = agent_r1.load(tmp_path / "run").play("say").fault
    assert "in another event loop" in fault
    assert "agent_r1.shared" in fault


# Deadlines -----------------------------------------------------------------------------------


def test_a_task_that_does_not_want_to_end_is_abandoned():
    hanging = []

    async def stubborn():
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            try:
                await asyncio.sleep(0.05)
            except BaseException:  # as people write retries
                continue

    async def main():
        start = time.monotonic()
        with pytest.raises(ExpiredError):
            await within(0.1, stubborn, hanging.append)
        assert time.monotonic() - start < 1.2
        assert hanging == [1]
        await asyncio.sleep(1.2)
        assert hanging == [1, -1]

    run_async(main())


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit(), asyncio.CancelledError()])
def test_what_is_no_exception_is_one_here(error):
    async def odd():
        raise error

    with pytest.raises(RuntimeError) as caught:
        run_async(within(1.0, odd))
    assert type(caught.value).__name__ == type(error).__name__


def spin():
    while True:
        pass


class Endless(ToolEnv):
    where = ""

    @tool
    def look(self) -> str:
        """Look."""
        return "seen"

    def start(self):
        self._at("start")

    def interpret(self, results):
        self._at("interpret")
        return self.show(results)

    def reply(self, message):
        self._at("reply")
        return Transition(done=True)

    def score(self, answer):
        self._at("score")
        return 1.0

    def close(self):
        self._at("close")

    def _at(self, where):
        if where == self.where:
            spin()


@pytest.mark.parametrize("where", ["start", "interpret", "reply", "score", "close"])
def test_an_endless_loop_in_plain_code_ends_its_episode_alone(where):
    env = type("E", (Endless,), {"where": where})
    before = time.monotonic()
    (episode,) = play(env, CALL % "look", "done", limits=Limits(seconds=0.4))
    assert time.monotonic() - before < 5
    if where in ("interpret", "reply"):
        assert episode.stop is StopReason.MAX_TIME
    elif where != "close":
        assert episode.stop is StopReason.FAULT
        assert "0.4 seconds" in episode.fault
    else:
        assert (episode.outcome.reward, episode.stop) == (1.0, StopReason.DONE)
    time.sleep(0.3)  # its thread is told to end
    assert not [t for t in threading.enumerate() if t.name == "episode-E"]


# One thread an episode -----------------------------------------------------------------------


class Bound(ToolEnv):
    """State bound to a thread, as SQLite's connections are."""

    @tool
    def count(self) -> int:
        """Count."""
        return self.db.execute("SELECT COUNT(*) FROM t").fetchone()[0]

    @tool
    def add(self) -> str:
        """Add."""
        self.db.execute("INSERT INTO t VALUES (1)")
        return "added"

    @tool(timeout=0.1)
    def hang(self) -> str:
        """Hang."""
        time.sleep(0.6)
        return ""

    def start(self):
        self.db = sqlite3.connect(":memory:")
        self.db.execute("CREATE TABLE t (x)")

    def score(self, answer):
        return float(self.db.execute("SELECT COUNT(*) FROM t").fetchone()[0])

    def gold(self):
        yield ToolCall("add", {})
        self.db.execute("INSERT INTO t VALUES (1)")
        yield "done"

    def close(self):
        self.db.close()


def test_state_bound_to_a_thread_works_as_in_a_script():
    episodes = play(Bound, CALL % "add" + CALL % "count", CALL % "add", "done", attempts=3)
    for episode in episodes:
        assert [m.content for m in episode.steps[0].observation] == ["added", "1"]
        assert (episode.outcome.reward, episode.fault) == (2.0, None)


def test_what_a_stuck_call_takes_with_it_is_a_fault_and_not_the_agents():
    (episode,) = play(Bound, CALL % "hang", CALL % "count", "done")
    assert "no result within 0.1 seconds" in episode.steps[0].observation[0].content
    assert episode.stop is StopReason.FAULT
    assert "count: ProgrammingError" in episode.fault
    assert "a call hung" in episode.fault


def test_after_a_stuck_call_tools_without_such_state_go_on():
    class Free(Endless):
        @tool(timeout=0.1)
        def hang(self) -> str:
            """Hang."""
            time.sleep(0.5)
            return ""

    (episode,) = play(Free, CALL % "hang", CALL % "look", "done")
    assert episode.steps[1].observation[0].content == "seen"
    assert (episode.stop, episode.outcome.reward) == (StopReason.DONE, 1.0)


def test_a_thread_ends_with_its_owner():
    class Alone(Bound):
        pass

    async def main():
        env = Alone()
        await env.reset(Task("t", "Q"), 0)
        assert [t for t in threading.enumerate() if t.name == "episode-Alone"]
        await close_env(env)

    run_async(main())
    thread = OwnThread("lonely")
    assert thread.wait(threading.get_ident) != threading.get_ident()
    del thread
    time.sleep(0.2)
    names = [t.name for t in threading.enumerate()]
    assert "episode-Alone" not in names
    assert "lonely" not in names


# Who holds up all others ---------------------------------------------------------------------


class Blocking(ToolEnv):
    @tool
    async def nap(self) -> str:
        """Nap."""
        time.sleep(0.4)
        return "."

    def score(self, answer):
        return 1.0


def test_plain_waiting_in_the_loop_is_noticed_and_named():
    with scope():
        play(Blocking, CALL % "nap", CALL % "nap", "done")
        (line,) = held_up()
        assert held_up() == []
    assert line.startswith("Blocking.nap() (test_waiting.py, line ")
    assert "held up all episodes for 0." in line
