"""Failure policies: retries, breakers, hanging threads, and episodes that do not count."""

import asyncio
import threading
import time

import pytest

from agent_r1 import Task, ToolEnv, tool
from agent_r1.errors import CallError, ConfigError, ToolFailureError
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.rollout import Rollout
from agent_r1.rollout.runner import MAX_RESAMPLES
from agent_r1.tools.dispatcher import Dispatcher
from agent_r1.tools.failure_policy import MAX_HANGING, Breaker, FailurePolicy
from agent_r1.types import StopReason, ToolCall
from tests.fakes import CharRenderer, ScriptedEngine


class Flaky:
    """A tool that fails so many times, then works."""

    def __init__(self, failures, error=OSError):
        self.calls = 0

        @tool
        async def flaky() -> str:
            """Fail, then work."""
            self.calls += 1
            if self.calls <= failures:
                raise error("down")
            return "up"

        self.tool = flaky

    def run(self, policy, times=1):
        dispatcher = Dispatcher({"flaky": self.tool}, {"flaky": policy})

        async def work():
            return [(await dispatcher.run([ToolCall("flaky", {})]))[0] for _ in range(times)]

        return asyncio.run(work())


def test_retries_with_backoff_and_every_failed_try_is_counted():
    flaky = Flaky(2)
    start = time.perf_counter()
    (result,) = flaky.run(FailurePolicy(retries=2, backoff=0.05))
    assert result.value == "up"
    assert result.events == ("fault/exception:flaky",) * 2
    assert time.perf_counter() - start >= 0.05 + 0.1


def test_a_tool_that_stays_down_is_an_observation_by_default():
    flaky = Flaky(99)
    (result,) = flaky.run(FailurePolicy(retries=1, backoff=0))
    assert (result.error, flaky.calls) == ("exception", 2)
    assert not result.by_agent


def test_a_rejected_call_is_the_agents_mistake_and_not_tried_again():
    flaky = Flaky(99, error=CallError)
    policy = FailurePolicy(retries=3, on_failure="exclude", breaker=Breaker(failures=1))
    (result,) = flaky.run(policy)
    assert (result.error, result.detail, flaky.calls) == ("rejected", "down", 1)
    assert result.events == ("mistake/rejected:flaky",)
    assert flaky.tool.health.failures == 0


def test_a_rejection_in_a_process_of_its_own_is_one_too():
    @tool(isolated=True, timeout=30)
    def strict() -> None:
        """Reject."""
        from agent_r1 import CallError

        raise CallError("no such thing")

    (result,) = asyncio.run(Dispatcher({"strict": strict}).run([ToolCall("strict", {})]))
    assert (result.error, result.detail) == ("rejected", "no such thing")


class Holder(ToolEnv):
    word = "mine"

    @tool(isolated=True, timeout=60)
    def own(self) -> str:
        """A method in a process of its own."""
        return self.word

    def score(self, answer):
        return 1.0


def test_a_method_can_have_a_process_of_its_own():
    async def work():
        env = Holder(Holder.Settings(name="holder"))
        await env.reset(Task("t", "Q"), 0)
        return await env.run_tools([ToolCall("own", {})])

    (result,) = asyncio.run(work())
    assert (result.value, result.detail) == ("mine", "")


def test_a_recipe_changes_what_it_names_and_no_more():
    declared = FailurePolicy(timeout=5, on_failure="exclude", breaker=Breaker(failures=2))
    changed = declared.changed_by(FailurePolicy.model_validate({"retries": 1}))
    assert changed == declared.model_copy(update={"retries": 1})
    stored = ToolEnv.Settings(name="x", failure={"t": {"retries": 1}}).model_dump(mode="json")
    assert stored["failure"] == {"t": {"retries": 1}}  # so that a resumed run is the same


@pytest.mark.parametrize("on_failure", ["resample", "exclude"])
def test_a_policy_can_take_the_episode_out(on_failure):
    with pytest.raises(ToolFailureError, match="flaky: exception: OSError: down") as error:
        Flaky(99).run(FailurePolicy(on_failure=on_failure))
    assert error.value.resample == (on_failure == "resample")
    assert error.value.events == ("fault/exception:flaky",)


def test_of_several_that_fail_the_one_that_ends_more_goes_first():
    flaky, other = Flaky(9), Flaky(9)
    flaky.tool.parallel = other.tool.parallel = True
    tools = {"flaky": flaky.tool, "other": other.tool}
    policies = {
        "flaky": FailurePolicy(on_failure="resample"), "other": FailurePolicy(on_failure="exclude"),
    }  # fmt: skip
    dispatcher = Dispatcher(tools, policies)
    with pytest.raises(ToolFailureError) as error:
        asyncio.run(dispatcher.run([ToolCall("flaky", {}), ToolCall("other", {})]))
    assert not error.value.resample
    assert len(error.value.events) == 2


