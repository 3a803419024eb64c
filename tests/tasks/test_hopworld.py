"""HopWorld: worlds, search, rewards, and splits that never share a world."""

import asyncio

import pytest

from agent_r1 import check_env
from agent_r1.envs.gold import as_message
from agent_r1.render.calls import parse_hermes
from agent_r1.tasks.hopworld import world as hw
from agent_r1.tasks.hopworld.env import HopWorld, gold_actions

SETTINGS = HopWorld.Settings()
SEARCH = '<tool_call>{"name": "search", "arguments": {"query": "%s"}}</tool_call>'


def message_of(said):
    """What the agent wrote, or a gold action."""
    return parse_hermes(said) if isinstance(said, str) else as_message(said)


def play(task, *texts):
    async def work():
        env = HopWorld(SETTINGS)
        await env.reset(task, 0)
        return [await env.step(message_of(text)) for text in texts], await env.outcome()

    return asyncio.run(work())


def test_contract():
    assert check_env(HopWorld, SETTINGS, num_tasks=9)


def test_a_world_is_what_the_description_says():
    world = hw.build_world(7, 3)
    assert len(world.facts) == 100
    assert len({fact.subject for fact in world.facts}) == 20
    people = [world.chain[0].subject, *(fact.object for fact in world.chain)]
    assert len(set(people)) == 4
    assert hw.build_world(7, 3) == world
    assert world.question == f"Who is {world.remaining(0)}?"
    assert world.question.count(" of ") == 3


def test_search_shows_the_fact_in_corpus_order():
    world = hw.build_world(11, 2)
    for fact in world.facts:
        found = hw.search_facts(world.facts, f"{fact.relation} of {fact.subject}")
        assert fact in found
        assert [world.facts.index(f) for f in found] == sorted(world.facts.index(f) for f in found)


def test_one_search_cannot_answer_two_hops():
    """The question as the query, all its documents read: an upper bound for naive retrieval."""
    tasks = HopWorld.tasks(HopWorld.Settings(test_hops=(2,)), "test")[:300]
    hits = 0
    for task in tasks:
        world = hw.build_world(task.data["seed"], 2)
        found = hw.search_facts(world.facts, task.question)
        hits += world.chain[0] in found and world.chain[1] in found
    assert hits / len(tasks) < 0.1


def test_no_world_is_in_two_splits():
    seen = set()
    for split in ("train", "validation", "test"):
        for task in HopWorld.tasks(SETTINGS, split)[:500]:
            world = hw.build_world(task.data["seed"], task.data["hops"])
            people = frozenset(fact.subject for fact in world.facts)
            assert people not in seen
            seen.add(people)


def test_hops_of_the_splits():
    assert {t.category for t in HopWorld.tasks(SETTINGS, "train")[:50]} == {"1", "2"}
    assert [t.category for t in HopWorld.tasks(SETTINGS, "test")[:4]] == ["1", "2", "3", "1"]


def test_process_rewards_cannot_be_farmed():
    task = HopWorld.tasks(HopWorld.Settings(train_hops=(2,)), "train")[0]
    gold = gold_actions(hw.build_world(task.data["seed"], 2))
    transitions, outcome = play(task, gold[0], gold[0], gold[0], gold[1], gold[1], gold[2])
    total = {"format": 0.0, "reached": 0.0, "answered": 0.0}
    for transition in transitions:
        for part, value in transition.rewards.items():
            total[part] += value
    assert total == {"format": 1.0, "reached": 1.0, "answered": 1.0}
    assert outcome.success


def test_a_second_fact_before_the_first_is_not_reached():
    task = HopWorld.tasks(HopWorld.Settings(train_hops=(2,)), "train")[1]
    gold = gold_actions(hw.build_world(task.data["seed"], 2))
    (transition,), _ = play(task, gold[1])
    assert transition.rewards["reached"] == 0.0


@pytest.mark.parametrize("text", ["", "Bana Dont", "<answer> Nobody Here </answer>", "<answer>"])
def test_wrong_answers(text):
    task = HopWorld.tasks(SETTINGS, "train")[0]
    assert not play(task, text)[1].success


def test_the_shipped_base_is_weak_at_two_hops_and_can_do_one(base_policy, renderer):
    """What the model card says, roughly: room to learn, and something to start from."""
    import functools

    from agent_r1.rollout.conversation import Limits
    from agent_r1.rollout.native.engine import NativeEngine
    from agent_r1.rollout.rollout import Rollout
    from agent_r1.training.evaluate import evaluate

    engine = NativeEngine(NativeEngine.Settings(), base_policy)
    limits = Limits(turns=6, tokens_per_turn=96, tokens=768)
    rollout = Rollout(functools.partial(HopWorld, SETTINGS), engine, renderer, limits)
    tasks = HopWorld.tasks(HopWorld.Settings(test_hops=(1, 2)), "test")[:120]
    scores = evaluate(rollout, tasks, temperature=1.0, seed=5).categories
    assert scores["1"].success > 0.5
    assert 0.05 < scores["2"].success < 0.5
