"""Noise: drawn from the seed, counted apart from faults, and seen by the environment as by the
agent.
"""

import asyncio
import dataclasses
import json
from collections import Counter

import pytest
from pydantic import BaseModel

from agent_r1 import Task, check_env, tool
from agent_r1.errors import ConfigError
from agent_r1.render.calls import parse_hermes
from agent_r1.run.recipe import load_recipe
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.tools.dispatcher import Dispatcher
from agent_r1.tools.noise import Noise, NoiseSettings
from agent_r1.types import ToolCall

KINDS = ("fail", "timeout", "late", "drop", "garble")


def always(kind, **settings):
    return Noise(NoiseSettings(**{kind: 1.0}, **settings), seed=1)


@tool
def words() -> str:
    """Ten words."""
    return "one two three four five six seven eight nine ten"


def run(noise, *, failure=None):
    dispatcher = Dispatcher({"words": words}, failure, noise)
    return asyncio.run(dispatcher.run([ToolCall("words", {})]))[0]


def test_kinds_are_drawn_as_often_as_set_and_the_same_for_the_same_seed():
    settings = NoiseSettings(fail=0.1, timeout=0.2, late=0.05, drop=0.3, garble=0.15)
    noise = Noise(settings, seed=7)
    drawn = [noise.draw(call, 0) for call in range(4000)]
    counts = Counter(drawn)
    for kind, probability in settings.probabilities().items():
        assert counts[kind] / 4000 == pytest.approx(probability, abs=0.03)
    assert counts[None] / 4000 == pytest.approx(0.2, abs=0.03)
    assert drawn == [Noise(settings, seed=7).draw(call, 0) for call in range(4000)]
    assert drawn != [Noise(settings, seed=8).draw(call, 0) for call in range(4000)]
    assert drawn != [noise.draw(call, 1) for call in range(4000)]  # a retry draws anew


@pytest.mark.parametrize("kind", KINDS)
def test_what_strikes_is_named_and_no_fault_of_anyone(kind):
    result = run(always(kind))
    assert result.events == (f"noise/{kind}:words",)
    assert result.error == {"fail": "exception", "timeout": "timeout"}.get(kind)
    assert not result.by_agent
    assert words.health.failures == 0


def test_a_dropped_result_lacks_words_and_a_garbled_one_letters():
    whole = words().split()
    dropped = run(always("drop")).value.split()
    assert len(dropped) == 7
    assert [word for word in whole if word in dropped] == dropped
    garbled = run(always("garble")).value
    assert garbled != words()
    assert list(map(len, garbled.split())) == list(map(len, whole))


def run_value(value):
    @tool
    async def give() -> object:
        """Give the value."""
        return value

    return asyncio.run(
        Dispatcher({"give": give}, None, always("garble", share=1.0)).run([ToolCall("give", {})])
    )[0]


def has_text(value):
    return "text" in repr(value)


class Model(BaseModel):
    text: str
    number: int


@dataclasses.dataclass
class Record:
    text: str
    number: int


@pytest.mark.parametrize(
    "value",
    [
        "a long enough text to be garbled",
        ["some text", "other text", "and more"],
        ("some text", 7),
        {"key": "some long text"},
        [Model(text="some text", number=3)],
        [Record("some text", 3), Record("other text", 4)],
        b"\x00\x01",
        17,
        None,
        [],
        "",
    ],
)
def test_any_value_keeps_its_type_and_grows_no_longer(value):
    assert run_value(value).events == (("noise/garble:give",) if has_text(value) else ())
    for kind in ("drop", "garble"):
        spoilt = always(kind).spoil(kind, value, 0, 0)
        assert type(spoilt) is type(value)
        assert len(repr(spoilt)) <= len(repr(value))


def test_records_keep_what_is_no_text():
    (record,) = always("garble", share=1.0).spoil("garble", [Record("some text", 3)], 0, 0)
    assert record.number == 3
    assert record.text != "some text"


def test_retries_meet_the_noise_again():
    from agent_r1.tools.failure_policy import FailurePolicy

    noise = Noise(NoiseSettings(fail=0.5), seed=3)
    first = next(call for call in range(50) if noise.draw(call, 0) and not noise.draw(call, 1))
    dispatcher = Dispatcher({"words": words}, {"words": FailurePolicy(retries=1, backoff=0)}, noise)
    dispatcher._num_calls = first
    (result,) = asyncio.run(dispatcher.run([ToolCall("words", {})]))
    assert result.value == words()
    assert result.events == ("noise/fail:words",)


def test_noise_alone_never_excludes_an_episode():
    from agent_r1.tools.failure_policy import FailurePolicy

    policy = FailurePolicy(on_failure="exclude")
    assert run(always("fail"), failure={"words": policy}).error == "exception"


def test_a_mistake_of_the_agent_stays_one_under_noise():
    dispatcher = Dispatcher({"words": words}, None, always("fail"))
    (result,) = asyncio.run(dispatcher.run([ToolCall("words", {"k": 1})]))
    assert result.events == ("mistake/invalid_arguments:words",)


# HopWorld -----------------------------------------------------------------------------------------


def test_hopworld_keeps_its_promises_under_noise():
    noise = {"fail": 0.2, "timeout": 0.1, "drop": 0.2, "garble": 0.2, "late": 0.05}
    settings = HopWorld.Settings(noise=noise)
    assert any("deterministic" in note for note in check_env(HopWorld, settings))


def search(query):
    call = {"name": "search", "arguments": {"query": query}}
    return parse_hermes(f"<tool_call>{json.dumps(call)}</tool_call>")


def play(settings, task: Task, messages):
    async def work():
        env = HopWorld(settings)
        await env.reset(task, 0)
        return [await env.step(message) for message in messages]

    return asyncio.run(work())


def test_a_fact_that_noise_took_away_is_not_reached_and_form_is_still_paid():
    clean = HopWorld.Settings(train_hops=(1,))
    task = HopWorld.tasks(clean, "train")[0]
    query = task.question.removeprefix("Who is the ").removesuffix("?")
    (seen,) = play(clean, task, [search(query)])
    assert seen.rewards == {"format": 1.0, "reached": 1.0}
    for kind in ("fail", "timeout", "garble"):
        noisy = HopWorld.Settings(train_hops=(1,), noise={kind: 1.0, "share": 1.0})
        (seen,) = play(noisy, task, [search(query)])
        assert seen.rewards == {"format": 1.0, "reached": 0.0}, kind
        assert seen.events == (f"noise/{kind}:search",)


def test_settings_are_checked():
    recipe, _ = load_recipe("hopworld", [("env.noise.fail", 0.25)])
    assert recipe.env.noise.fail == 0.25
    with pytest.raises(ConfigError, match=r"add up to 1\.2"):
        load_recipe("hopworld", [("env.noise", {"fail": 0.6, "drop": 0.6})])
    with pytest.raises(ConfigError, match="did you mean 'fail'"):
        load_recipe("hopworld", [("env.noise.fial", 0.25)])
