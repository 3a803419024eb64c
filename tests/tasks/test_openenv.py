"""OpenEnv: the example's server in a process of its own."""

import asyncio

import pytest

import agent_r1
from agent_r1 import check_env
from agent_r1.errors import ConfigError
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.rollout import Rollout
from agent_r1.tasks.adapters.openenv import OpenEnv
from agent_r1.types import StopReason
from tests import ROOT
from tests.fakes import CharRenderer, ScriptedEngine
from tests.servers import openenv_example, stop

EXAMPLE = ROOT / "examples" / "openenv_server.py"


@pytest.fixture(scope="module")
def url():
    with openenv_example() as (_, url):
        yield url


def play(settings, *lines, attempts=1, env=OpenEnv):
    rollout = Rollout(
        lambda: env(settings), ScriptedEngine(*lines), CharRenderer(), Limits(turns=9)
    )
    task = OpenEnv.tasks(settings, "train")[0]
    work = rollout.run([task], attempts=attempts, temperature=1.0, seed=0)
    return asyncio.run(work)[0].trajectories


def test_contract(url):
    assert check_env(OpenEnv, OpenEnv.Settings(url=url, field="guess", tasks=20), num_tasks=2)


def test_text_into_a_field_and_many_sessions_at_once(url):
    settings = OpenEnv.Settings(url=url, field="guess", observation="hint", system="Guess.")
    trajectories = play(settings, *map(str, range(1, 10)), attempts=12)
    for trajectory in trajectories:
        assert trajectory.prompt[1].content == "Your guess?"
        assert trajectory.stop is StopReason.DONE
        assert (trajectory.outcome.reward, trajectory.outcome.success) == (1.0, True)
        said = [step.observation[0].content for step in trajectory.steps]
        assert said == ["Higher."] * (len(said) - 1) + ["Right."]
    assert len({len(t.steps) for t in trajectories}) == 1  # all attempts meet the same instance


def test_a_tool_with_the_servers_own_schema(url):
    settings = OpenEnv.Settings(url=url)
    (function,) = (schema["function"] for schema in OpenEnv(settings).schemas)
    assert function["parameters"]["properties"] == {"guess": {"type": "integer"}}
    line = '<tool_call>{"name": "act", "arguments": {"guess": 5}}</tool_call>'
    (trajectory,) = play(settings, line)
    message = trajectory.steps[0].observation[0]
    assert message.role == "tool"
    assert '"hint": ' in message.content


def test_what_is_no_action_is_the_agents_mistake(url):
    (trajectory,) = play(OpenEnv.Settings(url=url, field="guess"), "seven")
    assert trajectory.stop is StopReason.MAX_TURNS
    assert trajectory.steps[0].events == ("mistake/rejected",)
    assert trajectory.steps[0].observation[0].content.startswith("Error: ")
    (trajectory,) = play(OpenEnv.Settings(url=url), "seven")
    assert trajectory.steps[0].events == ("mistake/no_action",)


def test_a_server_that_goes_excludes_the_episode_and_is_said_before_a_run():
    with openenv_example() as (process, url):
        settings = OpenEnv.Settings(url=url, field="guess", timeout=5)

        class Killing(OpenEnv):
            async def step(self, message):
                stop(process)
                return await super().step(message)

        (trajectory,) = play(settings, "1", env=Killing)
    assert trajectory.stop is StopReason.FAULT
    assert trajectory.outcome is None
    with pytest.raises(ConfigError, match="no OpenEnv server answers there"):
        OpenEnv(settings.model_copy(update={"url": "http://127.0.0.1:9"}))


def test_a_wrong_field_is_said(url):
    with pytest.raises(ConfigError, match=r"env\.field = 'gues': the action has guess"):
        OpenEnv(OpenEnv.Settings(url=url, field="gues"))


def test_it_trains(url, tmp_path):
    overrides = {
        "model": {"path": "hopworld-base"}, "env.url": url,
        "train": {"iterations": 1, "tasks": 2, "attempts": 2}, "evaluation": {"every": 0},
    }  # fmt: skip
    recipe = EXAMPLE.parent / "openenv.toml"
    result = agent_r1.train(recipe, run=tmp_path / "run", overrides=overrides)
    assert "stop/fault" not in result.metrics[-1]["figures"]
