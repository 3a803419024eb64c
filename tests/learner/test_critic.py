"""The learner with a critic, old and reference log-probabilities, and masks off: on real models,
against plain forward passes.
"""

import copy
import json

import pytest
import torch

import agent_r1
from agent_r1.algorithms.credit import OutcomeCredit, TokenCredit
from agent_r1.algorithms.grpo import GRPO
from agent_r1.algorithms.gspo import GSPO
from agent_r1.algorithms.ppo import PPO
from agent_r1.learner.credit_assignment import assign_credit, loss_weights, steps_of
from agent_r1.learner.learner import Learner
from agent_r1.learner.mask_ablation import Masked, Unmasked, masks_of
from agent_r1.learner.micro_batch import Actions, Batch
from agent_r1.learner.packed_trees import packs
from agent_r1.learner.padded_rows import rows
from agent_r1.learner.settings import LearnerSettings
from agent_r1.learner.sums import Sums
from agent_r1.types import Estimates, StepKey, StopReason
from tests.families import make_family, random_groups

CPU = torch.device("cpu")


def make_learner(policy, algorithm, **options):
    learner = Learner(
        policy,
        algorithm,
        LearnerSettings(lr=1e-3, **options),
        temperature=0.8,
        reference=make_family("llama") if algorithm.kl else None,
    )
    if learner.critic is not None:  # a head that says something
        with torch.no_grad():
            learner.critic.weight.copy_(torch.linspace(-1, 1, learner.critic.weight.numel())[None])
            learner.critic.bias.fill_(0.3)
    return learner


def plain(policy, groups, temperature=0.8):
    """Per step: log-probabilities of its tokens, last hidden states before them and after the
    last, by one plain pass for each trajectory without rewritten history.
    """
    found = {}
    for g in groups:
        places = []
        for key, step in g.steps():
            if key.step == 0:
                path = list(g.trajectories[key.attempt].prompt_ids)
            if step.context_ids is not None:
                path = list(step.context_ids)
            places.append((list(path), key, step))
            path += [*step.action.token_ids, *step.observation_ids]
        for before, key, step in places:
            ids = torch.tensor([[*before, *step.action.token_ids]])
            with torch.no_grad():
                output = policy.model(ids, output_hidden_states=True)
            first, n = len(before), len(step.action.token_ids)
            logp = (output.logits[0] / temperature).log_softmax(-1)
            logprobs = logp[torch.arange(first - 1, first + n - 1), ids[0, first:]]
            found[key] = logprobs, output.hidden_states[-1][0, first - 1 :]
    return found


@pytest.mark.parametrize("cut", [packs, rows])
def test_values_stand_before_each_token_and_after_the_last(cut):
    policy, groups = make_family("qwen3"), random_groups()
    learner = make_learner(policy, PPO(PPO.Settings()))
    learner.cut = cut
    if cut is rows:
        policy.unpackable = "for the test"
    known = learner.prepare(groups, old=True)
    for key, (logprobs, hidden) in plain(policy, groups).items():
        with torch.no_grad():
            values = learner.critic(hidden).squeeze(-1)
        assert known.values[key] == pytest.approx(values.tolist(), abs=1e-4)
        assert known.old_logprobs[key] == pytest.approx(logprobs.tolist(), abs=1e-4)


def gradients(learner, groups, known, max_tokens):
    learner.optimizer.zero_grad()
    learner.micro_batch_tokens = max_tokens
    batch = Batch(steps_of(groups), known, loss_weights(groups, learner.algorithm))
    sums = Sums()
    with learner.policy.packed():
        for micro in learner._micro_batches(groups):
            learner._backward(micro, batch, sums)
    named = [*learner.policy.model.named_parameters()]
    if learner.critic is not None:
        named += learner.critic.named_parameters()
    return {n: p.grad.clone() for n, p in named}, sums


@pytest.mark.parametrize(
    "algorithm",
    [
        PPO(PPO.Settings(value_gradient=True, value_clip=0.2)),
        GSPO(GSPO.Settings(clip_low=0.5, clip_high=0.5)),
        GRPO(GRPO.Settings(kl={"coef": 0.1, "estimator": "k2"}, entropy_coef=0.01)),
        GRPO(GRPO.Settings(importance_cap=2.0)),
    ],
    ids=["ppo", "gspo", "kl", "importance"],
)
def test_the_cut_into_micro_batches_changes_nothing(algorithm):
    """With trajectories whose history was rewritten, so that they have several branches."""
    groups = random_groups(5, num_groups=3)
    learner = make_learner(make_family("llama"), algorithm)
    known = learner.prepare(groups)
    if learner.kl:
        known.reference_logprobs = learner._refer(groups)
    assign_credit(groups, known, algorithm, OutcomeCredit(OutcomeCredit.Settings()))
    whole, sums = gradients(learner, groups, known, 10**6)
    parts, sums_of_parts = gradients(learner, groups, known, 1)
    assert sums_of_parts.num_tokens > sums.num_tokens
    assert sums_of_parts.total("loss") == pytest.approx(sums.total("loss"), abs=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in whole.values())
    for name, gradient in whole.items():
        assert (gradient - parts[name]).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def test_the_loss_is_that_of_the_formulas():
    """PPO's policy and value loss, token by token, in plain Python."""
    policy, groups = make_family("llama"), random_groups()
    ppo = PPO(PPO.Settings(value_coef=0.7, gamma=0.99, lam=0.95))
    learner = make_learner(policy, ppo)
    known = learner.prepare(groups)
    assign_credit(groups, known, ppo, TokenCredit(TokenCredit.Settings()))
    expected, count = 0.0, 0
    found = plain(policy, groups)
    for key, step in steps_of(groups).items():
        logprobs, _ = found[key]
        for i in range(len(step.action.token_ids)):
            ratio = (logprobs[i] - step.action.logprobs[i]).exp().item()
            a = known.advantages[key][i]
            expected -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            expected += 0.7 * (known.values[key][i] - known.value_targets[key][i]) ** 2 / 2
            count += 1
    update = learner.update(groups, known, lr=1e-9, seed=0)
    assert update.loss == pytest.approx(expected / count, rel=1e-4)


