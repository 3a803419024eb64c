"""Products in bfloat16: who may ask for them, what they bring along, and that a model's proof knows
of them.

Where a processor has no units for them, PyTorch accepts the setting and computes exactly. So linear
layers are rounded here by hand, for many rows only: real kernels differ from shape to shape, too.
"""

import json

import pytest
import torch

import agent_r1
from agent_r1.errors import ConfigError
from agent_r1.model import sampling_weights
from agent_r1.model.load import load_policy
from agent_r1.model.policy import make_policy
from agent_r1.model.products import (
    are_of_use,
    are_rounded,
    exact_products,
    must_be_of_use,
    set_products,
)
from agent_r1.model.sampling_weights import SamplingWeights
from agent_r1.model.settings import ModelSettings
from agent_r1.model.tree_attention import PackedTree, Span
from agent_r1.run.recipe import load_recipe
from agent_r1.training.preflight import warnings_of
from tests.families import make_family
from tests.learner.test_adapter import RECIPE

ROUNDED = {"matmul": "bf16"}
CPU = torch.device("cpu")
TINY = RECIPE | {"train": {**RECIPE["train"], "iterations": 1}, "evaluation": {"every": 0}}


@pytest.fixture
def rounding(monkeypatch):
    exact = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        if are_rounded(CPU) and x.shape[-2] > 9:
            x, weight = x.bfloat16().float(), weight.bfloat16().float()
        return exact(x, weight, bias)

    own = ["highest"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: own[-1])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", own.append)  # none is rounded twice
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    yield
    set_products(ModelSettings(), CPU)


@pytest.fixture
def units(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    yield
    set_products(ModelSettings(), CPU)
    torch.set_float32_matmul_precision("highest")


def test_a_models_proof_knows_of_the_rounding(rounding, monkeypatch):
    set_products(ModelSettings(**ROUNDED), CPU)
    policy = load_policy(ModelSettings(path="smollm2-135m", device="cpu", **ROUNDED))
    assert policy.unpackable is None
    monkeypatch.setattr("agent_r1.model.policy.are_rounded", lambda device: False)
    assert "differ" in make_policy(policy.model, policy.tokenizer).unpackable


def test_the_setting_ends_with_a_run_that_does_without(rounding):
    x = torch.randn(32, 64)
    exact = torch.nn.functional.linear(x, x)
    set_products(ModelSettings(**ROUNDED), CPU)
    assert are_rounded(CPU)
    assert not torch.equal(torch.nn.functional.linear(x, x), exact)
    set_products(ModelSettings(), CPU)
    assert torch.equal(torch.nn.functional.linear(x, x), exact)


def test_onednn_is_told(units):
    set_products(ModelSettings(**ROUNDED), CPU)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    set_products(ModelSettings(), CPU)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


@pytest.mark.parametrize("own", ["highest", "high", "medium"])
def test_a_choice_of_the_users_own_program_is_left_alone(own, units):
    torch.set_float32_matmul_precision(own)
    for settings in ({}, ROUNDED, ROUNDED, {}, {}):
        set_products(ModelSettings(**settings), CPU)
        assert are_rounded(CPU) == (own != "highest" or bool(settings))
    assert torch.get_float32_matmul_precision() == own


def test_a_choice_by_pytorchs_other_interface_is_known_and_not_mixed_with_ours(units):
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        set_products(ModelSettings(), CPU)
        assert are_rounded(CPU)
        with pytest.raises(ConfigError, match="leave one of them out"):
            set_products(ModelSettings(**ROUNDED), CPU)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("device", "capabilities"), [("cpu", {"avx512_bf16": True}), ("cuda:0", {"amx_bf16": True})]
)
def test_a_run_that_was_made_elsewhere_is_exact_here(device, capabilities, units, monkeypatch):
    device = torch.device(device)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr("agent_r1.training.preflight.device_of", lambda settings: device)
    recipe, _ = load_recipe(TINY | {"model": ROUNDED})
    assert any("model.matmul = 'bf16' has no effect here" in line for line in warnings_of(recipe))
    set_products(recipe.model, device)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not are_rounded(device)


