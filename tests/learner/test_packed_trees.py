"""Packed trees against one plain forward pass per branch, for every family of models."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_r1.algorithms.grpo import GRPO
from agent_r1.learner.credit_assignment import steps_of
from agent_r1.learner.learner import Learner
from agent_r1.learner.packed_trees import packs
from agent_r1.learner.padded_rows import rows
from agent_r1.learner.settings import LearnerSettings
from agent_r1.learner.sums import Sums
from agent_r1.model.logprobs import head_logprobs, token_logprobs
from agent_r1.tree import build_tree
from tests.families import FAMILIES, make_family, random_batch, random_groups

CPU = torch.device("cpu")
GRPO_WITH_ENTROPY = GRPO(GRPO.Settings(clip_high=10.0, clip_low=0.99, entropy_coef=0.1))


def cut_all(groups, *, max_tokens=10**6, cut=packs):
    return list(cut(groups, max_tokens=max_tokens, device=CPU))


def by_step(micro_batches, policy, temperature):
    """Log-probabilities and entropies of each action, by step."""
    values = {}
    for micro in micro_batches:
        context = nullcontext() if hasattr(micro, "row") else policy.packed()
        with torch.no_grad(), context:
            found = micro.forward(policy, temperature)
        both = found.logprobs, found.entropies
        parts = (x.split(list(micro.lengths)) for x in both)
        for key, *pair in zip(micro.keys, *parts, strict=True):
            assert key not in values, "an action is in the loss once"
            values[key] = torch.stack(pair)
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_those_of_separate_sequences(family):
    policy, groups = make_family(family), random_groups()
    assert policy.unpackable is None
    ours = by_step(cut_all(groups), policy, 0.8)
    for group in groups:
        for branch in build_tree(group).branches():
            ids = torch.tensor([branch.token_ids])
            with torch.no_grad():
                logits = policy.model(ids).logits[0, :-1]
            plain = torch.stack(token_logprobs(logits, ids[0, 1:], 0.8))
            for start, end, key in branch.actions:
                expected = plain[:, start - 1 : end - 1]
                assert (ours[key] - expected).abs().max() < 1e-4
    assert len(ours) == sum(len(t.steps) for g in groups for t in g.trajectories)


def gradients(policy, groups, cut, *, max_tokens=10**6, **options):
    learner = Learner(policy, GRPO_WITH_ENTROPY, LearnerSettings(**options), temperature=0.8)
    learner.cut = cut
    policy.model.zero_grad()
    sums = Sums()
    batch = random_batch(groups, GRPO_WITH_ENTROPY)
    context = policy.packed() if cut is packs else nullcontext()
    with context:
        policy.model.train(options.get("checkpointing", False))
        for micro in cut(groups, max_tokens=max_tokens, device=CPU):
            learner._backward(micro, batch, sums)
        policy.model.eval()
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.requires_grad}


def assert_close(ours, oracle):
    assert ours.keys() == oracle.keys()
    for name, gradient in oracle.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_simple_path(family):
    policy, groups = make_family(family), random_groups()
    oracle = gradients(policy, groups, rows)
    assert_close(gradients(policy, groups, packs), oracle)
    assert_close(gradients(policy, groups, packs, max_tokens=60), oracle)
    assert_close(gradients(policy, groups, packs, checkpointing=True), oracle)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_plain_kernel_of_other_devices_gives_the_same(family, monkeypatch):
    policy, groups = make_family(family), random_groups()
    oracle = gradients(policy, groups, rows)
    monkeypatch.setattr("agent_r1.model.attention_kernels._kernel_works", lambda: False)
    monkeypatch.setattr("agent_r1.model.attention_kernels.QUERIES", 7)
    assert_close(gradients(policy, groups, packs), oracle)


@pytest.mark.parametrize("max_tokens", [1, 50, 120])
def test_the_cut_holds_the_budget_and_every_action_once(max_tokens):
    groups = random_groups(3, num_groups=4)
    whole = cut_all(groups)
    assert len(whole) == 1
    parts = cut_all(groups, max_tokens=max_tokens)
    assert len(parts) > 2
    branches = [b for g in groups for b in build_tree(g).branches()]
    longest = max(len(branch.token_ids) for branch in branches)
    assert all(part.num_tokens <= max(max_tokens, longest) for part in parts)
    assert sorted(key for part in parts for key in part.keys) == sorted(steps_of(groups))


def test_every_token_is_run_once_and_none_that_nobody_needs():
    groups = random_groups(5, rewrite=False)
    tree = build_tree(*groups)
    leaves = sum(len(g.trajectories) for g in groups)
    (pack,) = cut_all(groups)
    assert pack.num_tokens == tree.num_tokens - leaves  # nothing follows a branch's last token
    separate = sum(t.num_tokens for g in groups for t in g.trajectories)
    assert pack.num_tokens < 0.75 * separate


@given(seed=st.integers(0, 10**6), max_tokens=st.integers(1, 300))
@settings(max_examples=25, deadline=None)
def test_any_tree_packs_to_the_same_logprobs(seed, max_tokens):
    policy, groups = SMALL, random_groups(seed, num_groups=1 + seed % 3)
    packed = by_step(cut_all(groups, max_tokens=max_tokens), policy, 1.0)
    padded = by_step(cut_all(groups, cut=rows), policy, 1.0)
    assert packed.keys() == padded.keys()
    for key, value in padded.items():
        assert (packed[key] - value).abs().max() < 1e-4


SMALL = make_family("mistral")


@pytest.mark.parametrize("kept_bytes", [0, 4 * 97 * 5, 2**30])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_head_logprobs_equal_plain_ones(monkeypatch, kept_bytes, with_entropy):
    monkeypatch.setattr("agent_r1.model.logprobs.CHUNK_BYTES", {"cpu": 4 * 97 * 3})
    monkeypatch.setattr("agent_r1.model.logprobs.KEPT_BYTES", kept_bytes)
    torch.manual_seed(0)
    inputs = [torch.randn(11, 16), torch.randn(97, 16), torch.randn(97)]
    token_ids = torch.randint(97, (11,))

    def run(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        logprobs, entropies = function(*leaves)
        weights = torch.linspace(-1, 1, 11)
        (
            (weights * logprobs).sum() + with_entropy * (weights * entropies).square().sum()
        ).backward()
        return [logprobs, entropies, *(leaf.grad for leaf in leaves)]

    def plain(hidden, weight, bias):
        return token_logprobs(hidden @ weight.T + bias, token_ids, 0.7)

    ours = run(lambda h, w, b: head_logprobs(h, w, b, token_ids, 0.7))
    for one, two in zip(ours, run(plain), strict=True):
        assert (one - two).norm() <= 1e-5 * two.norm()
