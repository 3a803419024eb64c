"""LoRA, half precision, checkpointing, memory that runs out: the learner's other ways."""

import copy
import dataclasses
import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM

import agent_r1
from agent_r1.algorithms.grpo import GRPO
from agent_r1.errors import ConfigError
from agent_r1.learner.credit_assignment import steps_of
from agent_r1.learner.learner import Learner
from agent_r1.learner.memory_plan import free_memory, plan_memory
from agent_r1.learner.micro_batch import Actions
from agent_r1.learner.packed_trees import Pack, packs
from agent_r1.learner.padded_rows import rows
from agent_r1.learner.settings import LearnerSettings
from agent_r1.learner.sums import Sums
from agent_r1.model.load import load_config, load_policy
from agent_r1.model.policy import make_policy, why_unpackable
from agent_r1.model.settings import LoraSettings, ModelSettings
from agent_r1.model.tree_attention import PackedTree, Span
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.run.recipe import load_recipe
from tests.families import (
    FAMILIES,
    SIZES,
    make_family,
    random_batch,
    random_estimates,
    random_groups,
)
from tests.learner.test_packed_trees import assert_close, gradients
from tests.rollout.test_engine_tree import check, ids, run

CPU = torch.device("cpu")


def with_adapter(family):
    """A random model with an adapter that changes something."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = peft.get_peft_model(make_family(family).model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return make_policy(model, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_an_adapter_equal_those_of_the_simple_path(family):
    policy, groups = with_adapter(family), random_groups()
    assert policy.unpackable is None
    oracle = gradients(policy, groups, rows)
    assert oracle
    assert all("lora" in name for name in oracle)
    assert_close(gradients(policy, groups, packs), oracle)
    assert_close(gradients(policy, groups, packs, max_tokens=60), oracle)
    assert_close(gradients(policy, groups, packs, checkpointing=True), oracle)


def test_the_engine_samples_from_the_adapted_model():
    policy = with_adapter("qwen3")
    for calls in run(NativeEngine(NativeEngine.Settings(), policy), *[{"prompt": ids(1, 40)}] * 2):
        check(policy, calls)


def test_an_adapter_is_its_own_reference():
    algorithm = GRPO(GRPO.Settings(kl={"coef": 0.5}))
    policy, groups = with_adapter("llama"), random_groups()
    learner = Learner(policy, algorithm, LearnerSettings(), temperature=1.0)
    update = learner.update(groups, random_estimates(groups), lr=1e-3, seed=0)
    plain = make_family("llama")
    expected = 0.0
    batch = random_batch(groups, algorithm)
    for micro in packs(groups, max_tokens=10**6, device=CPU):
        before = with_adapter("llama")
        with torch.no_grad(), before.packed(), plain.packed():
            ours, theirs = (micro.forward(p, 1.0).logprobs for p in (before, plain))
        difference = theirs - ours
        weighed = Actions.of(micro.keys, batch, CPU).weights
        expected += (weighed * (difference.exp() - difference - 1)).sum().item()
    assert update.kl == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


RECIPE = {
    "env": "hopworld",
    "threads": 2,
    "credit": {"name": "trajectory", "weights": {"answered": 0.0}},
    "limits": {"turns": 2, "tokens_per_turn": 64, "tokens": 400},
    "train": {"iterations": 2, "tasks": 2, "attempts": 4},
    "learner": {"lr": 0.01},
    "evaluation": {"every": 1, "tasks": 4},
    "model": {"lora": {"rank": 4}},
}


def test_an_adapter_is_trained_resumed_loaded_and_exported(tmp_path):
    whole = agent_r1.train(RECIPE, run=tmp_path / "whole")
    shorter = json.loads(json.dumps(RECIPE)) | {"train": {**RECIPE["train"], "iterations": 1}}
    agent_r1.train(shorter, run=tmp_path / "part")
    recipe = tmp_path / "part" / "recipe.json"
    recipe.write_text((tmp_path / "whole" / "recipe.json").read_text())
    resumed = agent_r1.resume(tmp_path / "part")
    assert resumed.metrics[-1]["figures"] == whole.metrics[-1]["figures"]
    assert whole.metrics[-1]["figures"]["updates"] == 1

    folder = tmp_path / "whole" / "checkpoints" / "last"
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    agent = agent_r1.load(tmp_path / "whole", "last")
    out = agent_r1.export(tmp_path / "whole", tmp_path / "plain", "last")
    merged = AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        adapted, plain = agent.policy.model(tokens).logits, merged(tokens).logits
        base = load_policy(ModelSettings()).model(tokens).logits
    assert (adapted - plain).abs().max() < 1e-4
    assert (adapted - base).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="is there already"):
        agent_r1.export(tmp_path / "whole", out)


def test_a_wrong_target_names_the_field():
    model = ModelSettings(lora=LoraSettings(targets=("nothing_proj",)))
    with pytest.raises(ConfigError, match=r"model\.lora\.targets = .*nothing_proj"):
        load_policy(model)


def test_an_unknown_key_of_the_adapter_is_an_error():
    with pytest.raises(ConfigError, match=r"lora\.rang: no such key; did you mean 'rank'"):
        load_recipe({"env": "hopworld", "model": {"lora": {"rang": 4}}})


# Precision ----------------------------------------------------------------------------------------


def test_half_precision_steps_are_made_on_float32_masters():
    """Steps too small for bfloat16 add up in the master, and resume where they were."""
    policy = make_policy(make_family("llama").model.to(torch.bfloat16), None)
    groups = random_groups()
    settings = LearnerSettings()
    learner = Learner(policy, GRPO(GRPO.Settings()), settings, temperature=1.0)
    pairs = zip(learner.optimizer.parameters, learner.optimizer.masters, strict=True)
    weight, master = next(pair for pair in pairs if pair[0].dim() == 1)  # of a norm: all ones
    assert master.dtype == torch.float32
    learner.update(groups, random_estimates(groups), lr=1e-6, seed=0)
    assert torch.equal(weight, torch.ones_like(weight))
    assert not torch.equal(master, torch.ones_like(master))
    state = copy.deepcopy(learner.optimizer.state_dict())
    other = make_policy(make_family("llama").model.to(torch.bfloat16), None)
    again = Learner(other, GRPO(GRPO.Settings()), settings, temperature=1.0)
    again.optimizer.load_state_dict(state)
    for _ in range(3):
        learner.update(groups, random_estimates(groups), lr=1e-3, seed=0)
    assert not torch.equal(weight, torch.ones_like(weight))
    assert torch.equal(weight, master.bfloat16())
    for one, two in zip(again.optimizer.masters, state["masters"], strict=True):
        assert torch.equal(one, two)


def test_the_gradient_in_half_precision_is_summed_in_float32():
    """Micro-batches add up in the masters, not in bfloat16."""
    groups = random_groups()
    exact = gradients(make_family("llama"), groups, packs)
    policy = make_policy(make_family("llama").model.to(torch.bfloat16), None)
    learner = Learner(policy, GRPO(GRPO.Settings()), LearnerSettings(), temperature=0.8)
    batch = random_batch(groups, learner.algorithm)
    with policy.packed():
        for micro in packs(groups, max_tokens=40, device=CPU):
            learner._backward(micro, batch, Sums())
    assert all(p.grad is None for p in learner.optimizer.parameters)
    assert {m.grad.dtype for m in learner.optimizer.masters} == {torch.float32}
    assert len(learner.optimizer.masters) == len(exact)


def test_the_engine_runs_in_half_precision():
    policy = make_policy(make_family("qwen3").model.to(torch.bfloat16), None)
    assert policy.unpackable is None
    for calls in run(NativeEngine(NativeEngine.Settings(), policy), {"prompt": ids(1, 30)}):
        check(policy, calls, tolerance=0.5)


# Memory -------------------------------------------------------------------------------------------


class Scarce(GRPO):
    """Stands for a device whose memory is short: large micro-batches fail after some work."""

    def __init__(self, most):
        super().__init__(GRPO.Settings())
        self.most, self.failed = most, 0

    def policy_loss(self, logprobs, old_logprobs, advantages, sequences):
        if len(logprobs) > self.most:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().policy_loss(logprobs, old_logprobs, advantages, sequences)


def test_memory_that_runs_out_restarts_the_accumulation_in_smaller_cuts():
    groups, updates = random_groups(2, num_groups=4), []
    states = []
    for algorithm in (Scarce(10**6), Scarce(40)):
        policy = make_family("llama")
        learner = Learner(
            policy, algorithm, LearnerSettings(), temperature=1.0, micro_batch_tokens=1000
        )
        updates.append(learner.update(groups, random_estimates(groups), lr=1e-3, seed=0))
        states.append(policy.model.state_dict())
    assert algorithm.failed
    assert any("memory ran out" in note for note in updates[1].notes)
    assert learner.micro_batch_tokens < 1000
    one, two = (dataclasses.asdict(update) for update in updates)
    for name in ("loss", "grad_norm", "clip_fraction", "num_steps"):
        assert one[name] == pytest.approx(two[name], rel=1e-4)
    for name, value in states[0].items():
        # Adam's first step has the gradient's sign alone: near 0 that is a matter of rounding.
        close = torch.isclose(value, states[1][name], atol=1e-4)
        assert close.float().mean() > 0.995, name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("old_logprobs", {"importance_cap": 2.0}),
        ("reference_logprobs", {"kl": {"place": "reward", "coef": 0.1}}),
        ("reference_logprobs", {"kl": {"place": "loss", "coef": 0.1}}),
    ],
)
def test_memory_that_runs_out_before_the_gradient_restarts_the_estimates(
    name, options, monkeypatch
):
    groups, forward = random_groups(2, num_groups=4), Pack.forward
    algorithm = GRPO(GRPO.Settings(**options))

    def estimates():
        policy, reference = make_family("llama"), make_family("llama")
        learner = Learner(
            policy,
            algorithm,
            LearnerSettings(),
            temperature=1.0,
            reference=reference,
            micro_batch_tokens=1000,
        )
        known = random_estimates(groups)
        known.add(learner.prepare(groups))
        update = learner.update(groups, known, lr=1e-3, seed=0)
        return getattr(known, name), update.notes, learner.micro_batch_tokens

    expected, notes, _ = estimates()
    assert not notes

    def scarce(self, *arguments):
        if self.num_tokens > 120:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *arguments)

    monkeypatch.setattr(Pack, "forward", scarce)
    found, notes, micro_batch_tokens = estimates()
    assert any("memory ran out" in note for note in notes)
    assert micro_batch_tokens < 1000
    assert expected.keys() == found.keys() == steps_of(groups).keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=1e-5)


def test_nothing_is_left_of_a_gradient_that_memory_did_not_suffice_for():
    policy = make_policy(make_family("llama").model.to(torch.bfloat16), None)
    learner = Learner(policy, GRPO(GRPO.Settings()), LearnerSettings(), temperature=1.0)
    for parameter in learner.optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)  # the hook failed here
    learner.optimizer.zero_grad()
    assert all(p.grad is None for p in learner.optimizer.parameters)


def test_memory_that_is_never_enough_is_an_error():
    learner = Learner(make_family("llama"), Scarce(0), LearnerSettings(), temperature=1.0)
    with pytest.raises(torch.OutOfMemoryError):
        groups = random_groups()
        learner.update(groups, random_estimates(groups), lr=1e-3, seed=0)


def plan(longest=512, **options):
    model = ModelSettings(**options.pop("model", {}))
    learner = LearnerSettings(**options)
    return plan_memory(
        load_config(model), model, learner, device=CPU, longest=longest, reference=False
    )


def test_the_memory_plan_counts_what_is_kept():
    """The estimate per token against what a forward pass of the real model keeps."""
    held = 0
    policy = load_policy(ModelSettings(device="cpu"))
    weights = {p.data_ptr() for p in policy.model.parameters()}
    seen = set()

    def count(tensor):
        nonlocal held
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | seen:
            seen.add(storage.data_ptr())
            held += storage.nbytes()
        return tensor

    count_tokens = 256
    tree = PackedTree([Span(0, count_tokens, count_tokens, 0)], CPU)
    positions = torch.arange(count_tokens)
    with policy.packed(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        hidden = policy.hidden(positions, positions, tree)
    assert plan().activations / 1.3 == pytest.approx(held / count_tokens, rel=0.1)
    assert hidden.shape == (count_tokens, policy.model.config.hidden_size)


def test_checkpointing_and_adapters_take_less():
    whole = plan()
    assert plan(checkpointing=True).activations < whole.activations / 2
    assert plan(model={"lora": LoraSettings()}).weights < whole.weights / 3
    assert plan(model={"dtype": "bfloat16"}).cache == whole.cache / 2
    assert 512 <= whole.micro_batch_tokens <= 4096
    assert plan(micro_batch_tokens=700).micro_batch_tokens == 700
    assert free_memory(CPU) > 2**28


def test_an_episode_that_cannot_fit_is_an_error_before_the_model_is_loaded():
    with pytest.raises(ConfigError, match=r"limits\.tokens = 1000000000: .*checkpointing = true"):
        plan(longest=10**9)


# Models that cannot be packed ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "depends on the length"),
        ({"attn_logit_softcapping": 50.0}, "caps logits"),
    ],
)
def test_a_configuration_that_cannot_be_packed_says_why(change, reason):
    config = copy.deepcopy(make_family("qwen3").model.config)
    for name, value in change.items():
        setattr(config, name, value)
    assert reason in why_unpackable(config)


def test_a_model_that_scales_its_logits_is_found_out():
    """What no list of names knows is seen by comparing with a plain forward pass."""
    policy = make_policy(CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.1)), None)
    assert "differ" in policy.unpackable


def test_an_unpackable_model_is_trained_on_padded_rows():
    policy, groups = make_family("llama"), random_groups()
    reference = copy.deepcopy(policy)
    policy.unpackable = "for the test"
    updates = [
        Learner(p, GRPO(GRPO.Settings()), LearnerSettings(), temperature=1.0).update(
            groups, random_estimates(groups), lr=1e-3, seed=0
        )
        for p in (policy, reference)
    ]
    assert updates[0].grad_norm == pytest.approx(updates[1].grad_norm, rel=1e-4)
    assert updates[0].num_tokens > updates[1].num_tokens