def test_pytorch_before_2_9_does_not_tell_what_a_processor_can_do(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not are_of_use(CPU)


def logits_of(policy):
    tree = PackedTree([Span(0, 9, 9, 0)], policy.device)
    with policy.packed(), torch.inference_mode():
        return policy.logits(policy.hidden(torch.arange(9), torch.arange(9), tree))


def test_rounded_sampling_has_copies_in_bfloat16_where_the_processor_takes_them(units, monkeypatch):
    """On processors without any support of bfloat16 in oneDNN nothing is copied."""
    monkeypatch.setattr(sampling_weights, "MIN_BYTES", 0)
    policy = make_family("llama")
    exact = logits_of(policy)
    set_products(ModelSettings(**ROUNDED), CPU)
    weights = SamplingWeights(policy)
    takes_them = sampling_weights._layout_works(torch.bfloat16)
    assert len(weights._layers) == (3 * 7 + 1 if takes_them else 0)
    with weights.used():
        assert torch.get_float32_matmul_precision() == "highest"  # attention's are many and small
        difference = (logits_of(policy) - exact).abs().max()
    assert torch.get_float32_matmul_precision() == "medium"
    assert (1e-6 < difference < 0.05 * exact.abs().max()) == takes_them
    head = policy.base.get_output_embeddings()
    x = torch.randn(1, 3, head.in_features)
    with torch.inference_mode(), weights.used():
        expected = torch.nn.functional.linear(x, head.weight)
        assert torch.allclose(head(x), expected, atol=1e-5)  # logits are not rounded


def test_exact_products_leave_a_choice_of_the_users_own_alone(units):
    torch.set_float32_matmul_precision("medium")
    with exact_products():
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize(
    ("device", "dtype", "units", "reason"),
    [
        ("cpu", "float32", {"avx512_bf16": True, "amx_bf16": False}, "no matrix units"),
        ("cpu", "bfloat16", {"amx_bf16": True}, "leave one of them out"),
        ("cuda:0", "float32", {"amx_bf16": True}, "take model.dtype = 'bfloat16'"),
    ],
)
def test_where_it_would_be_no_faster_it_is_refused(device, dtype, units, reason, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    with pytest.raises(ConfigError, match=f"model.matmul = 'bf16': .*{reason}"):
        must_be_of_use(ModelSettings(dtype=dtype, **ROUNDED), torch.device(device))
    must_be_of_use(ModelSettings(dtype=dtype), torch.device(device))


def test_where_there_are_units_it_is_not(units):
    must_be_of_use(ModelSettings(**ROUNDED), CPU)


def test_importance_weights_are_on_by_default():
    recipe, _ = load_recipe({"env": "hopworld", "model": ROUNDED})
    assert recipe.algorithm.importance_cap == 2.0
    assert load_recipe(recipe.model_dump(mode="json"))[0] == recipe


@pytest.mark.parametrize(
    ("algorithm", "cap"),
    [
        ({"importance_cap": 1e9}, 1e9),
        ({"loss_mask": False}, None),
        ({"name": "ppo", "advantage_mask": False}, None),
        ({"name": "ppo"}, 2.0),
        ({"name": "sft"}, "has none"),
    ],
)
def test_what_the_recipe_says_of_importance_weights_stays(algorithm, cap):
    recipe, _ = load_recipe({"env": "hopworld", "model": ROUNDED, "algorithm": algorithm})
    assert getattr(recipe.algorithm, "importance_cap", "has none") == cap


def test_the_model_of_a_user_cannot_have_another_one():
    user = {"name": "model", "model": ROUNDED}
    with pytest.raises(ConfigError, match=r"model.matmul: set the agent's"):
        load_recipe({"env": {"name": "hopworld-user", "user": user}})


def test_drift_is_measured_and_weighted(rounding, tmp_path):
    """The few rows of sampling are exact here, the many of training rounded."""
    drift = {}
    for name, model in (("rounded", ROUNDED), ("exact", {})):
        recipe = TINY | {"model": {"device": "cpu", **model}}
        drift[name] = agent_r1.train(recipe, run=tmp_path / name).metrics[-1]["figures"]
        assert drift[name]["updates"] == 1
    assert drift["exact"]["logprob_error"] < 1e-4
    assert 1e-3 < drift["rounded"]["logprob_error"] < 0.5
    recipe = json.loads((tmp_path / "rounded" / "recipe.json").read_text())
    assert recipe["algorithm"]["importance_cap"] == 2.0
