"""People: a scripted user, a model as the user, and asking once, not always."""

import asyncio
import functools

import pytest

from agent_r1 import check_env
from agent_r1.envs.lifecycle import make_env
from agent_r1.envs.user import flipped
from agent_r1.errors import ConfigError
from agent_r1.render.calls import parse_hermes
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.rollout import Rollout
from agent_r1.run.recipe import load_recipe
from agent_r1.tasks.hopworld import world as hw
from agent_r1.tasks.hopworld.user import HopWorldUser
from agent_r1.types import Message
from tests.fakes import CharRenderer, ScriptedEngine

SETTINGS = HopWorldUser.Settings()
TASKS = HopWorldUser.tasks(SETTINGS, "train")[:200]
CLEAR, AMBIGUOUS = (next(t for t in TASKS if t.category == c) for c in ("clear", "ambiguous"))


def play(task, *texts, settings=SETTINGS):
    async def work():
        env = HopWorldUser(settings)
        await env.reset(task, 0)
        steps = []
        for text in texts:
            steps.append(await env.step(parse_hermes(text)))
            if steps[-1].done:
                break
        return steps, await env.outcome()

    return asyncio.run(work())


def right(task):
    return f"<answer> {task.answer} </answer>"


def test_contract():
    assert check_env(HopWorldUser, SETTINGS, num_tasks=8)


def test_ambiguous_questions_name_several_people_and_only_asking_tells_which():
    several = 0
    ambiguous = [task for task in TASKS if task.category == "ambiguous"]
    assert 80 <= len(ambiguous) <= 120
    for task in ambiguous:
        world = hw.build_world(task.data["seed"], task.data["hops"], task.data["family"])
        first = task.question.removesuffix("?").split(" ")[-1]
        meant = {fact.subject for fact in world.facts if fact.subject.split(" ")[0] == first}
        assert meant
        several += len(meant) > 1
    assert several / len(ambiguous) > 0.95


def test_asking_once_is_right_where_it_is_not_clear_and_costs_elsewhere():
    (asked, _), outcome = play(AMBIGUOUS, "Who do you mean?", right(AMBIGUOUS))
    assert asked.messages == (Message("user", AMBIGUOUS.data["meant"]),)
    assert asked.rewards == {"asked": 1.0}
    assert (outcome.reward, outcome.success) == (1.0, True)
    (asked, again, _), outcome = play(AMBIGUOUS, "Who?", "Who?", right(AMBIGUOUS))
    assert again.rewards == {"asked": 0.0}
    assert outcome.reward == pytest.approx(0.7)
    (asked, _), outcome = play(CLEAR, "Who?", right(CLEAR))
    assert asked.rewards == {"asked": 0.0}
    assert outcome.reward == pytest.approx(0.7)
    assert outcome.metrics == {"questions": 1.0, "needless": 1.0}
    _, outcome = play(CLEAR, right(CLEAR))
    assert outcome.reward == 1.0


def test_a_user_is_not_asked_for_ever():
    steps, outcome = play(CLEAR, "Who?", "Who?", "Who?", right(CLEAR))
    assert len(steps) == 3
    assert steps[-1].done
    assert outcome.reward == 0.0


def test_the_models_side_of_the_conversation():
    said = [Message("assistant", "Who?"), Message("user", "Ada."), Message("assistant", "Sure?")]
    assert flipped(said, "You know.") == [
        Message("system", "You know."),
        Message("user", "Who?"),
        Message("assistant", "Ada."),
        Message("user", "Sure?"),
    ]


@pytest.mark.parametrize("engine", ["native", "padded"])
def test_any_engine_can_be_the_user(engine):
    """The tiny base says nothing of use, but it is asked, answers in its turn, and again the same
    for the same seed.
    """
    user = {
        "name": "model", "model": {"path": "hopworld-base"}, "engine": engine, "max_tokens": 8,
    }  # fmt: skip
    settings = HopWorldUser.Settings(user=user)

    def answers():
        rollout = Rollout(
            functools.partial(make_env, HopWorldUser, settings),
            ScriptedEngine("Who do you mean?", right(AMBIGUOUS)),
            CharRenderer(),
            Limits(),
        )
        work = rollout.run([AMBIGUOUS, CLEAR], attempts=2, temperature=1.0, seed=0)
        groups = asyncio.run(work)
        trajectories = [t for group in groups for t in group.trajectories]
        assert all(t.fault is None for t in trajectories)
        return [t.steps[0].observation for t in trajectories]

    first = answers()
    assert all(message.role == "user" for (message,) in first)
    assert answers() == first


def test_settings_name_the_user():
    recipe, _ = load_recipe("hopworld-user", [("env.user.name", "model")])
    assert recipe.env.user.model.path == "smollm2-135m"
    assert type(recipe.env).model_validate(recipe.env.model_dump()).user == recipe.env.user
    recipe, notes = load_recipe(recipe.model_dump(), [("env.user.name", "scripted")])
    assert recipe.env.user.name == "scripted"
    assert any("dropped env.user.model" in note for note in notes)
    with pytest.raises(ConfigError, match="did you mean 'ambiguous'"):
        load_recipe("hopworld-user", [("env.ambigous", 1)])
    with pytest.raises(ConfigError, match="unknown user 'modell'; did you mean 'model'"):
        load_recipe("hopworld-user", [("env.user", "modell")])
