"""Gymnasium: FrozenLake by its text rendering, riddles of reasoning-gym, what cannot be played."""

import asyncio
import io

import gymnasium
import numpy as np
import pytest

import agent_r1
from agent_r1 import check_env
from agent_r1.errors import ConfigError, EnvCheckError
from agent_r1.render.calls import parse_hermes
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.rollout import Rollout
from agent_r1.tasks.adapters.gymnasium import GymEnv
from agent_r1.types import StopReason
from tests.fakes import CharRenderer, ScriptedEngine

LAKE = {
    "id": "FrozenLake-v1",
    "kwargs": {"is_slippery": False, "desc": ["SF", "FG"]},
    "actions": ("left", "down", "right", "up"),
    "tasks": 20,
}
RIDDLES = {
    "id": "Riddles-v0",
    "module": "examples/reasoning_game.py:register",
    "kwargs": {"dataset": "leg_counting"},
    "success": 0.25,
    "tasks": 20,
}


def play(settings, *lines, turns=20):
    rollout = Rollout(
        lambda: GymEnv(settings), ScriptedEngine(*lines), CharRenderer(), Limits(turns=turns)
    )
    task = GymEnv.tasks(settings, "train")[0]
    work = rollout.run([task], attempts=1, temperature=1.0, seed=0)
    return asyncio.run(work)[0].trajectories[0]


@pytest.mark.parametrize("game", [LAKE, RIDDLES])
def test_contract(game):
    assert check_env(GymEnv, GymEnv.Settings(**game))


def test_frozen_lake_is_read_and_walked():
    trajectory = play(GymEnv.Settings(**LAKE), "I go <action>Down</action>.", "2")
    assert trajectory.prompt[0].content.endswith("one of left, down, right, up.")
    assert trajectory.prompt[1].content == "[S]F\nFG"
    assert trajectory.steps[0].observation[0].content == "(Down)\nSF\n[F]G"
    assert trajectory.stop is StopReason.DONE
    assert (trajectory.outcome.reward, trajectory.outcome.success) == (1.0, True)


def test_what_is_no_action_is_the_agents_mistake_and_changes_nothing():
    trajectory = play(GymEnv.Settings(**LAKE), "fly", "down", "right")
    said = trajectory.steps[0].observation[0].content
    assert said == "That is no action; the actions are: left, down, right, up."
    assert trajectory.steps[0].events == ("mistake/no_action",)
    assert trajectory.outcome.success


def test_names_go_before_numbers():
    settings = GymEnv.Settings(**LAKE)
    other = GymEnv.Settings(**{**LAKE, "actions": ("3", "2", "1", "0")})
    assert GymEnv(settings)._action("2") == 2
    assert GymEnv(other)._action("3") == 0
    assert GymEnv(settings)._action("4") is None


def test_rewards_may_stay_with_their_steps():
    trajectory = play(GymEnv.Settings(**LAKE, rewards="steps"), "down", "right")
    assert [step.rewards for step in trajectory.steps] == [{"game": 0.0}, {"game": 1.0}]
    assert (trajectory.outcome.reward, trajectory.outcome.success) == (0.0, True)


def test_the_games_own_limit_truncates():
    kwargs = {**LAKE["kwargs"], "max_episode_steps": 3}
    trajectory = play(GymEnv.Settings(**{**LAKE, "kwargs": kwargs}), "left")
    assert trajectory.stop is StopReason.MAX_TURNS
    assert trajectory.stop.truncated
    assert len(trajectory.steps) == 3


def test_slippery_ice_depends_on_the_seed_alone():
    settings = GymEnv.Settings(**{**LAKE, "kwargs": {"is_slippery": True}})

    def path(seed):
        async def work():
            env = GymEnv(settings)
            await env.reset(GymEnv.tasks(settings, "train")[0], seed)
            steps = []
            for _ in range(8):
                steps.append(await env.step(parse_hermes("right")))
                if steps[-1].done:
                    break
            return steps

        return asyncio.run(work())

    assert path(1) == path(1)
    assert any(path(1) != path(seed) for seed in range(2, 6))


def test_a_game_of_reasoning_gym_with_text_actions():
    import re

    settings = GymEnv.Settings(**RIDDLES)
    wrong = play(settings, "-1")
    assert [step.observation[0].content for step in wrong.steps] == ["Wrong, guess again."] * 3
    assert not wrong.outcome.success
    import reasoning_gym

    assert re.search("how many legs", wrong.prompt[1].content)
    dataset = reasoning_gym.create_dataset("leg_counting", size=1, seed=1)
    assert dataset.score_answer(dataset[0]["answer"], dataset[0]) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "FrozenLak-v1"}, "FrozenLak"),
        ({"actions": ("left", "right")}, "2 names, but 'FrozenLake-v1' has 4 actions"),
        ({"id": "Pendulum-v1", "kwargs": {}, "actions": ()}, "not discrete or text"),
        ({"kwargs": {"is_slipery": False}}, "is_slipery"),
        ({**RIDDLES, "actions": ("a",)}, "takes any text"),
        ({"module": "examples/nope.py:register"}, "there is no file"),
    ],
)
def test_what_cannot_be_played_is_said(change, message):
    settings = GymEnv.Settings(**{**LAKE, **change})
    with pytest.raises(ConfigError, match=message):
        GymEnv(settings)


class Door(gymnasium.Env):
    """Two doors, right the second; ``odd`` is what it does unlike Gymnasium's own."""

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012  # as Gymnasium has it
    action_space = gymnasium.spaces.Discrete(2)
    observation_space = gymnasium.spaces.Discrete(2)

    def __init__(self, render_mode=None, odd=""):
        self.render_mode, self._odd = render_mode, odd

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0 if self._odd == "reset" else (0, {})

    def step(self, action):
        if self._odd == "raises":
            raise KeyError("hinge")
        right = float(action == 1)
        rewards = {"array": np.array([right]), "vector": np.ones(2), "nan": float("nan")}
        return 1, rewards.get(self._odd, right), True, False, {}

    def render(self):
        if self._odd == "none":
            return None
        return io.StringIO("[door]") if self._odd == "stringio" else "[door]"


gymnasium.register("tests/Door-v0", Door)


def door(odd):
    return GymEnv.Settings(id="tests/Door-v0", kwargs={"odd": odd}, success=1.0)


@pytest.mark.parametrize("odd", ["", "array", "stringio"])
def test_what_a_game_does_a_little_otherwise_is_understood(odd):
    assert "random valid actions were played" in "".join(check_env(GymEnv, door(odd)))
    played = play(door(odd), "1")
    assert played.prompt[-1].content == "[door]"
    assert (played.outcome.reward, played.outcome.success) == (1.0, True)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ("reset", r"reset must return \(observation, info\)"),
        ("raises", "KeyError.*hinge"),
        ("vector", "must be one number"),
        ("nan", "the reward is nan"),
        ("none", r"render\(\) gives None, no text"),
    ],
)
def test_what_no_run_can_do_with_is_found_by_check(odd, words):
    with pytest.raises(EnvCheckError, match=words):
        check_env(GymEnv, door(odd))


def test_it_trains(tmp_path):
    """The tiny base cannot speak of ice; that a run goes through does not depend on it."""
    recipe = {
        "env": {"name": "gymnasium", **LAKE},
        "limits": {"turns": 3, "tokens_per_turn": 8},
        "train": {"iterations": 1, "tasks": 2, "attempts": 2},
        "evaluation": {"every": 1, "tasks": 2},
    }
    result = agent_r1.train(recipe, run=tmp_path / "run")
    assert result.metrics[-1]["figures"]["mistake/no_action"] > 0
