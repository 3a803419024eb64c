"""Agents that ask over HTTP are trained as those of an environment, token for token."""

import asyncio
import functools
import sys

import pytest

from agent_r1.errors import ConfigError
from agent_r1.gateway.agent import AgentEnv
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.rollout import Rollout
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.types import StopReason
from agent_r1.utils.scope import scope
from tests.gateway import agents

LIMITS = Limits(turns=6, tokens_per_turn=96, tokens=768, seconds=60.0)


def agent(**settings):
    given = {"tasks": "tests/gateway/agents.py:tasks", **settings}
    if "run" in given:
        given["run"] = f"tests/gateway/agents.py:{given['run']}"
    if "score" in given:
        given["score"] = f"tests/gateway/agents.py:{given['score']}"
    return functools.partial(AgentEnv, AgentEnv.Settings(**given))


def played(policy, renderer, make_env, *, num_tasks=4, attempts=2, limits=LIMITS):
    rollout = Rollout(make_env, NativeEngine(NativeEngine.Settings(), policy), renderer, limits)
    tasks = HopWorld.tasks(agents.SETTINGS, "train")[:num_tasks]
    with scope() as here:
        return here.run(rollout.run(tasks, attempts=attempts, temperature=1.0, seed=3))


def tokens_of(groups):
    return [
        (
            trajectory.prompt_ids,
            [(s.context_ids, s.action.token_ids, s.observation_ids) for s in trajectory.steps],
            trajectory.outcome,
        )
        for group in groups
        for trajectory in group.trajectories
    ]


@pytest.fixture(scope="module")
def by_environment(base_policy, renderer):
    groups = played(base_policy, renderer, functools.partial(HopWorld, agents.SETTINGS))
    assert sum(len(t.steps) for group in groups for t in group.trajectories) > 12
    return groups


@pytest.mark.parametrize(
    "run",
    [
        "run",
        "streamed",
        "with_responses",
        "with_streamed_responses",
        "with_named_responses",
        "with_messages",
        "with_streamed_messages",
    ],
)
def test_episodes_are_those_of_the_environment(base_policy, renderer, by_environment, run):
    groups = played(base_policy, renderer, agent(run=run))
    assert tokens_of(groups) == tokens_of(by_environment)
    for group, other in zip(groups, by_environment, strict=True):
        for mine, theirs in zip(group.trajectories, other.trajectories, strict=True):
            assert mine.stop == theirs.stop and mine.prompt == theirs.prompt
            for step, same in zip(mine.steps, theirs.steps, strict=True):
                assert step.action.logprobs == pytest.approx(same.action.logprobs, abs=1e-4)
                assert step.message == same.message and step.observation == same.observation


def test_rewards_can_be_posted(base_policy, renderer):
    (group,) = played(base_policy, renderer, agent(run="posted"), num_tasks=1, attempts=1)
    (trajectory,) = group.trajectories
    assert trajectory.stop is StopReason.DONE and trajectory.fault is None
    assert trajectory.process_reward() == {"effort": 0.75}
    assert trajectory.outcome.reward == 2.5 and not trajectory.outcome.success
    assert trajectory.outcome.metrics == {"f1": 0.5}
    assert len(trajectory.steps[0].action.token_ids) <= 5


def test_an_agent_that_fails_is_a_fault(base_policy, renderer):
    (group,) = played(base_policy, renderer, agent(run="broken"), num_tasks=1, attempts=1)
    (trajectory,) = group.trajectories
    assert trajectory.stop is StopReason.FAULT and trajectory.outcome is None
    assert "the database is gone" in trajectory.fault


def test_an_agent_that_thinks_too_long_gets_nothing(base_policy, renderer):
    limits = LIMITS.model_copy(update={"seconds": 0.5})
    make = agent(run="thinks")
    (group,) = played(base_policy, renderer, make, num_tasks=1, attempts=1, limits=limits)
    (trajectory,) = group.trajectories
    assert trajectory.stop is StopReason.MAX_TIME and len(trajectory.steps) == 1
    assert trajectory.outcome.reward == 0.0 and trajectory.fault is None


def test_an_agent_that_meets_a_limit_is_none(base_policy, renderer):
    limits = Limits(turns=3, tokens_per_turn=16, tokens=768)
    make = agent(run="endless")
    (group,) = played(base_policy, renderer, make, num_tasks=1, attempts=1, limits=limits)
    (trajectory,) = group.trajectories
    assert trajectory.stop is StopReason.MAX_TURNS and len(trajectory.steps) == 3
    assert trajectory.outcome.reward == 0.0
    assert all(step.context_ids is None for step in trajectory.steps)


COMMAND = """
import json, os, sys, urllib.request
task = json.loads(os.environ["AGENT_R1_TASK"])
assert task["question"] == sys.argv[1]
body = {"messages": [{"role": "user", "content": sys.argv[1]}]}
head = {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
urllib.request.install_opener(urllib.request.build_opener(urllib.request.ProxyHandler({})))
json.load(urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), head)))
print(42)
"""


def test_a_command_is_an_agent(base_policy, renderer):
    make = agent(command=(sys.executable, "-c", COMMAND, "{question}"), score="score")
    (group,) = played(base_policy, renderer, make, num_tasks=1)
    for trajectory in group.trajectories:
        assert trajectory.fault is None and trajectory.outcome.success
        assert trajectory.steps[-1].results[0].text.strip() == "42"


def test_a_command_that_hangs_is_killed_with_its_children(base_policy, renderer, tmp_path):
    mark = tmp_path / "alive"
    script = f"sleep 3 && touch {mark} & sleep 30"
    limits = LIMITS.model_copy(update={"seconds": 0.7})
    make = agent(command=("sh", "-c", script), score="score")
    (group,) = played(base_policy, renderer, make, num_tasks=1, attempts=1, limits=limits)
    assert group.trajectories[0].stop is StopReason.MAX_TIME
    asyncio.run(asyncio.sleep(3.2))
    assert not mark.exists()


def test_a_command_that_leaves_something_running_has_answered(base_policy, renderer):
    make = agent(command=("sh", "-c", "sleep 30 & echo 42"), score="score")
    (group,) = played(base_policy, renderer, make, num_tasks=1, attempts=1)
    (trajectory,) = group.trajectories
    assert trajectory.stop is StopReason.DONE and trajectory.outcome.success
    assert trajectory.seconds < 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of the two"),
        ({"run": "run", "command": ["true"]}, "one of the two"),
    ],
)
def test_which_agent_must_be_clear(settings, message):
    with pytest.raises(ValueError, match=message):
        agent(**settings)


def test_a_parameter_that_nobody_gives_is_named():
    with pytest.raises(ConfigError, match=r"its parameter 'env'.*base_url"):
        agent(run="seen")()
