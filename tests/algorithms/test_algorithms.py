"""Every algorithm against plain NumPy written from its paper, not from our code."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agent_r1.algorithms import ALGORITHMS, CREDITS
from agent_r1.algorithms.advantages import gae, group_relative, leave_one_out, whiten
from agent_r1.algorithms.base import Algorithm, advantage
from agent_r1.algorithms.credit import attempts_of
from agent_r1.algorithms.dapo import overlong_punishment
from agent_r1.algorithms.grpo import GRPO
from agent_r1.algorithms.kl import k1, k2, k3
from agent_r1.algorithms.losses import (
    cispo_loss,
    clipped_policy_loss,
    importance_in_band,
    sequence_ratio,
    sequences_in_band,
    truncated_importance,
    value_loss,
)
from agent_r1.learner.credit_assignment import (
    assign_credit,
    batch_of,
    informative,
    loss_weights,
    trained_on,
)
from agent_r1.types import StepKey, StopReason
from tests.batches import make_groups, make_known

WEIGHTS = {"format": 0.1, "reached": 2.0}


def algorithm(name, **keys):
    return ALGORITHMS.make(ALGORITHMS.section({"name": name, **keys}))


def credit(name, **keys):
    return CREDITS.make(CREDITS.section({"name": name, **keys}))


def attempts(groups, known=None):
    known = make_known(groups) if known is None else known
    return [attempts_of(group, known) for group in groups]


def advantages(made, groups, level, known=None):
    """What our code gives, a number for each action token of all groups."""
    return made.advantages(attempts(groups, known), level)


def of_groups(groups, flat):
    """The same by group."""
    ends = np.cumsum([sum(sum(lengths(t)) for t in scored(g)) for g in groups])[:-1]
    return [part.tolist() for part in np.split(np.array(flat), ends)]


def keyed(groups):
    """Each trajectory that counts, and the keys of its steps."""
    for group in groups:
        for attempt, t in enumerate(group.trajectories):
            if t.outcome is not None:
                yield t, [StepKey(group.number, attempt, i) for i in range(len(t.steps))]


# The oracle: rewards -----------------------------------------------------------------------------


def process(step):
    return sum(WEIGHTS[part] * value for part, value in step.rewards.items())


def lengths(t):
    return [len(s.action.token_ids) for s in t.steps]


def repeat_tokens(t, per_step):
    return np.repeat(per_step, lengths(t))


def token_rewards(t, level, outcome=None):
    """Where a reward stands: a flat array over the action tokens of a trajectory."""
    outcome = t.outcome.reward if outcome is None else outcome
    r = np.zeros(sum(lengths(t)))
    ends = np.cumsum(lengths(t)) - 1
    if level in ("step", "token"):
        for end, step in zip(ends, t.steps, strict=True):
            r[end] += process(step)
    if level == "trajectory":
        r[-1] += sum(process(s) for s in t.steps)
    r[-1] += outcome
    return r


def discounted_sums(r, gamma):
    return np.array([sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))])


def step_sums(t, r):
    return np.array([part.sum() for part in np.split(r, np.cumsum(lengths(t))[:-1])])


def scored(g):
    return [t for t in g.trajectories if t.outcome is not None]


def oracle_group(group, level, normalise, gamma=1.0, outcome=lambda t: t.outcome.reward):
    """Advantage per token of each trajectory for algorithms that compare units of a group."""
    ts = scored(group)
    rewards = [token_rewards(t, level, outcome(t)) for t in ts]
    if level in ("outcome", "trajectory"):
        a = normalise(np.array([r.sum() for r in rewards]))
        return [np.full(len(r), x) for x, r in zip(a, rewards, strict=True)]
    if level == "step":
        returns = [
            discounted_sums(step_sums(t, r), gamma) for t, r in zip(ts, rewards, strict=True)
        ]
    else:
        returns = [discounted_sums(r, gamma) for r in rewards]
    a = np.split(normalise(np.concatenate(returns)), np.cumsum([len(x) for x in returns])[:-1])
    if level == "step":
        return [repeat_tokens(t, x) for t, x in zip(ts, a, strict=True)]
    return a


def zscore(x):
    return (x - x.mean()) / x.std(ddof=1) if x.std() > 1e-9 else np.zeros_like(x)


def centre(x):
    return x - x.mean()


def others(x):
    return np.array([x[i] - np.delete(x, i).mean() for i in range(len(x))])


# Advantages --------------------------------------------------------------------------------------

LEVELS = ["outcome", "trajectory", "step", "token"]
BASELINES = {
    "grpo": zscore,
    "dapo": zscore,
    "gspo": zscore,
    "cispo": zscore,
    "dr-grpo": centre,
    "rloo": others,
}


def credit_of(level):
    keys = {} if level == "outcome" else {"weights": WEIGHTS}
    return credit(level, **keys)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", sorted(BASELINES))
def test_group_advantages(name, level):
    groups = make_groups()
    ours = advantages(algorithm(name), groups, credit_of(level))
    theirs = [oracle_group(group, level, BASELINES[name]) for group in groups]
    assert ours == pytest.approx(np.concatenate(list(itertools.chain(*theirs))).tolist())
    if level == "outcome":
        assert not any(of_groups(groups, ours)[1]), "a group of equal outcomes has no signal"


@pytest.mark.parametrize("level", LEVELS)
def test_reinforce_pp(level):
    groups = make_groups()
    ours = advantages(algorithm("reinforce++", gamma=0.9), groups, credit_of(level))
    returns = np.concatenate(
        [discounted_sums(token_rewards(t, level), 0.9) for g in groups for t in scored(g)]
    )
    expected = (returns - returns.mean()) / returns.std()
    assert ours == pytest.approx(expected.tolist())


@pytest.mark.parametrize("level", LEVELS)
def test_reinforce_pp_with_baseline(level):
    groups = make_groups()
    ours = advantages(algorithm("reinforce++-baseline"), groups, credit_of(level))
    a = np.concatenate([x for g in groups for x in oracle_group(g, level, centre)])
    assert ours == pytest.approx(((a - a.mean()) / a.std()).tolist())


@pytest.mark.parametrize("level", ["outcome", "step"])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_gigpo(level, normalize_std):
    groups = make_groups()
    keys = {"gamma": 0.9, "step_weight": 0.7, "normalize_std": normalize_std}
    ours = advantages(algorithm("gigpo", **keys), groups, credit_of(level))
    norm = zscore if normalize_std else centre
    expected = []
    for group in groups:
        ts = scored(group)
        rewards = [token_rewards(t, level) for t in ts]
        episode = norm(np.array([r.sum() for r in rewards]))
        returns = [discounted_sums(step_sums(t, r), 0.9) for t, r in zip(ts, rewards, strict=True)]
        for i, t in enumerate(ts):
            per_step = np.zeros(len(t.steps))
            for s, step in enumerate(t.steps):
                same = [
                    (j, k)
                    for j, other in enumerate(ts)
                    for k, o in enumerate(other.steps)
                    if o.state_key == step.state_key
                ]
                values = np.array([returns[j][k] for j, k in same])
                relative = norm(values)[same.index((i, s))] if len(values) > 1 else 0.0
                per_step[s] = episode[i] + 0.7 * relative
            expected.append(repeat_tokens(t, per_step))
    assert ours == pytest.approx(np.concatenate(expected).tolist())


def oracle_gae(r, v, last, gamma, lam):
    """As the sum of discounted temporal differences, eq. 16."""
    after = np.append(v[1:], last)
    delta = r + gamma * after - v
    return discounted_sums(delta, gamma * lam)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("truncated", ["bootstrap", "keep"])
def test_ppo_walks_over_action_tokens_across_turns(level, truncated):
    groups = make_groups()
    ppo = algorithm("ppo", gamma=0.95, lam=0.9, truncated=truncated, normalize=False)
    ours = advantages(ppo, groups, credit_of(level))
    targets = ppo.value_targets(attempts(groups), credit_of(level))
    expected, expected_targets = [], []
    known = make_known(groups)
    for t, keys in keyed(groups):
        v = np.concatenate([known.values[key][:-1] for key in keys])
        cut = truncated == "bootstrap" and t.stop == "max_turns"
        r = token_rewards(t, level, 0.0 if cut else None)
        if cut and level == "trajectory":
            r[:] = 0.0  # what would be paid at the end is in the value of the last state
        a = oracle_gae(r, v, known.values[keys[-1]][-1] if cut else 0.0, 0.95, 0.9)
        expected.append(a)
        expected_targets.append(a + v)
    assert ours == pytest.approx(np.concatenate(expected).tolist())
    assert targets == pytest.approx(np.concatenate(expected_targets).tolist())
    a = np.concatenate(expected)
    whitened = algorithm("ppo", gamma=0.95, lam=0.9, truncated=truncated)
    ours = advantages(whitened, groups, credit_of(level))
    assert ours == pytest.approx(((a - a.mean()) / a.std()).tolist())


def test_step_gae_takes_a_turn_for_one_action():
    groups = make_groups()
    steps = algorithm("step-gae", gamma=0.9, lam=0.8, normalize=False)
    ours = advantages(steps, groups, credit_of("step"))
    targets = steps.value_targets(attempts(groups), credit_of("step"))
    expected, expected_targets = [], []
    known = make_known(groups)
    for t, keys in keyed(groups):
        v = np.array([known.values[key][0] for key in keys])
        cut = t.stop == "max_turns"
        r = step_sums(t, token_rewards(t, "step", 0.0 if cut else None))
        a = oracle_gae(r, v, known.values[keys[-1]][-1] if cut else 0.0, 0.9, 0.8)
        expected.append(repeat_tokens(t, a))
        expected_targets.append(repeat_tokens(t, a + v))
    assert ours == pytest.approx(np.concatenate(expected).tolist())
    assert targets == pytest.approx(np.concatenate(expected_targets).tolist())


def test_numbers_by_hand():
    assert group_relative([1.0, 0.0, 0.0, 1.0], normalize_std=False) == [0.5, -0.5, -0.5, 0.5]
    assert leave_one_out([3.0, 0.0, 0.0]) == pytest.approx([3.0, -1.5, -1.5])
    assert whiten([1.0, 3.0]) == [-1.0, 1.0]
    # delta = [0 + .5 * 2 - 1, 4 - 2] = [0, 2]; A = [0 + .25 * 2, 2]
    assert gae([0.0, 4.0], [1.0, 2.0], last_value=0.0, gamma=0.5, lam=0.5) == [0.5, 2.0]
    assert gae([0.0, 4.0], [1.0, 2.0], last_value=2.0, gamma=0.5, lam=0.5) == [0.75, 3.0]


@pytest.mark.parametrize("values", [[], [3.0], [0.5, 0.5, 0.5], [0.1 + 0.2, 0.3]])
def test_no_difference_no_signal(values):
    assert group_relative(values) == [0.0] * len(values)
    assert leave_one_out(values) == [0.0] * len(values)
    assert whiten(values) == [0.0] * len(values)


@pytest.mark.parametrize("compare", ["index", "state_key"])
@pytest.mark.parametrize("level", ["step", "token"])
def test_units_may_be_compared_with_those_of_the_same_index_or_state(level, compare):
    groups = make_groups()
    ours = advantages(
        algorithm("grpo"), groups, credit(level, weights=WEIGHTS, gamma=0.5, compare=compare)
    )
    expected = []
    for group in groups:
        ts = scored(group)
        units = []  # (trajectory, key, return, number of tokens)
        for i, t in enumerate(ts):
            r = token_rewards(t, level)
            of_steps = discounted_sums(step_sums(t, r), 0.5)
            of_tokens = np.split(discounted_sums(r, 0.5), np.cumsum(lengths(t))[:-1])
            for s, step in enumerate(t.steps):
                key = s if compare == "index" else step.state_key
                n = lengths(t)[s]
                if level == "step":
                    units.append((i, key, of_steps[s], n))
                else:
                    units += [(i, key, x, 1) for x in of_tokens[s]]
        for i in range(len(ts)):
            for j, key, value, n in units:
                if j == i:
                    same = np.array([v for _, k, v, _ in units if k == key])
                    std = same.std(ddof=1) if len(same) > 1 else 0.0
                    expected += [(value - same.mean()) / std if std > 1e-9 else 0.0] * n
    assert ours == pytest.approx(expected)


def test_gating_leaves_process_rewards_out_where_outcomes_are_equal():
    groups = make_groups()
    for level in ("trajectory", "step", "token"):
        gated = advantages(algorithm("grpo"), groups, credit(level, weights=WEIGHTS, gate=True))
        free = advantages(algorithm("grpo"), groups, credit(level, weights=WEIGHTS))
        gated, free = of_groups(groups, gated), of_groups(groups, free)
        assert gated[0] == free[0]
        assert any(free[1])
        assert not any(gated[1])


def test_soft_punishment_of_over_long_episodes():
    groups = make_groups()
    dapo = algorithm("dapo", overlong={"length": 6, "buffer": 4})

    def outcome(t):
        n = sum(lengths(t))
        fine = 0.0 if n <= 2 else (2 - n) / 4 if n <= 6 else -1.0
        return t.outcome.reward + fine

    ours = advantages(dapo, groups, credit_of("outcome"))
    theirs = [oracle_group(g, "outcome", zscore, outcome=outcome) for g in groups]
    assert ours == pytest.approx(np.concatenate(list(itertools.chain(*theirs))).tolist())
    assert [overlong_punishment(n, length=100, buffer=20) for n in (0, 80, 85, 100, 999)] == [
        0.0, 0.0, -0.25, -1.0, -1.0,
    ]  # fmt: skip


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward(estimator):
    groups = make_groups()
    kl = {"coef": 0.3, "estimator": estimator, "place": "reward"}
    functions = {
        "k1": lambda d: d,
        "k2": lambda d: d**2 / 2,
        "k3": lambda d: np.exp(-d) - 1 + d,
    }
    returns = []
    known = make_known(groups)
    for t, keys in keyed(groups):
        reference = [known.reference_logprobs[key] for key in keys]
        sampled = [step.action.logprobs for step in t.steps]
        d = np.concatenate([np.subtract(s, q) for s, q in zip(sampled, reference, strict=True)])
        r = token_rewards(t, "outcome") - 0.3 * functions[estimator](d)
        returns.append(discounted_sums(r, 1.0))
    x = np.concatenate(returns)
    ours = advantages(algorithm("reinforce++", kl=kl), groups, credit_of("outcome"))
    assert ours == pytest.approx(((x - x.mean()) / x.std()).tolist())
    # Where the unit is the trajectory, the penalty of all its tokens is in its return.
    totals = iter([r[0] for r in returns])
    expected = []
    for g in groups:
        per_trajectory = zscore(np.array([next(totals) for _ in scored(g)]))
        for a, t in zip(per_trajectory, scored(g), strict=True):
            expected += [a] * sum(lengths(t))
    ours = advantages(algorithm("grpo", kl=kl), groups, credit_of("outcome"))
    assert ours == pytest.approx(expected)


def test_kl_in_the_reward_is_that_of_the_policy_to_be_updated_where_it_is_known():
    groups = make_groups()
    known = make_known(groups)
    known.old_logprobs = known.reference_logprobs  # as if older weights had sampled
    kl = {"coef": 0.3, "place": "reward"}
    ours = advantages(algorithm("reinforce++", kl=kl), groups, credit_of("outcome"), known)
    without = advantages(algorithm("reinforce++"), groups, credit_of("outcome"), known)
    assert ours == pytest.approx(without)
    sampled = advantages(algorithm("reinforce++", kl=kl), groups, credit_of("outcome"))
    assert ours != pytest.approx(sampled)


# Losses ------------------------------------------------------------------------------------------

RATIOS = np.array([0.5, 0.5, 1.0, 2.0, 2.0, 1.1, 0.9])
ADVANTAGES = np.array([1.0, -1.0, 3.0, 1.0, -1.0, 0.0, 2.0])
SEQUENCES = np.array([0, 0, 0, 1, 1, 2, 2])
OLD = np.linspace(-2.0, -0.5, 7)
NEW = OLD + np.log(RATIOS)


def tensors(*arrays):
    return [torch.tensor(a) for a in arrays]


def numeric_gradient(f, x, h=1e-6):
    steps = np.eye(len(x)) * h
    return np.array([(f(x + d) - f(x - d)) / (2 * h) for d in steps])


def torch_gradient(loss, x):
    x = torch.tensor(x, requires_grad=True)
    loss(x).sum().backward()
    return x.grad.numpy()


def test_clipped_loss():
    new, old, a = tensors(NEW, OLD, ADVANTAGES)
    expected = -np.minimum(RATIOS * ADVANTAGES, np.clip(RATIOS, 0.8, 1.3) * ADVANTAGES)
    loss = clipped_policy_loss(new, old, a, clip_low=0.2, clip_high=0.3)
    assert loss.numpy() == pytest.approx(expected)

    def by_numpy(x):
        r = np.exp(x - OLD)
        return -np.minimum(r * ADVANTAGES, np.clip(r, 0.8, 1.3) * ADVANTAGES).sum()

    ours = torch_gradient(
        lambda x: clipped_policy_loss(x, old, a, clip_low=0.2, clip_high=0.3), NEW
    )
    assert ours == pytest.approx(numeric_gradient(by_numpy, NEW), abs=1e-6)
    # Clipped in the direction of the advantage: no gradient. Else -ratio * advantage.
    assert ours == pytest.approx([-0.5, 0, -3, 0, 2, 0, -1.8])


@pytest.mark.parametrize("clip", [(1e-3, 2e-3), (0.9, 9.0)])
def test_gspo_is_the_clipped_objective_of_sequence_ratios(clip):
    """Value and finite differences of eq. 5, with one advantage a sequence."""
    per_sequence = np.array([1.0, -2.0, 0.5])
    a = per_sequence[SEQUENCES]
    counts = np.bincount(SEQUENCES)

    def objective(x):
        s = np.exp([(x - OLD)[i == SEQUENCES].mean() for i in range(3)])
        clipped = np.clip(s, 1 - clip[0], 1 + clip[1])
        return -np.minimum(s * per_sequence, clipped * per_sequence).mean()

    weights = torch.tensor(1 / (3 * counts[SEQUENCES]))
    gspo = algorithm("gspo", clip_low=clip[0], clip_high=clip[1])
    assert gspo.token_weights(counts.tolist()) == pytest.approx((1 / (3 * counts)).tolist())

    def ours(x):
        old, advantages, sequences = tensors(OLD, a, SEQUENCES)
        return weights * gspo.policy_loss(x, old, advantages, sequences)

    assert ours(torch.tensor(NEW)).sum().item() == pytest.approx(objective(NEW))
    assert torch_gradient(ours, NEW) == pytest.approx(numeric_gradient(objective, NEW), abs=1e-7)
    ratio = sequence_ratio(*tensors(NEW, OLD, SEQUENCES))
    assert ratio[3].item() == pytest.approx(2.0)


def test_cispo_stops_the_gradient_at_the_weight():
    """Its gradient is that of w A logp with w held fixed; the clipped weight keeps it alive."""
    new, old, a = tensors(NEW, OLD, ADVANTAGES)
    w = np.clip(RATIOS, 0.0, 1.5)
    loss = cispo_loss(new, old, a, clip_low=1.0, clip_high=0.5)
    assert loss.numpy() == pytest.approx(-w * ADVANTAGES * NEW)
    ours = torch_gradient(lambda x: cispo_loss(x, old, a, clip_low=1.0, clip_high=0.5), NEW)
    fixed = numeric_gradient(lambda x: (-w * ADVANTAGES * x).sum(), NEW)
    assert ours == pytest.approx(fixed, abs=1e-6)
    assert ours[3] != 0.0
    through = numeric_gradient(
        lambda x: (-np.clip(np.exp(x - OLD), 0, 1.5) * ADVANTAGES * x).sum(), NEW
    )
    assert ours != pytest.approx(through, abs=1e-3), "else the test shows nothing"


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(clip):
    v, old, target = np.array([0.0, 1.0, 3.0]), np.array([0.1, 0.5, 1.0]), np.array([1.0, 0.9, 2.0])

    def by_numpy(x):
        loss = (x - target) ** 2
        if clip is not None:
            loss = np.maximum(loss, (old + np.clip(x - old, -clip, clip) - target) ** 2)
        return loss / 2

    ours = value_loss(*tensors(v, old, target), clip=clip)
    assert ours.numpy() == pytest.approx(by_numpy(v))
    gradient = torch_gradient(lambda x: value_loss(x, *tensors(old, target), clip=clip), v)
    assert gradient == pytest.approx(numeric_gradient(lambda x: by_numpy(x).sum(), v), abs=1e-6)


def test_kl_estimators_are_what_they_say():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum().item()
    assert (p * k1(p.log(), q.log())).sum().item() == pytest.approx(exact, abs=1e-6)
    assert (p * k3(p.log(), q.log())).sum().item() == pytest.approx(exact, abs=1e-6)
    assert (k3(p.log(), q.log()) >= 0).all()
    d = torch.tensor([0.3, -0.2])
    assert k2(d, torch.zeros(2)).tolist() == pytest.approx([0.045, 0.02])
    assert k3(0.3, 0.0) == pytest.approx(math.exp(-0.3) - 1 + 0.3)
    # In the loss, the gradient of k2 over samples of p is that of KL(p || q).
    logits = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.3, -0.4], dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    (true,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits)
    logp = logits.log_softmax(0)
    (sampled,) = torch.autograd.grad((logp.exp().detach() * k2(logp, reference)).sum(), logits)
    assert sampled.tolist() == pytest.approx(true.tolist())


def test_truncated_importance_weights():
    old, sampled = tensors(np.log([0.5, 0.5, 0.5]), np.log([0.5, 0.1, 0.9]))
    assert truncated_importance(old, sampled, cap=2.0).tolist() == pytest.approx([1, 2, 5 / 9])


# Normalisers -------------------------------------------------------------------------------------


def test_token_weights():
    counts = [3, 1, 4]
    by_token = algorithm("grpo", aggregation="token").token_weights(counts)
    by_sequence = algorithm("grpo").token_weights(counts)
    fixed = algorithm("dr-grpo", fixed_length=10).token_weights(counts)
    assert by_token == pytest.approx([1 / 8] * 3)
    assert by_sequence == pytest.approx([1 / 9, 1 / 3, 1 / 12])
    assert fixed == pytest.approx([1 / 30] * 3)


def test_masked_truncated_trajectories_are_compared_but_not_trained_on():
    groups = make_groups()
    grpo = algorithm("grpo", truncated="mask", aggregation="token")
    known = make_known(groups)
    assign_credit(groups, known, grpo, credit_of("outcome"))
    of = loss_weights(groups, grpo)
    for t, keys in keyed(groups):
        assert all((of[key].weight > 0) != t.stop.truncated for key in keys)
    weight = next(iter(of.values())).weight
    kept = [t for g in groups for t in scored(g) if not t.stop.truncated]
    assert weight == pytest.approx(1 / sum(sum(lengths(t)) for t in kept))
    expected = zscore(np.array([1.0, 0.0, 0.25]))
    assert known.advantages[StepKey(0, 1, 0)][0] == pytest.approx(expected[1])


def test_where_every_trajectory_is_masked_nothing_weighs_anything():
    groups = make_groups()
    for t in (t for g in groups for t in g.trajectories):
        t.stop = StopReason.MAX_TURNS
    for aggregation in ("token", "sequence"):
        of = loss_weights(groups, algorithm("grpo", truncated="mask", aggregation=aggregation))
        assert {share.weight for share in of.values()} == {0.0}


# What one token of each trajectory weighs by the papers, from the lengths of all attempts of the
# batch: a group without a signal adds nothing to the sum and counts in the denominator.
DENOMINATORS = {
    "grpo": lambda n: 1 / (len(n) * n),  # 1/G sum 1/|o_i|, over all questions (eq. 3)
    "gspo": lambda n: 1 / (len(n) * n),
    "dr-grpo": lambda n: np.full(len(n), 1 / (len(n) * 256)),  # a constant for each attempt
    "rloo": lambda n: np.full(len(n), 1 / len(n)),  # log pi of whole sequences
    "cispo": lambda n: np.full(len(n), 1 / n.sum()),
    "reinforce++": lambda n: np.full(len(n), 1 / n.sum()),
    "reinforce++-baseline": lambda n: np.full(len(n), 1 / n.sum()),
    "gigpo": lambda n: np.full(len(n), 1 / n.sum()),
    "ppo": lambda n: np.full(len(n), 1 / n.sum()),
    "step-gae": lambda n: np.full(len(n), 1 / n.sum()),
    "dapo": lambda n: np.full(len(n), 1 / n[:3].sum()),  # the second group is not in its batch
}
EXTRAS = ({}, {"kl": {"coef": 1e-9}}, {"entropy_coef": 1e-9})


@pytest.mark.parametrize("extra", EXTRAS, ids=["alone", "kl", "entropy"])
@pytest.mark.parametrize("name", DENOMINATORS)
def test_the_denominator_is_the_papers_whatever_other_terms_are_on(name, extra):
    groups, made = make_groups(), algorithm(name, **extra)
    known = make_known(groups)
    assign_credit(groups, known, made, credit_of("outcome"))
    batch = batch_of(groups, known, made)
    of = loss_weights(batch, made)
    n = np.array([sum(lengths(t)) for g in groups for t in scored(g)])
    expected = DENOMINATORS[name](n)[: sum(len(scored(g)) for g in batch)]
    weights = [of[keys[0]].weight for _, keys in keyed(batch)]
    assert weights == pytest.approx(expected)
    assert {g.task.id for g in batch} == ({"one"} if name == "dapo" else {"one", "two"})


def test_a_group_without_a_signal_is_run_only_where_something_pulls_at_its_tokens():
    for extra, run in zip(EXTRAS, (["one"], ["one", "two"], ["one", "two"]), strict=True):
        groups, grpo = make_groups(), algorithm("grpo", **extra)
        known = make_known(groups)
        assign_credit(groups, known, grpo, credit_of("outcome"))
        assert [g.task.id for g in trained_on(batch_of(groups, known, grpo), known, grpo)] == run


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_dapo_goes_by_the_outcomes_as_they_were_given(reward):
    """Equal outcomes are no signal, whatever length, process rewards or a KL make of them."""
    groups = make_groups()
    for t in scored(groups[0]):
        t.outcome = type(t.outcome)(reward, reward == 1.0)
    dapo = algorithm(
        "dapo", overlong={"length": 6, "buffer": 4}, kl={"coef": 0.1, "place": "reward"}
    )
    known = make_known(groups)
    assign_credit(groups, known, dapo, credit_of("step"))
    assert any(any(known.advantages[key]) for _, keys in keyed(groups[:1]) for key in keys)
    assert batch_of(groups, known, dapo) == []
    groups[0].trajectories[0].outcome = type(t.outcome)(1.0 - reward, False)
    assert batch_of(groups, known, dapo) == groups[:1]


def test_an_episode_that_a_limit_of_tokens_cut_is_over_long():
    dapo = algorithm("dapo", overlong={"length": 100, "buffer": 20})
    t = make_groups()[0].trajectories[0]
    assert dapo.outcome(t) == 1.0
    t.stop = StopReason.MAX_TOKENS
    assert dapo.outcome(t) == 0.0


@pytest.mark.parametrize("name", ["ppo", "reinforce++", "reinforce++-baseline"])
def test_normalisation_leaves_masked_tokens_out(name):
    groups = make_groups()
    made = algorithm(name, truncated="mask")
    rest = iter(advantages(made, groups, credit_of("outcome")))
    kept = []
    for t in (t for g in groups for t in scored(g)):
        of_trajectory = list(itertools.islice(rest, sum(lengths(t))))
        kept += [] if t.stop.truncated else of_trajectory
    assert np.mean(kept) == pytest.approx(0, abs=1e-9)
    assert np.std(kept) == pytest.approx(1)


def test_a_token_far_from_the_reference_is_not_the_whole_update():
    """k3 to 5 nats; beyond, its tangent there: never an overflow, never without a pull."""
    near = np.array([-30.0, -1.0, 0.0, 2.0, 4.9])
    assert [k3(0.0, d) for d in near] == pytest.approx(np.exp(near) - near - 1)
    slope = math.exp(5) - 1
    for d in (6.0, 14.0, 90.0, 800.0):
        assert k3(-d, 0.0) == pytest.approx(math.exp(5) - 6 + slope * (d - 5))
        logprob = torch.tensor([-d], requires_grad=True)
        k3(logprob, torch.zeros(1)).sum().backward()
        assert logprob.grad.item() == pytest.approx(-slope, rel=1e-5)


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_ratios_that_would_overflow_leave_the_gradient_finite(name):
    """A token of a clipped ratio, or of weight 0, must not turn the others into NaN."""
    logprobs = torch.tensor([-0.1, -0.1, -1.0], requires_grad=True)
    old = torch.tensor([-400.0, -400.0, -1.1])
    loss = algorithm(name).policy_loss(
        logprobs, old, torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0, 1, 2])
    )
    (loss * torch.tensor([1.0, 0.0, 1.0])).sum().backward()
    assert logprobs.grad.isfinite().all()
    assert logprobs.grad[1] == 0


def test_a_fixed_length_and_its_aggregation_go_together():
    assert algorithm("dr-grpo", aggregation="token").settings.fixed_length is None
    for keys in ({"aggregation": "fixed"}, {"fixed_length": 9}):
        with pytest.raises(ValueError, match="go together"):
            algorithm("grpo", **keys)


# Properties --------------------------------------------------------------------------------------

NAMES = sorted(ALGORITHMS.table)


@given(st.permutations(range(3)), st.sampled_from(NAMES), st.sampled_from(LEVELS))
def test_the_order_of_attempts_does_not_matter(order, name, level):
    groups, shuffled = make_groups(), make_groups()
    kept = groups[0].trajectories[:3]
    shuffled[0].trajectories = [shuffled[0].trajectories[i] for i in order]

    def of_first(groups):
        flat = advantages(algorithm(name), groups, credit_of(level))
        ends = np.cumsum([sum(lengths(t)) for t in scored(groups[0])])[:-1]
        return np.split(np.array(of_groups(groups, flat)[0]), ends)

    one, two = of_first(groups), of_first(shuffled)
    assert len(kept) == len(two)
    for place, i in enumerate(order):
        assert two[place] == pytest.approx(one[i], abs=1e-12)


@given(
    st.lists(st.integers(0, 9), min_size=10, max_size=10),
    st.sampled_from(NAMES),
    st.sampled_from(LEVELS),
)
def test_observation_tokens_change_no_advantage_and_no_weight(numbers, name, level):
    groups, longer = make_groups(), make_groups()
    extra = itertools.cycle(numbers)
    for t in (t for g in longer for t in g.trajectories):
        t.steps = [
            dataclasses.replace(s, observation_ids=s.observation_ids + (7,) * next(extra))
            for s in t.steps
        ]
    one, two = (advantages(algorithm(name), g, credit_of(level)) for g in (groups, longer))
    assert one == two
    weights = [
        [s.weight for s in loss_weights(g, algorithm(name)).values()] for g in (groups, longer)
    ]
    assert weights[0] == weights[1]


@given(st.floats(-5, 5), st.floats(0.1, 10), st.sampled_from(["grpo", "reinforce++", "ppo"]))
def test_normalised_advantages_do_not_know_the_scale_of_rewards(shift, scale, name):
    if name == "ppo":
        shift = 0.0  # its values would have to shift, too
    groups, scaled = make_groups(), make_groups()
    for t in (t for g in scaled for t in scored(g)):
        t.outcome = type(t.outcome)(t.outcome.reward * scale + shift, False)
    known = make_known(scaled)
    known.values = {key: tuple(v * scale for v in row) for key, row in known.values.items()}
    one = advantages(algorithm(name), groups, credit_of("outcome"))
    two = advantages(algorithm(name), scaled, credit_of("outcome"), known)
    assert two == pytest.approx(one, abs=1e-6)


# Plumbing ----------------------------------------------------------------------------------------


def test_credit_is_noted_for_every_step():
    groups = make_groups()
    known = make_known(groups)
    assign_credit(groups, known, algorithm("ppo"), credit_of("token"))
    for t, keys in keyed(groups):
        for key, n in zip(keys, lengths(t), strict=True):
            assert len(known.advantages[key]) == len(known.value_targets[key]) == n
    assign_credit(groups, known, algorithm("grpo"), credit_of("outcome"))
    assert informative(groups, known, algorithm("grpo")) == groups[:1]
    with pytest.raises(ValueError, match="numbers of their own"):
        assign_credit([*groups, *make_groups()], known, algorithm("grpo"), credit_of("outcome"))


def test_an_algorithm_from_a_function():
    @advantage
    def best_of(returns):
        """1 for the best, 0 for the others."""
        return [float(value == max(returns)) for value in returns]

    mine = best_of(best_of.Settings(name="mine"))
    assert isinstance(mine, Algorithm)
    groups = make_groups()[:1]
    ours = advantages(mine, groups, credit_of("outcome"))
    counts = [sum(lengths(t)) for t in scored(groups[0])]
    assert ours == [1.0] * counts[0] + [0.0] * sum(counts[1:])
    new, old, a, s = tensors(NEW, OLD, ADVANTAGES, SEQUENCES)
    assert torch.equal(
        mine.policy_loss(new, old, a, s),
        clipped_policy_loss(new, old, a, clip_low=0.2, clip_high=0.2),
    )


@pytest.mark.parametrize(
    "given", [lambda r: r[:-1], lambda r: None, lambda r: [math.nan for _ in r]]
)
def test_a_function_that_gives_something_else_is_told_so(given):
    given.__name__ = "mine"
    mine = advantage(given)
    with pytest.raises(ValueError, match="mine must give 3 finite advantages"):
        advantages(mine(mine.Settings(name="mine")), make_groups()[:1], credit_of("outcome"))


@pytest.mark.parametrize(
    "given", [[1.0, 2.0], [[1.0]] * 99, [1.0] * 99], ids=["short", "nested", "long"]
)
def test_an_algorithm_that_gives_something_else_than_a_number_a_token_is_told_so(given):
    class Mine(type(algorithm("grpo"))):
        def advantages(self, groups, credit):
            return given

    groups = make_groups()
    with pytest.raises(ValueError, match="Mine must give a number for each of"):
        assign_credit(groups, make_known(groups), Mine(Mine.Settings()), credit_of("outcome"))


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_names_its_source(name):
    module = __import__(type(algorithm(name)).__module__, fromlist=["x"])
    assert "arXiv" in module.__doc__
    assert type(algorithm(name)).__doc__


def test_importance_in_a_band_leaves_out_what_is_far():
    """By hand: ratios e^-1 = .37, e^0 = 1, e^.5 = 1.65, e^1 = 2.72."""
    old, sampled = torch.tensor([-2.0, -1.0, -0.5, -1.0]), torch.tensor([-1.0, -1.0, -1.0, -2.0])
    found = importance_in_band(old, sampled, low=0.5, high=2.0)
    assert found.tolist() == pytest.approx([0.0, 1.0, math.exp(0.5), 0.0])


def test_a_sequence_is_left_out_by_the_geometric_mean_of_its_ratios():
    """Mean log ratios: (.02 - .02) / 2 = 0 and (.03 + 0) / 2 = .015, more than ln 1.01."""
    old = torch.tensor([-0.98, -1.0, -1.02, -0.97])
    sampled, sequences = torch.full((4,), -1.0), torch.tensor([0, 1, 0, 1])
    found = sequences_in_band(old, sampled, sequences, low=0.99, high=1.01)
    assert found.tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0]),
        ({"importance_cap": 2.0}, [math.exp(-1), 1.0, math.exp(0.5), 2.0]),
        ({"importance_cap": "off"}, [1.0, 1.0, 1.0, 1.0]),
        ({"importance_band": [0.5, 2.0]}, [0.0, 1.0, math.exp(0.5), 0.0]),
        ({"sequence_band": [0.5, 2.0]}, [1.0, 1.0, 0.0, 0.0]),
        ({"sequence_band": [0.5, 2.0], "importance_cap": 1.5}, [math.exp(-1), 1.0, 0.0, 0.0]),
    ],
)
def test_the_keys_of_a_recipe_choose_the_correction(keys, expected):
    """Sequence 0 has the mean log ratio -.5, sequence 1 .75: e^.75 = 2.12."""
    algorithm = GRPO(GRPO.Settings(**keys))
    assert algorithm.corrects == (bool(keys) and keys != {"importance_cap": "off"})
    old, sampled = torch.tensor([-2.0, -1.0, -0.5, -1.0]), torch.tensor([-1.0, -1.0, -1.0, -2.0])
    found = algorithm.importance(old, sampled, torch.tensor([0, 0, 1, 1]))
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"importance_band": [1.5, 2.0]}, "below and one above 1"),
        ({"importance_band": [0.5, 2.0], "importance_cap": 2.0}, "leave out one"),
        ({"sequence_band": [0.9, 1.1], "loss_mask": False}, "no effect"),
    ],
)
def test_corrections_that_make_no_sense_are_refused(keys, reason):
    with pytest.raises(ValueError, match=reason):
        GRPO.Settings(**keys)