def test_the_critic_learns_and_warm_up_leaves_the_policy_alone():
    policy, groups = make_family("llama"), random_groups()
    ppo = PPO(PPO.Settings(value_lr=0.02, value_gradient=True))
    learner = Learner(policy, ppo, LearnerSettings(lr=1e-3), temperature=1.0)
    before = copy.deepcopy(policy.model.state_dict())
    credit = OutcomeCredit(OutcomeCredit.Settings())
    variances = []
    for _ in range(60):
        known = learner.prepare(groups)
        assign_credit(groups, known, ppo, credit)
        update = learner.update(groups, known, lr=1e-3, seed=0, critic_only=True)
        variances.append(update.explained_variance)
    assert variances[0] == pytest.approx(0.0, abs=1e-6)
    assert variances[-1] > 0.3
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    learner.update(groups, known, lr=1e-3, seed=0)
    assert any(not torch.equal(v, before[n]) for n, v in policy.model.state_dict().items())


def test_importance_weights_are_relative_to_the_policy_the_update_starts_from():
    groups = random_groups()
    algorithm = GRPO(GRPO.Settings(importance_cap=1.5, aggregation="token"))
    learner = make_learner(make_family("llama"), algorithm)
    known = learner.prepare(groups)
    assign_credit(groups, known, algorithm, OutcomeCredit(OutcomeCredit.Settings()))
    update = learner.update(groups, known, lr=1e-9, seed=0)
    expected, count = 0.0, 0
    for key, step in steps_of(groups).items():
        ratios = update.ratios[key]
        assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-4)
        for old, sampled, a in zip(
            known.old_logprobs[key], step.action.logprobs, known.advantages[key], strict=True
        ):
            expected -= min(float(torch.tensor(old - sampled).exp()), 1.5) * a
            count += 1
    assert update.loss == pytest.approx(expected / count, rel=1e-4)


def test_masks_off_put_observations_in_credit_and_loss():
    groups = random_groups(rewrite=False)
    policy = make_family("llama")
    ppo = PPO(PPO.Settings(loss_mask=False, advantage_mask=False, normalize=False, lam=0.9))
    learner = make_learner(policy, ppo)
    masks = masks_of(ppo)
    assert isinstance(masks, Unmasked)
    credit = OutcomeCredit(OutcomeCredit.Settings())
    view, known = masks.credited(groups, learner, ppo, credit)
    own = masks.own(groups, known)
    assert any(step.observation_ids for step in steps_of(groups).values())
    seen_steps = steps_of(view)
    for key, step in steps_of(groups).items():
        n, seen = len(step.action.token_ids), seen_steps[key]
        assert seen.action.token_ids == step.action.token_ids + step.observation_ids
        assert seen.action.logprobs[:n] == step.action.logprobs
        assert len(known.advantages[key]) == n + len(step.observation_ids)
        assert seen.action.logprobs[n:] == known.old_logprobs[key][n:]
        assert own.advantages[key] == known.advantages[key][:n]
        assert own.values[key] == known.values[key][: n + 1]
    # Their log-probabilities are the policy's: a plain pass over the trajectory says the same.
    t, s = groups[0].scored[0], view[0].scored[0]
    path = [*t.prompt_ids, *(i for step in s.steps for i in step.action.token_ids)]
    with torch.no_grad():
        logp = (policy.model(torch.tensor([path])).logits[0] / 0.8).log_softmax(-1)
    first = len(t.prompt_ids) + len(t.steps[0].action.token_ids)
    observed = t.steps[0].observation_ids
    expected = [logp[first + i - 1, token].item() for i, token in enumerate(observed)]
    assert s.steps[0].action.logprobs[-len(observed) :] == pytest.approx(expected, abs=1e-4)
    # GAE with lam < 1 decays over them, too: nothing like the masked estimate.
    _, masked = Masked().credited(
        groups, learner, PPO(PPO.Settings(normalize=False, lam=0.9)), credit
    )
    first = StepKey(0, 0, 0)
    assert masked.advantages[first] != pytest.approx(own.advantages[first])
    update = learner.update(view, known, lr=1e-4, seed=0)
    assert update.num_steps == 1


