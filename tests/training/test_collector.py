"""Groups ahead of the learner: order, bound, window, the way back from a checkpoint."""

import asyncio
import dataclasses
import functools
import random

import pytest

from agent_r1.render.chatml import ChatML
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.rollout import Rollout
from agent_r1.run.checkpoint import Checkpoints, State
from agent_r1.run.recipe import TrainSettings
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.training.collector import Collector, Draws
from agent_r1.types import Group, Task, derive_seed
from agent_r1.utils.scope import run_async
from tests.fakes import ScriptedEngine

TASKS = [Task(f"t{number}", "Q") for number in range(7)]


class SlowRollout:
    """Groups that take as many turns of the event loop as ``turns_of`` their position says, or for
    ever; the version of the weights at their beginning is kept.
    """

    def __init__(self, turns_of):
        self.turns_of, self.version, self.began = turns_of, 0, {}
        self.engine, self.limits = ScriptedEngine("x"), Limits()

    async def episodes(self):
        from agent_r1.rollout.runner import Episodes

        return Episodes(self.engine, 4)

    def group(self, episodes, task, *, attempts, temperature, seed, index, first):
        position = first // attempts
        self.began[position] = self.version

        async def played():
            turns = self.turns_of(position)
            while turns is None:
                await asyncio.sleep(1)
            for _ in range(turns):
                await asyncio.sleep(0)
            return Group(task, [], position)

        return asyncio.ensure_future(played())


def collector(rollout, *, staleness, tasks=4, iterations=30):
    settings = TrainSettings(
        iterations=iterations, tasks=tasks, attempts=2, staleness=staleness, concurrency=4
    )
    draws = Draws(TASKS, settings, 0)
    return Collector(rollout, draws, settings), draws, settings


async def consumed(found, rollout, settings, *, before=0):
    """Positions by iteration; an update takes a while, too."""
    taken = []
    for iteration in range(before, settings.iterations):
        groups = await found.take(settings.tasks, iterations_left=settings.iterations - iteration)
        taken.append([group.number for group in groups])
        for _ in range(5):
            await asyncio.sleep(0)
        rollout.version += 1
    return taken


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_ages_stay_within_the_bound_and_nothing_is_lost(staleness):
    rng = random.Random(staleness)
    turns = [rng.choice([1, 2, 3, 200]) for _ in range(500)]
    rollout = SlowRollout(turns.__getitem__)
    found, draws, settings = collector(rollout, staleness=staleness)
    taken = asyncio.run(consumed(found, rollout, settings))
    assert sorted(n for row in taken for n in row) == [*range(draws.cursor)]
    assert draws.cursor == settings.iterations * settings.tasks
    bound = staleness + bool(staleness)
    ages = [
        iteration - rollout.began[position]
        for iteration, row in enumerate(taken)
        for position in row
    ]
    assert max(ages) <= bound and (max(ages) >= staleness)
    assert all(row == sorted(row) for row in taken)
    if not staleness:
        assert taken == [[*range(4 * n, 4 * n + 4)] for n in range(30)]
    else:
        assert any(row != [*range(min(row), min(row) + 4)] for row in taken), "none overtook"


def test_a_slow_group_holds_up_the_learner_only_when_its_window_is_used_up():
    """Position 0 never ends: of 12 groups alive those of the window, 4, may be taken: 3 of them."""

    async def scenario():
        rollout = SlowRollout(lambda position: None if position == 0 else 1)
        found, _, _ = collector(rollout, staleness=2, tasks=4)
        first = await asyncio.wait_for(found.take(3, iterations_left=9), 5)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(found.take(1, iterations_left=9), 0.2)
        await found.close()
        return [group.number for group in first]

    assert asyncio.run(scenario()) == [1, 2, 3]


