"""The worked example of docs/architecture.md, token for token."""

import re

import pytest

from agent_r1.algorithms import ALGORITHMS, CREDITS
from agent_r1.learner.credit_assignment import assign_credit, loss_weights
from agent_r1.tree import build_tree
from agent_r1.types import (
    Action,
    Estimates,
    Group,
    Message,
    Outcome,
    Step,
    StopReason,
    Task,
    Trajectory,
)
from tests import ROOT


def test_the_example_in_the_docs(tokenizer, renderer):
    text = (ROOT / "docs" / "architecture.md").read_text()

    def said(*ids):
        return ", ".join(map(str, ids)) in text

    def sampled(words):
        ids = tuple(tokenizer.encode(words, add_special_tokens=False))
        return Action(ids, (-0.1,) * len(ids), (0.5,) * len(ids), (), "stop")

    prompt = renderer.prompt([Message("user", "2 + 2?")], [])
    assert re.search(r"\s+".join(map(str, prompt)), text)
    call = sampled('<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><|im_end|>')
    right, wrong = sampled("4<|im_end|>"), sampled("5<|im_end|>")
    assert said(*call.token_ids[:3]) and said(*call.token_ids[-2:])
    assert said(*right.token_ids) and said(*wrong.token_ids)
    observed = renderer.observation([Message("tool", "4")], call)
    first = Trajectory(
        "t", "", 1, prompt_ids=prompt, stop=StopReason.DONE, outcome=Outcome(1, True)
    )
    first.steps = [
        Step(call, renderer.parse(call), (Message("tool", "4"),), observed),
        Step(right, renderer.parse(right)),
    ]
    second = Trajectory("t", "", 2, prompt_ids=prompt, stop=StopReason.DONE)
    second.outcome, second.steps = Outcome(0, False), [Step(wrong, renderer.parse(wrong))]
    group = Group(Task("t", "2 + 2?", "4"), [first, second])
    algorithm = ALGORITHMS.make(ALGORITHMS.section("grpo"))
    known = Estimates()
    credit = CREDITS.make(CREDITS.section("outcome"))
    assign_credit([group], known, algorithm, credit)
    advantages = [row[0] for row in known.advantages.values()]
    assert advantages == pytest.approx([0.707, 0.707, -0.707], abs=1e-3)
    weights = [weight.weight for weight in loss_weights([group], algorithm).values()]
    assert weights == pytest.approx([1 / 46, 1 / 46, 1 / 4])
    tree = build_tree(group)
    assert [len(node.token_ids) for node in tree.nodes] == [14, 21, 14, 2, 2]
    assert f"{tree.num_tokens} tokens in place of {first.num_tokens + second.num_tokens}" in text
