"""Environments that replace the history: what the agent has before it, and what is trained on."""

import asyncio
import functools

import pytest

from agent_r1.algorithms.credit import OutcomeCredit
from agent_r1.algorithms.grpo import GRPO
from agent_r1.envs.base import Transition
from agent_r1.envs.check_env import check_env
from agent_r1.envs.lifecycle import make_env
from agent_r1.envs.tool_env import ToolEnv
from agent_r1.learner.credit_assignment import assign_credit
from agent_r1.learner.learner import Learner
from agent_r1.learner.settings import LearnerSettings
from agent_r1.model.logprobs import token_logprobs
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.engine import Sampling, Session
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.rollout import Rollout
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.tree import build_tree
from agent_r1.types import Estimates, Kind, Message, Outcome, StopReason, Task
from tests.fakes import END, CharRenderer, ScriptedEngine

SETTINGS = HopWorld.Settings(train_hops=(3,), memory="recent")


class Summing(ToolEnv):
    """Keeps the agent's last message and a summary of what came before."""

    summary = "Q+"

    def reply(self, message):
        self.said = [*getattr(self, "said", []), message]
        if len(self.said) == 1:
            return Transition((Message("user", "go on"),))
        if len(self.said) == 2:
            summary = Message("user", self.summary)
            return Transition(history=[summary, message, Message("user", "and?")])
        return Transition(done=True)

    def score(self, answer):
        return 1.0


def play(env, engine, **limits):
    rollout = Rollout(env, engine, CharRenderer(), Limits(**limits))
    work = rollout.run([Task("t", "Q")], attempts=1, temperature=1.0, seed=0)
    return asyncio.run(work)[0].trajectories[0]


def text(token_ids):
    return "".join("|" if i == END else chr(i) for i in token_ids)


def test_the_policy_sees_the_new_history_and_its_own_tokens_in_it():
    engine = ScriptedEngine("one", "two", "three")
    trajectory = play(Summing, engine)
    assert [text(prefix) for prefix in engine.prefixes] == [
        "[user]Q",
        "[user]Qone|[user]go on",
        "[user]Q+two|[user]and?",
    ]
    first, second, third = trajectory.steps
    assert first.context_ids is None
    assert second.context_ids is None
    assert second.observation_ids == ()
    assert text(third.context_ids) == "[user]Q+two|[user]and?"
    assert trajectory.stop is StopReason.DONE


def test_a_history_that_ends_with_the_agent_is_a_fault_of_that_episode():
    class Wrong(Summing):
        def reply(self, message):
            return Transition(history=[Message("user", "Q"), message])

    trajectory = play(Wrong, ScriptedEngine("one"))
    assert trajectory.stop is StopReason.FAULT
    assert "must end with a message to the agent" in trajectory.fault


def test_a_history_beyond_the_limit_of_tokens_ends_the_episode():
    class Wordy(Summing):
        summary = "Q" * 50

    trajectory = play(Wordy, ScriptedEngine("one", "two", "three"), tokens=40)
    assert trajectory.stop is StopReason.MAX_TOKENS
    assert len(trajectory.steps) == 2


class Stuck(ScriptedEngine):
    """Never comes to an end."""

    def session(self, number: int = 0) -> Session:
        session = super().session(number)

        async def generate(prefix, sampling: Sampling, seed):
            await asyncio.sleep(30)

        session.generate = generate
        return session


def test_a_generation_that_takes_longer_than_the_episode_may_is_cut_off():
    trajectory = play(Summing, Stuck(), seconds=0.1)
    assert trajectory.stop is StopReason.MAX_TIME
    assert not trajectory.steps


# The real thing -----------------------------------------------------------------------------------


def test_the_environment_keeps_its_promises():
    check_env(HopWorld, SETTINGS)


@pytest.fixture(scope="module")
def groups(base_policy, renderer):
    engine = NativeEngine(NativeEngine.Settings(), base_policy)
    limits = Limits(turns=4, tokens_per_turn=64, tokens=600)
    rollout = Rollout(functools.partial(make_env, HopWorld, SETTINGS), engine, renderer, limits)
    tasks = HopWorld.tasks(SETTINGS, "train")[:2]
    return asyncio.run(rollout.run(tasks, attempts=4, temperature=1.0, seed=1))


def rewritten(groups):
    return [step for g in groups for t in g.trajectories for step in t.steps if step.context_ids]


def test_old_turns_are_dropped_and_notes_stay(groups, tokenizer):
    assert rewritten(groups)
    for group in groups:
        for trajectory in group.trajectories:
            for index, step in enumerate(trajectory.steps):
                if step.context_ids is None:
                    continue
                seen = tokenizer.decode(step.context_ids)
                before = trajectory.steps[index - 1]
                ids = "".join(map(chr, step.context_ids))
                assert "".join(map(chr, before.action.token_ids)) in ids  # token for token
                old = trajectory.steps[index - 2]
                assert old.message.content in seen
                shown = seen.count("<tool_response>")
                assert shown <= len(before.message.tool_calls)


def test_sampled_probabilities_are_those_under_the_rewritten_history(groups, base_policy):
    import torch

    for step in rewritten(groups):
        path = torch.tensor([[*step.context_ids, *step.action.token_ids]])
        with torch.inference_mode():
            logits = base_policy.model(path).logits[0, len(step.context_ids) - 1 : -1]
        expected, _ = token_logprobs(logits, path[0, len(step.context_ids) :], 1.0)
        assert (torch.tensor(step.action.logprobs) - expected).abs().max() < 1e-4


def test_reused_text_is_context_and_every_action_is_trained_once(groups, policy):
    tree = build_tree(*groups)
    assert any(node.kind is Kind.CONTEXT for node in tree.nodes)
    assert all((node.step is None) == (node.kind is not Kind.ACTION) for node in tree.nodes)
    for group in groups:
        for attempt, trajectory in enumerate(group.trajectories):
            trajectory.outcome = Outcome(float(attempt), False)
    known = Estimates()
    assign_credit(groups, known, GRPO(GRPO.Settings()), OutcomeCredit(OutcomeCredit.Settings()))
    learner = Learner(policy, GRPO(GRPO.Settings()), LearnerSettings(), temperature=1.0)
    update = learner.update(groups, known, lr=1e-4, seed=0)
    assert update.num_steps == 1
    assert update.logprob_error < 1e-4
    assert len(update.ratios) == sum(len(t.steps) for g in groups for t in g.trajectories)
    for ratios in update.ratios.values():
        assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-3)
