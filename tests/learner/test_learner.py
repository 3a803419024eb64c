"""The learner on the real tiny model, against a forward pass per sequence written out here."""

import asyncio
import copy
import dataclasses
import functools
import math

import pytest
import torch

from agent_r1.algorithms.credit import OutcomeCredit, StepCredit
from agent_r1.algorithms.grpo import GRPO
from agent_r1.learner.credit_assignment import (
    assign_credit,
    informative,
    loss_weights,
    minibatches,
    steps_of,
)
from agent_r1.learner.learner import Learner
from agent_r1.learner.micro_batch import Batch
from agent_r1.learner.packed_trees import packs
from agent_r1.learner.settings import LearnerSettings
from agent_r1.learner.sums import Sums
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.rollout import Rollout
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.types import Estimates, Outcome, StepKey


@pytest.fixture
def groups(base_policy, renderer):
    """Two groups of real episodes whose outcomes differ; several turns, unequal lengths."""
    settings = HopWorld.Settings()
    engine = NativeEngine(NativeEngine.Settings(), base_policy)
    limits = Limits(turns=3, tokens_per_turn=48, tokens=600)
    rollout = Rollout(functools.partial(HopWorld, settings), engine, renderer, limits)
    tasks = HopWorld.tasks(settings, "train")[:3]
    groups = asyncio.run(rollout.run(tasks, attempts=3, temperature=1.0, seed=3))
    for group in groups[:2]:
        for attempt, trajectory in enumerate(group.trajectories):
            trajectory.outcome = Outcome(float(attempt == 1), attempt == 1)
    for trajectory in groups[2].trajectories:
        trajectory.outcome = Outcome(0.0, False)
    return groups


@pytest.fixture
def known(groups):
    known = Estimates()
    assign_credit(groups, known, GRPO(GRPO.Settings()), OutcomeCredit(OutcomeCredit.Settings()))
    return known


def gradients(policy):
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def accumulated(policy, groups, known, algorithm, *, max_tokens):
    """The learner's gradient, before clipping and the optimiser."""
    learner = Learner(policy, algorithm, LearnerSettings(), temperature=1.0)
    policy.model.zero_grad()
    batch = Batch(steps_of(groups), known, loss_weights(groups, algorithm))
    with policy.packed():
        for micro in packs(groups, max_tokens=max_tokens, device=policy.device):
            learner._backward(micro, batch, Sums())
    return gradients(policy)


def by_hand(policy, groups, known, settings):
    """GRPO's loss sequence by sequence: full logits, Python loops, the mean over all actions."""
    policy.model.zero_grad()
    total, losses = 0, []
    for group in groups:
        for attempt, trajectory in enumerate(group.trajectories):
            path = list(trajectory.prompt_ids)
            spans = []
            for number, step in enumerate(trajectory.steps):
                spans.append((len(path), step, known.advantages[group.number, attempt, number]))
                path += [*step.action.token_ids, *step.observation_ids]
            logp = policy.model(torch.tensor([path])).logits[0].log_softmax(-1)
            for start, step, advantages in spans:
                for offset, token in enumerate(step.action.token_ids):
                    ratio = (logp[start + offset - 1, token] - step.action.logprobs[offset]).exp()
                    advantage = advantages[offset]
                    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
                    losses.append(-torch.min(ratio * advantage, clipped * advantage))
                    total += 1
    loss = torch.stack(losses).sum() / total
    loss.backward()
    return gradients(policy)


def assert_close(one, two, tolerance=1e-4):
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        norm = gradient.norm()
        assert (gradient - two[name]).norm() <= tolerance * norm + 1e-9, name


def test_gradient_equals_one_sequence_at_a_time(policy, groups, known):
    algorithm = GRPO(GRPO.Settings(aggregation="token"))
    ours = accumulated(policy, groups[:2], known, algorithm, max_tokens=100_000)
    assert_close(by_hand(policy, groups[:2], known, algorithm.settings), ours)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_cut_into_micro_batches_does_not_matter(policy, groups, known, aggregation):
    algorithm = GRPO(GRPO.Settings(aggregation=aggregation))
    whole = accumulated(policy, groups[:2], known, algorithm, max_tokens=100_000)
    assert_close(whole, accumulated(policy, groups[:2], known, algorithm, max_tokens=1))
    assert_close(whole, accumulated(policy, groups[:2], known, algorithm, max_tokens=700))


def test_only_action_tokens_are_trained(policy, groups):
    count, steps = 0, steps_of(groups)
    for pack in packs(groups, max_tokens=1, device=policy.device):
        sampled = [i for key in pack.keys for i in steps[key].action.token_ids]
        assert pack.action_ids.tolist() == sampled
        count += len(sampled)
    assert count == sum(t.num_action_tokens for g in groups for t in g.trajectories)


