"""Memory round an environment: what the agent has before it, with scripted agents and the tiny
base.
"""

import asyncio
import functools

import pytest

from agent_r1 import Task, ToolEnv, Transition, check_env, tool
from agent_r1.envs.lifecycle import make_env
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.rollout import Rollout
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.tree import build_tree
from agent_r1.types import Kind, Message, StopReason, ToolCall
from tests.fakes import END, CharRenderer, ScriptedEngine

CALL = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'


class Room(ToolEnv):
    @tool
    async def look(self) -> str:
        """Look."""
        self.looks = getattr(self, "looks", 0) + 1
        return f"thing {self.looks}"

    def score(self, answer):
        return float(answer == "end")

    def gold(self):
        look = (ToolCall("look", {}),)
        words = ("one", "two", "three")
        return [*(Message("assistant", word, look) for word in words), "end"]


def play(memory, *lines, env=Room, turns=9):
    settings = Room.Settings(name="room", memory=memory)
    engine = ScriptedEngine(*lines)
    rollout = Rollout(
        functools.partial(make_env, env, settings), engine, CharRenderer(), Limits(turns=turns)
    )
    work = rollout.run([Task("t", "Q")], attempts=1, temperature=1.0, seed=0)
    trajectory = asyncio.run(work)[0].trajectories[0]
    shown = ["".join("|" if i == END else chr(i) for i in ids) for ids in engine.prefixes]
    return trajectory, shown


def test_recent_keeps_the_last_turns_whole_and_of_older_ones_the_notes():
    lines = [f"{word}{CALL}" for word in ("one", "two", "three")]
    trajectory, shown = play({"name": "recent", "turns": 1}, *lines, "end")
    assert trajectory.stop is StopReason.DONE
    assert trajectory.outcome.success
    one, two, three = (f"{line}|" for line in lines)
    assert shown == [
        "[user]Q",
        f"[user]Q{one}[tool]thing 1",
        f"[user]Q\nYour notes:\none{two}[tool]thing 2",
        f"[user]Q\nYour notes:\none\ntwo{three}[tool]thing 3",
    ]


def test_two_turns_stay_if_so_set_and_a_turn_without_words_leaves_no_note():
    trajectory, shown = play({"name": "recent", "turns": 2}, CALL, CALL, CALL, "end")
    turns = [f"{CALL}|[tool]thing {n}" for n in (1, 2, 3)]
    assert shown[2] == "[user]Q" + turns[0] + turns[1]
    assert shown[3] == "[user]Q" + turns[1] + turns[2]
    assert trajectory.outcome.success


def test_a_summary_is_an_action_and_all_that_is_left_with_the_latest_turns():
    lines = [f"one{CALL}", f"two{CALL}", f"so far: 1, 2{CALL}", f"three{CALL}", "end"]
    for turns, latest in ((0, ""), (1, f"{lines[1]}|[tool]thing 2")):
        memory = {"name": "summary", "every": 2, "turns": turns, "instruction": "Sum up."}
        trajectory, shown = play(memory, *lines)
        whole = f"[user]Q{lines[0]}|[tool]thing 1{lines[1]}|[tool]thing 2"
        assert shown[2] == f"{whole}[user]Sum up."
        left = "[user]Q\nYour summary:\nso far: 1, 2"  # and the call in it was not made
        assert shown[3] == left + latest
        assert shown[4] == f"{left}{latest}{lines[3]}|[tool]thing 3"
    assert trajectory.outcome.success
    kinds = {node.kind for node in build_tree_of(trajectory).nodes}
    assert kinds == {Kind.OBSERVATION, Kind.ACTION, Kind.CONTEXT}
    trained = [n.step for n in build_tree_of(trajectory).nodes if n.kind is Kind.ACTION]
    assert len(trained) == 5  # the summary is trained on by the outcome, like any action


def build_tree_of(trajectory):
    from agent_r1.types import Group

    return build_tree(Group(Task("t", "Q"), [trajectory]))


def test_an_empty_summary_leaves_the_question_alone():
    _, shown = play({"name": "summary", "every": 1, "turns": 0}, f"one{CALL}", CALL, "end")
    assert shown[2] == "[user]Q"


class Rewriting(Room):
    def interpret(self, results):
        shown = self.show(results).messages
        return Transition(history=[Message("user", "Q2"), *shown])


@pytest.mark.parametrize("memory", ["recent", {"name": "summary", "every": 1}])
def test_the_environments_own_rewriting_goes_first(memory):
    _, shown = play(memory, f"one{CALL}", "end", env=Rewriting)
    assert shown[1].startswith("[user]Q2[tool]thing 1")


@pytest.mark.parametrize("memory", ["recent", "summary", {"name": "summary", "every": 1}])
def test_hopworld_keeps_its_promises(memory):
    notes = check_env(HopWorld, HopWorld.Settings(memory=memory, train_hops=(1, 2, 3)))
    assert any("gold answer in 12 of 12" in note for note in notes)


def test_the_tiny_base_summarises_and_goes_on(base_policy, renderer, tokenizer):
    memory = {"name": "summary", "every": 1, "turns": 0, "instruction": "What is left?"}
    settings = HopWorld.Settings(train_hops=(2,), memory=memory)
    rollout = Rollout(
        functools.partial(make_env, HopWorld, settings),
        NativeEngine(NativeEngine.Settings(), base_policy),
        renderer,
        Limits(turns=6, tokens_per_turn=64, tokens=600),
    )
    tasks = HopWorld.tasks(settings, "train")[:4]
    groups = asyncio.run(rollout.run(tasks, attempts=4, temperature=1.0, seed=1))
    rewritten = [
        (before, step)
        for group in groups
        for t in group.trajectories
        for before, step in zip(t.steps, t.steps[1:], strict=False)
        if step.context_ids is not None
    ]
    assert rewritten
    for before, step in rewritten:
        seen = tokenizer.decode(step.context_ids)
        assert before.message.content in seen
        assert "<tool_response>" not in seen
