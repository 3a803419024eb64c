"""Cassettes: what was recorded is played back, and nothing else."""

import asyncio
import dataclasses
import itertools
import json

import pytest

from agent_r1 import Task, ToolEnv, tool
from agent_r1.errors import CallError, ConfigError, UnseenCallError
from agent_r1.tools.cassette import Cassette, CassetteSettings
from agent_r1.tools.dispatcher import Dispatcher
from agent_r1.types import ToolCall


@dataclasses.dataclass(frozen=True)
class Passage:
    title: str
    score: float


class Api:
    """A paid service that counts what it is asked."""

    def __init__(self):
        self.calls = 0

        @tool
        def find(query: str, k: int = 1) -> list[Passage]:
            """Find passages."""
            self.calls += 1
            if query == "bad":
                raise CallError("no such thing")
            return [Passage(f"{query} {self.calls}", 0.5)] * k

        @tool
        def opaque() -> object:
            """Return what has no JSON."""
            return lambda: None

        @tool
        def loose():
            """Return what JSON would change."""
            return {1: (1, 2)}

        self.tools = {"find": find, "opaque": opaque, "loose": loose}

    def run(self, path, *calls, task="t", seed=0, **settings):
        cassette = Cassette(CassetteSettings(path=str(path), **settings), task, seed)
        dispatcher = Dispatcher(self.tools, cassette=cassette)

        async def work():
            return [(await dispatcher.run([ToolCall(name, args)]))[0] for name, args in calls]

        return asyncio.run(work())


A, B, BAD = ("find", {"query": "a"}), ("find", {"query": "b", "k": 2}), ("find", {"query": "bad"})


def test_replay_gives_what_was_recorded_and_asks_nobody(tmp_path):
    api, path = Api(), tmp_path / "tape.jsonl"
    recorded = api.run(path, A, B, A, BAD, mode="record")
    assert [r.value for r in recorded[:3]] == [
        [Passage("a 1", 0.5)], [Passage("b 2", 0.5)] * 2, [Passage("a 3", 0.5)]
    ]  # fmt: skip
    assert api.calls == 4
    assert api.run(path, A, B, A, BAD) == recorded  # types, errors and events too
    assert api.run(path, A, A, A)[2] == recorded[2]  # asked more often: the last one
    assert api.calls == 4


def test_the_order_of_arguments_does_not_matter(tmp_path):
    api, path = Api(), tmp_path / "tape.jsonl"
    api.run(path, ("find", {"query": "a", "k": 1}), mode="record")
    (result,) = api.run(path, ("find", {"k": 1, "query": "a"}))
    assert result.value == [Passage("a 1", 0.5)]


def test_a_call_never_seen_is_an_error_that_says_what_to_do(tmp_path):
    api, path = Api(), tmp_path / "tape.jsonl"
    api.run(path, A, mode="record")
    with pytest.raises(UnseenCallError, match=r'never recorded: find\(\{"k": 2.*in .t 0.; record'):
        api.run(path, B)
    with pytest.raises(UnseenCallError, match="in 'other 0'"):
        api.run(path, A, task="other")
    with pytest.raises(UnseenCallError, match="in 't 1'"):
        api.run(path, A, seed=1)
    assert api.calls == 1


def test_or_is_let_through_and_kept(tmp_path):
    api, path = Api(), tmp_path / "tape.jsonl"
    api.run(path, A, mode="record")
    first = api.run(path, A, B, unseen="call")
    assert api.calls == 2
    assert api.run(path, A, B) == first
    assert api.calls == 2


def test_a_tool_without_state_is_the_same_anywhere(tmp_path):
    api, path = Api(), tmp_path / "tape.jsonl"
    (recorded,) = api.run(path, A, mode="record", same="anywhere")
    assert api.run(path, A, task="other", same="anywhere") == [recorded]


def test_or_for_every_seed_of_a_task(tmp_path):
    api, path = Api(), tmp_path / "tape.jsonl"
    (recorded,) = api.run(path, A, mode="record", same="task")
    assert api.run(path, A, seed=7, same="task") == [recorded]
    with pytest.raises(UnseenCallError):
        api.run(path, A, task="other", same="task")


def test_calls_at_once_keep_their_order_and_a_second_recording_changes_nothing(tmp_path):
    @tool
    async def slow(query: str) -> str:
        """The first call is the last to end."""
        number = next(numbers)
        await asyncio.sleep(0.1 if number == 0 else 0.0)
        return f"result {number}"

    def run(mode):
        settings = CassetteSettings(path=str(tmp_path / "tape.jsonl"), mode=mode)
        dispatcher = Dispatcher({"slow": slow}, cassette=Cassette(settings, "t", 0))
        calls = [ToolCall("slow", {"query": "a"})] * 2
        return [r.value for r in asyncio.run(dispatcher.run(calls))]

    numbers = itertools.count()
    assert run("record") == ["result 0", "result 1"]
    assert run("record") == ["result 2", "result 3"]
    assert run("replay") == ["result 0", "result 1"]