def test_masked_trajectories_are_sequences_of_their_own_and_weigh_nothing():
    groups = random_groups()
    groups[0].trajectories[0].stop = StopReason.MAX_TURNS
    gspo = GSPO(GSPO.Settings(truncated="mask"))
    known, steps = Estimates(), steps_of(groups)
    assign_credit(groups, known, gspo, OutcomeCredit(OutcomeCredit.Settings()))
    batch = Batch(steps, known, loss_weights(groups, gspo))
    actions = Actions.of([*steps], batch, CPU)
    masked = groups[0].trajectories[0].num_action_tokens
    assert actions.weights[:masked].abs().max() == 0
    assert actions.weights[masked:].min() > 0
    numbers = actions.sequences.unique_consecutive()
    assert numbers.tolist() == list(range(sum(len(g.scored) for g in groups)))


def test_a_mini_batch_that_is_masked_whole_makes_no_step():
    groups = random_groups()
    for t in (t for g in groups for t in g.trajectories):
        t.stop = StopReason.MAX_TURNS
    grpo = GRPO(GRPO.Settings(truncated="mask"))
    learner = make_learner(make_family("llama"), grpo)
    known = Estimates()
    assign_credit(groups, known, grpo, OutcomeCredit(OutcomeCredit.Settings()))
    assert learner.update(groups, known, lr=1e-3, seed=0).num_steps == 0


RECIPE = {
    "env": "hopworld",
    "threads": 1,
    "limits": {"turns": 3, "tokens_per_turn": 48, "tokens": 500},
    "train": {"iterations": 2, "tasks": 3, "attempts": 4},
    "learner": {"lr": 3e-4},
    "evaluation": {"every": 0},
}


def resumed_equals_whole(recipe, tmp_path):
    whole = agent_r1.train(recipe, run=tmp_path / "whole")
    shorter = recipe | {"train": {**recipe["train"], "iterations": 1}}
    agent_r1.train(shorter, run=tmp_path / "part")
    (tmp_path / "part" / "recipe.json").write_text((tmp_path / "whole" / "recipe.json").read_text())
    resumed = agent_r1.resume(tmp_path / "part")
    assert resumed.metrics[-1]["figures"] == whole.metrics[-1]["figures"]
    return whole


@pytest.mark.parametrize("name", ["ppo", "step-gae"])
def test_a_run_with_a_critic_resumes_exactly(tmp_path, name):
    recipe = RECIPE | {"algorithm": {"name": name, "critic_warmup": 1}, "credit": "token"}
    figures = [row["figures"] for row in resumed_equals_whole(recipe, tmp_path).metrics[1:]]
    assert figures[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert figures[1]["explained_variance"] != 0.0
    assert all(f["value_loss"] > 0 for f in figures)


def test_masks_off_and_kl_in_the_reward_through_the_real_loop(tmp_path):
    off = {"name": "ppo", "loss_mask": False, "advantage_mask": False}
    run = agent_r1.train(RECIPE | {"algorithm": off}, run=tmp_path / "off")
    on = agent_r1.train(RECIPE | {"algorithm": "ppo"}, run=tmp_path / "on")
    assert run.metrics[1]["figures"]["updates"] == 1
    assert run.metrics[1]["figures"]["grad_norm"] != on.metrics[1]["figures"]["grad_norm"]
    group, known = next(run.run.estimated(1))
    key, stored = next(group.steps())
    count = len(stored.action.token_ids)
    assert len(known.advantages[key]) == len(known.ratios[key]) == count
    kl = {"name": "reinforce++", "kl": {"coef": 0.1, "estimator": "k1", "place": "reward"}}
    run = agent_r1.train(RECIPE | {"algorithm": kl}, run=tmp_path / "kl")
    group, known = next(run.run.estimated(2))
    key, stored = next(group.steps())
    assert len(known.reference_logprobs[key]) == len(stored.action.token_ids)
    assert known.reference_logprobs[key] != pytest.approx(stored.action.logprobs, abs=1e-6)


def test_dynamic_sampling_replaces_groups_without_a_signal(tmp_path):
    recipe = RECIPE | {
        "algorithm": {"name": "dapo", "refills": 16},
        "train": {"iterations": 1, "tasks": 4, "attempts": 2},
    }
    result = agent_r1.train(recipe, run=tmp_path / "dapo")
    figures = result.metrics[-1]["figures"]
    assert figures["groups_without_signal"] > 0
    assert figures["groups_used"] == 4
    stored = list(result.run.trajectories(1))
    assert len(stored) == figures["groups_used"] + figures["groups_without_signal"]
    assert len({group.task.id for group in stored}) == len(stored)
    state = json.loads((result.run.path / "checkpoints" / "last" / "state.json").read_text())
    assert state["cursor"] == len(stored), "the next iteration draws other tasks"