def test_an_error_of_the_rollout_ends_the_run():
    async def scenario():
        rollout = SlowRollout(lambda position: 1 if position else 1 // 0)
        found, _, _ = collector(rollout, staleness=1)
        try:
            await found.take(4, iterations_left=9)
        finally:
            await found.close()

    with pytest.raises(ZeroDivisionError):
        asyncio.run(scenario())


def test_what_was_finished_is_kept_and_what_was_played_is_drawn_again(tmp_path, policy):
    from agent_r1.algorithms.grpo import GRPO
    from agent_r1.learner.learner import Learner
    from agent_r1.learner.settings import LearnerSettings

    def turns(position):
        return None if position in (5, 9) else 1

    async def first_life():
        rollout = SlowRollout(turns)
        found, draws, _ = collector(rollout, staleness=2)
        groups = await found.take(4, iterations_left=30)
        for _ in range(20):
            await asyncio.sleep(0)
        waiting = found.waiting()
        await found.close()
        assert found.waiting() == waiting  # a checkpoint after the end says the same
        return [group.number for group in groups], waiting, draws.cursor

    taken, waiting, cursor = asyncio.run(first_life())
    assert taken == [0, 1, 2, 3] and cursor == 12
    assert {n for n, group in waiting.items() if group is None} == {5, 9}
    learner = Learner(policy, GRPO(GRPO.Settings()), LearnerSettings(), temperature=1.0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(State(iteration=1, cursor=cursor), policy, learner, waiting)
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = checkpoints.restore(policy, learner)
    again = checkpoints.waiting(state)
    numbered = {n: group and dataclasses.replace(group, number=n) for n, group in again.items()}
    assert {n: group for n, group in waiting.items() if group} == {
        n: group for n, group in numbered.items() if group
    }
    assert again.keys() == waiting.keys()

    async def second_life():
        rollout = SlowRollout(lambda position: 1)
        rollout.version = state.iteration
        found, draws, _ = collector(rollout, staleness=2)
        draws.cursor = state.cursor
        found.restore(again)
        tasks = []
        for iteration in range(state.iteration, 4):
            groups = await found.take(4, iterations_left=4 - iteration)
            tasks += [group.task.id for group in groups]
        return tasks, [draws.at(n).task.id for n in range(4, 16)], sorted(rollout.began)

    tasks, expected, began = asyncio.run(second_life())
    assert sorted(tasks) == sorted(expected)
    assert began == [5, 9, 12, 13, 14, 15]  # the finished ones are not played again


def test_without_staleness_the_episodes_are_those_of_a_plain_rollout(base_policy):
    """The same tokens, log-probabilities and rewards, bit for bit, with the real engine."""
    env = HopWorld.Settings()
    renderer = ChatML(ChatML.Settings(), base_policy.tokenizer)
    limits = Limits(turns=4, tokens_per_turn=40, tokens=900)
    settings = TrainSettings(iterations=2, tasks=3, attempts=3, concurrency=9)
    tasks = HopWorld.tasks(env, "train")[:5]

    def rollout():
        engine = NativeEngine(NativeEngine.Settings(patience=60.0), base_policy)
        return Rollout(functools.partial(HopWorld, env), engine, renderer, limits, 9)

    async def collected():
        found = Collector(rollout(), Draws(tasks, settings, 5), settings)
        taken = [await found.take(3, iterations_left=2 - number) for number in range(2)]
        await found.close()
        return taken

    async def plain():
        given, found = rollout(), []
        for number in range(2):
            draws = [Draws(tasks, settings, 5).at(3 * number + index) for index in range(3)]
            drawn, seed = [draw.task for draw in draws], derive_seed(5, "iteration", number + 1)
            found.append(await given.run(drawn, attempts=3, temperature=1.0, seed=seed))
        return found

    def told(iterations):
        return [
            (t.task_id, t.prompt_ids, t.outcome, [step.action for step in t.steps])
            for groups in iterations
            for group in groups
            for t in group.trajectories
        ]

    assert told(run_async(collected())) == told(run_async(plain()))