def test_failures_of_the_infrastructure_are_not_kept_and_replay_needs_no_circuit(tmp_path):
    from agent_r1.tools.failure_policy import Breaker, FailurePolicy

    api, path = Api(), tmp_path / "tape.jsonl"
    down = [True, True, False]

    @tool
    async def flaky() -> str:
        """Fail twice, then work."""
        if down.pop(0):
            raise OSError("blip")
        return "up"

    api.tools["flaky"] = flaky
    flaky.failure = FailurePolicy(breaker=Breaker(failures=3))
    results = api.run(path, ("flaky", {}), ("flaky", {}), ("flaky", {}), mode="record")
    assert [r.error for r in results] == ["exception", "exception", None]
    flaky.health.failures, flaky.health.retry_at = 9, float("inf")
    assert [r.value for r in api.run(path, ("flaky", {}), ("flaky", {}))] == ["up", "up"]


def test_tries_of_one_call_are_one_call(tmp_path):
    from agent_r1.tools.failure_policy import FailurePolicy

    api, path = Api(), tmp_path / "tape.jsonl"
    down = [True, False, True, False]

    @tool(failure=FailurePolicy(retries=1, backoff=0))
    async def flaky() -> int:
        """Fail every other time."""
        if down.pop(0):
            raise OSError("blip")
        return len(down)

    api.tools["flaky"] = flaky
    recorded = api.run(path, ("flaky", {}), ("flaky", {}), mode="record")
    assert [r.value for r in recorded] == [2, 0]
    assert [r.value for r in api.run(path, ("flaky", {}), ("flaky", {}))] == [2, 0]


def test_a_line_cut_off_by_a_kill_is_left_out_and_written_again(tmp_path):
    api, path = Api(), tmp_path / "tape.jsonl"
    api.run(path, A, B, mode="record")
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UnseenCallError):
        api.run(path, B)
    (again,) = api.run(path, B, unseen="call")
    assert api.run(path, A, B)[1] == again


def test_what_is_no_tape_or_cannot_be_kept_is_said(tmp_path):
    api, path = Api(), tmp_path / "tape.jsonl"
    with pytest.raises(ConfigError, match="nothing is recorded there"):
        api.run(path, A)
    for name in ("opaque", "loose"):
        with pytest.raises(ConfigError, match="annotate what the tool returns"):
            api.run(path, (name, {}), mode="record")
    path.write_text('{"tool": "find"}\n')
    with pytest.raises(ConfigError, match=r"tape\.jsonl, line 1: not a recorded call"):
        api.run(path, A)


def test_a_result_of_another_shape_is_said(tmp_path):
    api, path = Api(), tmp_path / "tape.jsonl"
    api.run(path, A, mode="record")
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "value": "text"}) + "\n")
    with pytest.raises(ConfigError, match="record it again"):
        api.run(path, A)


# A whole run --------------------------------------------------------------------------------------


def test_a_training_run_repeats_from_its_cassette_without_its_tools(tmp_path, monkeypatch):
    """The same numbers, and the search is never asked."""
    import agent_r1
    from agent_r1.tasks.hopworld import world as hopworld

    tape = str(tmp_path / "tape.jsonl")
    small = {
        "threads": 1, "train.iterations": 2, "train.tasks": 2, "train.attempts": 2,
        "evaluation": {"every": 0, "test_tasks": 0}, "env.cassette.path": tape,
    }  # fmt: skip
    first = agent_r1.train(
        "hopworld", run=tmp_path / "a", overrides={**small, "env.cassette.mode": "record"}
    )
    monkeypatch.setattr(hopworld, "search_facts", None)
    second = agent_r1.train("hopworld", run=tmp_path / "b", overrides=small)
    assert [row["figures"] for row in first.metrics[1:]] == [
        row["figures"] for row in second.metrics[1:]
    ]
    assert len((tmp_path / "tape.jsonl").read_text().splitlines()) > 4


def test_an_unseen_call_excludes_the_episode(tmp_path):
    from agent_r1.rollout.conversation import Limits
    from agent_r1.rollout.rollout import Rollout
    from tests.fakes import CharRenderer, ScriptedEngine

    class Env(ToolEnv):
        @tool
        async def ask(self, text: str) -> str:
            """Ask."""
            return text

        def score(self, answer):
            return 1.0

    def play(word, mode):
        settings = Env.Settings(name="env", cassette={"path": f"{tmp_path}/t.jsonl", "mode": mode})
        call = f'<tool_call>{{"name": "ask", "arguments": {{"text": "{word}"}}}}</tool_call>'
        rollout = Rollout(
            lambda: Env(settings), ScriptedEngine(call, "done"), CharRenderer(), Limits()
        )
        work = rollout.run([Task("t", "Q")], attempts=1, temperature=1.0, seed=0)
        return asyncio.run(work)[0].trajectories[0]

    assert play("x", "record").outcome.reward == 1.0
    assert play("x", "replay").outcome.reward == 1.0
    lost = play("y", "replay")
    assert lost.outcome is None
    assert "never recorded: ask" in lost.fault