def test_a_broken_circuit_lets_nothing_through_until_its_time_then_one():
    flaky = Flaky(3)
    policy = FailurePolicy(breaker=Breaker(failures=2, cooldown=0.2))
    results = flaky.run(policy, times=4)
    assert [r.error for r in results] == ["exception", "exception", "unavailable", "unavailable"]
    assert "failed 2 times in a row" in results[2].detail
    assert results[2].events == ("fault/unavailable:flaky",)
    assert flaky.calls == 2
    time.sleep(0.25)
    first, second = flaky.run(policy, times=2)  # the trial fails: it stays broken
    assert (first.error, second.error) == ("exception", "unavailable")
    time.sleep(0.25)
    assert [r.value for r in flaky.run(policy, times=2)] == ["up", "up"]


def test_hanging_threads_are_bounded_and_the_tool_comes_back():
    release = threading.Event()

    @tool(timeout=0.02)
    def hang() -> str:
        """Hang until released."""
        release.wait(30)
        return "done"

    dispatcher = Dispatcher({"hang": hang})

    async def call(times):
        return [(await dispatcher.run([ToolCall("hang", {})]))[0] for _ in range(times)]

    before = threading.active_count()
    results = asyncio.run(call(MAX_HANGING + 10))
    assert [r.error for r in results] == ["timeout"] * MAX_HANGING + ["unavailable"] * 10
    assert threading.active_count() - before == MAX_HANGING == hang.health.hanging
    release.set()
    deadline = time.time() + 10
    while hang.health.hanging and time.time() < deadline:
        time.sleep(0.01)
    assert asyncio.run(call(1))[0].value == "done"


def test_the_recipe_goes_before_the_tool_and_names_it_rightly():
    @tool(timeout=10, failure=FailurePolicy(retries=1))
    async def slow() -> None:
        """Wait."""
        await asyncio.sleep(5)

    assert slow.failure.retries == 1
    dispatcher = Dispatcher({"slow": slow}, {"slow": FailurePolicy(timeout=0.05)})
    (result,) = asyncio.run(dispatcher.run([ToolCall("slow", {})]))
    assert result.detail == "slow gave no result within 0.05 seconds"
    with pytest.raises(
        ConfigError, match=r"env\.failure\.sloww: no such tool; did you mean 'slow'"
    ):
        Dispatcher({"slow": slow}, {"sloww": FailurePolicy()})


# Whole episodes -----------------------------------------------------------------------------------

CALL = '<tool_call>{"name": "roll", "arguments": {}}</tool_call>'


class Dice(ToolEnv):
    """Its tool fails in the first ``bad`` calls of all episodes."""

    bad = 0
    calls = 0
    on_failure = "resample"

    @tool
    async def roll(self) -> str:
        """Roll."""
        type(self).calls += 1
        if type(self).calls <= type(self).bad:
            raise OSError("no dice")
        return "six"

    def score(self, answer):
        return 1.0


def play(bad, on_failure, attempts=1, concurrency=4, **policy):
    env = type("Dice2", (Dice,), {"bad": bad, "calls": 0})
    failure = {"roll": FailurePolicy(on_failure=on_failure, **policy)}
    settings = Dice.Settings(name="dice", failure=failure)
    engine = ScriptedEngine(CALL, "done")
    rollout = Rollout(
        lambda: env(settings), engine, CharRenderer(), Limits(turns=3), concurrency=concurrency
    )
    work = rollout.run([Task("t", "Q")], attempts=attempts, temperature=1.0, seed=0)
    return asyncio.run(work)[0].trajectories, env.calls


def test_a_resampled_episode_is_played_again_and_counts():
    (trajectory,), _ = play(bad=2, on_failure="resample")
    assert trajectory.stop is StopReason.DONE
    assert trajectory.discarded == 2
    assert trajectory.outcome.reward == 1.0
    assert trajectory.steps[0].events == ()
    assert trajectory.discarded_events == ("fault/exception:roll",) * 2  # counted all the same


def test_resampling_ends_and_excludes():
    (trajectory,), calls = play(bad=99, on_failure="resample")
    assert trajectory.stop is StopReason.FAULT
    assert trajectory.outcome is None
    assert calls == 1 + MAX_RESAMPLES == trajectory.discarded + 1


def test_excluding_is_for_that_episode_alone():
    trajectories, _ = play(bad=1, on_failure="exclude", attempts=6, concurrency=1)
    assert [t.outcome is None for t in trajectories] == [True] + [False] * 5
    assert "no dice" in trajectories[0].fault
    assert trajectories[0].steps[0].events == ("fault/exception:roll",)


def test_replays_wait_for_a_broken_circuit():
    Dice.roll.health.__init__()
    breaker = Breaker(failures=1, cooldown=0.3)
    trajectories, _ = play(bad=1, on_failure="resample", attempts=8, breaker=breaker)
    assert all(t.outcome.reward == 1.0 for t in trajectories)


def test_many_resampled_episodes_stay_in_order_within_the_concurrency():
    trajectories, calls = play(bad=5, on_failure="resample", attempts=12, concurrency=3)
    assert [t.attempt for t in trajectories] == list(range(12))
    assert all(t.outcome.reward == 1.0 for t in trajectories)
    assert sum(t.discarded for t in trajectories) == 5
    assert calls == 17
