"""Credit, advantages and losses against numbers worked out by hand or by plain NumPy."""

import math

import numpy as np
import pytest
import torch

from agent_r1.algorithms.advantages import group_relative
from agent_r1.algorithms.base import Algorithm
from agent_r1.algorithms.credit import OutcomeCredit, StepCredit, TrajectoryCredit
from agent_r1.algorithms.grpo import GRPO
from agent_r1.algorithms.losses import clipped_policy_loss, k3
from agent_r1.types import Group, Message, Outcome, Step, StopReason, Task, Trajectory

from .fakes import make_action

REWARDS = [{"format": 1.0, "reached": 0.5}, {"format": 0.0}, {"reached": 0.5}]


def trajectory(outcome, rewards, texts=None):
    texts = texts or ["ab"] * len(rewards)
    steps = [
        Step(make_action(text), Message("assistant", text), rewards=part)
        for text, part in zip(texts, rewards, strict=True)
    ]
    return Trajectory("t", "", 0, (), (1,), steps, StopReason.DONE, Outcome(outcome, outcome >= 1))


def group(*trajectories):
    return Group(Task("t", "?"), list(trajectories))


def test_outcome_credit_ignores_process_rewards():
    assert OutcomeCredit(OutcomeCredit.Settings()).returns(REWARDS, 2.0) == [2.0, 2.0, 2.0]


def test_trajectory_credit_sums_weighted_parts():
    settings = TrajectoryCredit.Settings(weights={"format": 0.1})
    assert TrajectoryCredit(settings).returns(REWARDS, 1.0) == pytest.approx([2.1] * 3)


def test_step_credit_is_the_discounted_return_to_go():
    credit = StepCredit(StepCredit.Settings(weights={"format": 0.1, "reached": 2.0}, gamma=0.5))
    r = [0.1 + 1.0, 0.0, 1.0]
    expected = [
        r[0] + 0.5 * r[1] + 0.25 * r[2] + 0.25 * 3.0,
        r[1] + 0.5 * r[2] + 0.5 * 3.0,
        r[2] + 3.0,
    ]
    assert credit.returns(REWARDS, 3.0) == pytest.approx(expected)


def test_group_relative_by_hand():
    values = [1.0, 0.0, 0.0, 1.0, 0.5]
    array = np.array(values)
    expected = (array - array.mean()) / array.std(ddof=1)
    assert group_relative(values) == pytest.approx(expected.tolist())
    assert group_relative(values, normalize_std=False) == pytest.approx((array - 0.5).tolist())


@pytest.mark.parametrize("values", [[], [3.0], [0.5, 0.5, 0.5], [0.1 + 0.2, 0.3]])
def test_no_difference_no_signal(values):
    assert group_relative(values) == [0.0] * len(values)


def test_grpo_spreads_a_trajectorys_advantage_over_all_its_tokens():
    good = trajectory(1.0, [{}, {}], ["abc", "d"])
    bad = trajectory(0.0, [{}], ["xy"])
    failed = trajectory(0.0, [{}])
    failed.outcome = None
    grpo, credit = GRPO(GRPO.Settings()), OutcomeCredit(OutcomeCredit.Settings())
    a = 0.5 / math.sqrt(0.5)
    advantages = grpo.advantages(group(good, failed, bad), credit)
    assert [[len(step) for step in t] for t in advantages] == [[4, 2], [3]]
    assert advantages[0] == [pytest.approx([a] * 4), pytest.approx([a] * 2)]
    assert advantages[1] == [pytest.approx([-a] * 3)]


def test_grpo_with_step_credit_compares_all_steps_of_the_group():
    one = trajectory(1.0, [{"reached": 1.0}, {}])
    two = trajectory(0.0, [{"reached": 1.0}, {}, {}])
    grpo = GRPO(GRPO.Settings())
    advantages = grpo.advantages(group(one, two), StepCredit(StepCredit.Settings()))
    returns = np.array([2.0, 1.0, 1.0, 0.0, 0.0])
    expected = (returns - returns.mean()) / returns.std(ddof=1)
    flat = [step[0] for t in advantages for step in t]
    assert flat == pytest.approx(expected.tolist())


@pytest.mark.parametrize("compare", ["index", "state_key"])
def test_grpo_may_compare_steps_of_the_same_index_or_state(compare):
    one = trajectory(1.0, [{"reached": 1.0}, {}])
    two = trajectory(0.0, [{"reached": 0.5}, {}, {}])
    for t in (one, two):
        for index, step in enumerate(t.steps):
            step.state_key = f"state {index}"
    credit = StepCredit(StepCredit.Settings(compare=compare))
    flat = [
        step[0] for t in GRPO(GRPO.Settings()).advantages(group(one, two), credit) for step in t
    ]
    a = 0.5**0.5
    assert flat == pytest.approx([a, a, -a, -a, 0.0])


def test_token_weights_sum_to_one():
    counts = [3, 1, 4]
    by_token = GRPO(GRPO.Settings()).token_weights(counts)
    by_sequence = GRPO(GRPO.Settings(aggregation="sequence")).token_weights(counts)
    assert by_token == pytest.approx([1 / 8] * 3)
    assert by_sequence == pytest.approx([1 / 9, 1 / 3, 1 / 12])
    for weights in (by_token, by_sequence):
        assert sum(w * c for w, c in zip(weights, counts, strict=True)) == pytest.approx(1.0)


def test_clipped_loss_by_hand():
    ratios = np.array([0.5, 0.5, 1.0, 2.0, 2.0])
    advantages = np.array([1.0, -1.0, 3.0, 1.0, -1.0])
    expected = -np.minimum(ratios * advantages, np.clip(ratios, 0.8, 1.3) * advantages)
    old = torch.full((5,), -1.0, dtype=torch.float64)
    new = (old + torch.tensor(np.log(ratios))).requires_grad_()
    loss = clipped_policy_loss(new, old, torch.tensor(advantages), clip_low=0.2, clip_high=0.3)
    assert loss.tolist() == pytest.approx(expected.tolist())
    loss.sum().backward()
    # Clipped in the direction of the advantage: no gradient. Else -ratio * advantage.
    assert new.grad.tolist() == pytest.approx([-0.5, 0.0, -3.0, 0.0, 2.0])


def test_k3_is_an_estimate_of_the_divergence():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum()
    assert (p * k3(p.log(), q.log())).sum().item() == pytest.approx(exact.item(), abs=1e-6)
    assert (k3(p.log(), q.log()) >= 0).all()


def test_an_algorithm_of_ones_own_needs_two_functions():
    class Reinforce(Algorithm):
        def advantages(self, group, credit):
            return [
                [[t.outcome.reward] * len(s.action.token_ids) for s in t.steps]
                for t in group.scored
            ]

        def policy_loss(self, logprobs, sampling_logprobs, advantages):
            return -logprobs * advantages

    mine = Reinforce(Algorithm.Settings(name="mine"))
    assert mine.advantages(group(trajectory(0.5, [{}])), None) == [[[0.5, 0.5, 0.5]]]