@pytest.mark.parametrize("extra", [{"kl": {"coef": 1e-9}}, {"entropy_coef": 1e-9}])
def test_a_term_that_weighs_nothing_changes_nothing(policy, base_policy, groups, known, extra):
    """One of three groups has no signal: it counts in the mean, run or not."""

    def gradient(**settings):
        algorithm = GRPO(GRPO.Settings(**settings))
        learner = Learner(
            policy,
            algorithm,
            LearnerSettings(max_grad_norm=1e9),
            temperature=1.0,
            reference=base_policy,
        )
        found = {}
        learner.optimizer.step = lambda lr: found.update(gradients(policy))
        update = learner.update(groups, known, lr=0.0, seed=0)
        return found, update

    (alone, one), (beside, other) = gradient(), gradient(**extra)
    assert one.num_tokens < other.num_tokens
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    assert_close(beside, alone)


def test_groups_without_signal_are_left_out(groups, known):
    grpo = GRPO(GRPO.Settings())
    assert informative(groups, known, grpo) == groups[:2]
    step_credit = StepCredit(StepCredit.Settings())
    for trajectory in groups[2].trajectories:
        for step in trajectory.steps:
            step.rewards.clear()
    groups[2].trajectories[0].steps[0].rewards["reached"] = 1.0
    assign_credit(groups, known, grpo, step_credit)
    assert informative(groups, known, grpo) == groups


def test_minibatches_hold_every_group_once(groups):
    parts = minibatches(groups, 2, seed=0)
    assert sorted(len(part) for part in parts) == [1, 2]
    assert {id(g) for part in parts for g in part} == {id(g) for g in groups}
    assert len(minibatches(groups, 8, seed=0)) == 3
    assert minibatches(groups, 2, seed=0) == parts


def test_an_update_raises_the_probability_of_what_was_good(policy, groups, known):
    learner = Learner(policy, GRPO(GRPO.Settings()), LearnerSettings(), temperature=1.0)
    first = learner.update(groups[:2], known, lr=1e-4, seed=0)
    assert first.num_steps == 1
    assert first.logprob_error < 1e-4
    assert first.grad_norm > 0
    trained = steps_of(groups[:2])
    assert first.ratios.keys() == trained.keys()
    for ratios in first.ratios.values():
        assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-4)
    second = learner.update(groups[:2], known, lr=1e-9, seed=0)
    good, bad = [], []
    for key in trained:
        (good if key.attempt == 1 else bad).extend(math.log(r) for r in second.ratios[key])
    assert sum(good) / len(good) > 0 > sum(bad) / len(bad)


def test_epochs_and_minibatches_are_steps(policy, groups, known):
    settings = LearnerSettings(epochs=3, minibatches=2)
    learner = Learner(policy, GRPO(GRPO.Settings()), settings, temperature=1.0)
    assert learner.update(groups[:2], known, lr=1e-5, seed=0).num_steps == 6
    assert learner.update([], known, lr=1e-5, seed=0).num_steps == 0


def test_a_non_finite_update_is_skipped_and_explained(policy, groups, known):
    learner = Learner(policy, GRPO(GRPO.Settings()), LearnerSettings(), temperature=1.0)
    before = copy.deepcopy(policy.model.state_dict())
    first = StepKey(0, 0, 0)
    known.advantages[first] = (math.nan, *known.advantages[first][1:])
    update = learner.update(groups[:2], known, lr=1e-3, seed=0)
    assert update.num_steps == 0
    (reason,) = update.skipped
    assert "mini-batch 1" in reason
    assert "nan" in reason
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_kl_to_the_reference(policy, base_policy, groups, known):
    algorithm = GRPO(GRPO.Settings(kl={"coef": 0.5}))
    with pytest.raises(ValueError, match="reference"):
        Learner(policy, algorithm, LearnerSettings(), temperature=1.0)
    learner = Learner(policy, algorithm, LearnerSettings(), temperature=1.0, reference=base_policy)
    assert learner.update(groups[:2], known, lr=1e-3, seed=0).kl == pytest.approx(0.0, abs=1e-6)
    assert learner.update(groups[:2], known, lr=1e-3, seed=0).kl > 1e-5


def test_learning_rate_schedules():
    linear = LearnerSettings(lr=1.0, warmup=2, schedule="linear")
    assert [linear.rate(i, 6) for i in (1, 2, 3, 5)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    cosine = LearnerSettings(lr=1.0, schedule="cosine")
    assert cosine.rate(1, 10) == pytest.approx(1.0)
    assert cosine.rate(6, 10) == pytest.approx(0.5)
    assert LearnerSettings(lr=0.3).rate(7, 10) == 0.3


def test_entropies_that_the_engine_does_not_tell_are_filled_in(policy, groups, known):
    learner = Learner(policy, GRPO(GRPO.Settings()), LearnerSettings(), temperature=1.0)
    assert learner.update(groups[:2], known, lr=0.0, seed=1).entropies == {}
    told = {key: step.action.entropies for key, step in steps_of(groups[:2]).items()}
    for group in groups:
        for trajectory in group.trajectories:
            trajectory.steps = [
                dataclasses.replace(s, action=dataclasses.replace(s.action, entropies=()))
                for s in trajectory.steps
            ]
    found = learner.update(groups[:2], known, lr=0.0, seed=1).entropies
    assert found.keys() == told.keys()
    for key, row in found.items():
        assert row == pytest.approx(told[key], abs=1e-3)
