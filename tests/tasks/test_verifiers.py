"""verifiers: the example's taskset, its tools and its scoring, and what needs their harness."""

import asyncio
import re

import pytest

import agent_r1
from agent_r1 import check_env
from agent_r1.errors import ConfigError
from agent_r1.render.calls import parse_hermes
from agent_r1.tasks.adapters.verifiers import VerifiersEnv, _load, _trace
from agent_r1.types import Message
from tests import ROOT

EXAMPLES = ROOT / "examples"
SUMS = f"{EXAMPLES}/verifiers_sums.py:Sums"
SETTINGS = VerifiersEnv.Settings(taskset=SUMS)


def play(settings, script):
    async def work():
        env = VerifiersEnv(settings)
        task = VerifiersEnv.tasks(settings, "train")[0]
        opening = await env.reset(task, 0)
        for text in script(task):
            transition = await env.step(parse_hermes(text))
        return opening, env.schemas, transition, await env.outcome()

    return asyncio.run(work())


def total(task):
    return sum(map(int, re.findall(r"\d+", task.question)))


def test_contract():
    assert check_env(VerifiersEnv, SETTINGS)


def test_prompt_tools_and_reward_are_theirs():
    def script(task):
        a, b = re.findall(r"\d+", task.question)
        arguments = f'{{"a": {a}, "b": {b}}}'
        yield f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>'
        yield f"{total(task)}"

    opening, (schema,), transition, outcome = play(SETTINGS, script)
    assert re.fullmatch(r"What is \d+ \+ \d+\? Answer with the number alone\.", opening[0].content)
    assert schema["function"]["description"] == "Add two numbers."
    assert transition.done
    assert (outcome.reward, outcome.success) == (1.0, True)
    assert outcome.metrics == {"taskset_turns": 2.0}


def test_a_wrong_answer_and_none_score_nothing():
    assert play(SETTINGS, lambda task: ["-1"])[-1].reward == 0.0
    broken = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    _, _, transition, outcome = play(SETTINGS, lambda task: [broken, "<tool_call>{broken"])
    assert transition.events == ("mistake/malformed_call",)
    assert (outcome.reward, outcome.success) == (0.0, False)


def test_their_scoring_learns_that_a_limit_cut_the_answer_off():
    messages = [Message("user", "?"), Message("assistant", "1", cut=True)]
    (task, *_) = _load(SETTINGS).values()
    assert _trace(task, messages).is_truncated
    assert not _trace(task, [messages[0], Message("assistant", "1")]).is_truncated


TASKSETS = """
import verifiers.v1 as vf


class Data(vf.TaskData):
    pass


class InContainer(vf.Task[Data, vf.State, vf.TaskConfig]):
    NEEDS_CONTAINER = True


class NeedsRuntime(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, task, trace, runtime) -> float:
        return 1.0


class SetsUp(vf.Task[Data, vf.State, vf.TaskConfig]):
    async def setup(self, trace, runtime):
        await runtime.run(["true"])


class Setup(vf.Taskset[SetsUp, vf.TasksetConfig]):
    def load(self):
        yield SetsUp(Data(prompt="?"), self.config.task)


class Silent(vf.Taskset[vf.Task, vf.TasksetConfig]):
    def load(self):
        yield vf.Task(Data(), self.config.task)


class Container(vf.Taskset[InContainer, vf.TasksetConfig]):
    def load(self):
        yield InContainer(Data(prompt="?"), self.config.task)


class Runtime(vf.Taskset[NeedsRuntime, vf.TasksetConfig]):
    def load(self):
        yield NeedsRuntime(Data(prompt="?"), self.config.task)


class Empty(vf.Taskset[NeedsRuntime, vf.TasksetConfig]):
    def load(self):
        return []
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Container", "need a container"),
        ("Runtime", "right needs a runtime"),
        ("Setup", "setup needs a runtime"),
        ("Silent", "have no prompt"),
        ("Empty", "has no tasks"),
    ],
)
def test_what_needs_their_harness_is_refused(tmp_path, name, message):
    path = tmp_path / "tasksets.py"
    path.write_text(TASKSETS)
    with pytest.raises(ConfigError, match=message):
        VerifiersEnv.tasks(VerifiersEnv.Settings(taskset=f"{path}:{name}"), "train")


def test_a_taskset_that_is_not_installed_is_said():
    with pytest.raises(ConfigError, match=r"env\.taskset = 'no-such-set': .*not found"):
        VerifiersEnv.tasks(VerifiersEnv.Settings(taskset="no-such-set"), "train")


def test_it_trains(tmp_path):
    overrides = {
        "model": {"path": "hopworld-base"}, "env.taskset": SUMS,
        "train": {"iterations": 1, "tasks": 2, "attempts": 2}, "evaluation": {"every": 0},
    }  # fmt: skip
    recipe = EXAMPLES / "verifiers_sums.toml"
    result = agent_r1.train(recipe, run=tmp_path / "run", overrides=overrides)
    assert "stop/fault" not in result.metrics[-1]["figures"]
