"""The copies that the engine samples with: they compute what the layers compute, and no longer."""

import peft
import pytest
import torch

from agent_r1.model import sampling_weights
from agent_r1.model.policy import make_policy
from agent_r1.model.sampling_weights import SamplingWeights
from agent_r1.model.tree_attention import PackedTree, Span
from tests.families import FAMILIES, make_family
from tests.learner.test_adapter import with_adapter


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch):
    monkeypatch.setattr(sampling_weights, "MIN_BYTES", 0)


def logits_of(policy):
    tree = PackedTree([Span(0, 9, 9, 0)], policy.device)
    with policy.packed(), torch.inference_mode():
        return policy.logits(policy.hidden(torch.arange(9), torch.arange(9), tree))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [False, True])
def test_every_layer_is_replaced_and_computes_the_same(family, adapter, monkeypatch):
    policy = with_adapter(family) if adapter else make_family(family)
    expected = logits_of(policy)
    weights = SamplingWeights(policy)
    assert len(weights._layers) == 3 * 7 + 1
    plain = torch.nn.functional.linear
    calls = []
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *x, **k: calls.append(1) or plain(*x, **k)
    )
    with weights.used():
        found = logits_of(policy)
    assert not calls
    assert torch.allclose(found, expected, atol=2e-5)
    assert torch.equal(logits_of(policy), expected)
    assert calls


def test_the_copies_are_of_their_moment():
    policy = make_family("llama")
    weights, before = SamplingWeights(policy), logits_of(policy)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter *= 1.1
    with weights.used():
        assert not torch.allclose(logits_of(policy), before, atol=2e-5)  # norms are not copied
    with SamplingWeights(policy).used():
        found = logits_of(policy)
    assert torch.allclose(found, logits_of(policy), atol=2e-5)


def test_copies_that_would_not_fit_or_not_help_are_not_made(monkeypatch):
    policy = make_family("llama")
    size = sum(parameter.nbytes for parameter in policy.model.parameters())
    assert SamplingWeights(policy, size)._layers
    assert not SamplingWeights(policy, size - 1)._layers
    monkeypatch.setattr(sampling_weights, "MIN_BYTES", size + 1)
    assert not SamplingWeights(policy, size)._layers


def test_an_error_leaves_the_model_as_it_was():
    policy = make_family("llama")
    before = logits_of(policy)
    with pytest.raises(KeyError), SamplingWeights(policy).used():
        raise KeyError
    assert torch.equal(logits_of(policy), before)


@pytest.mark.parametrize("broken", [AttributeError, lambda *_: lambda x: torch.zeros(1, 2, 64)])
def test_another_pytorch_is_left_alone(broken, monkeypatch):
    def fails(*arguments):
        raise broken

    monkeypatch.setattr(sampling_weights, "_packed", fails if isinstance(broken, type) else broken)
    sampling_weights._layout_works.cache_clear()
    try:
        assert not SamplingWeights(make_family("llama"))._layers
    finally:
        sampling_weights._layout_works.cache_clear()


def test_a_bias_of_the_adapter_is_not_lost():
    policy = make_family("qwen2")
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], lora_bias=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(policy.model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    policy = make_policy(model, None)
    expected = logits_of(policy)
    with SamplingWeights(policy).used():
        assert torch.allclose(logits_of(policy), expected, atol=2e-5)


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    policy = make_family("llama")
    layer = policy.base.get_output_embeddings()
    layer.forward = lambda x: torch.full((len(x), 97), 2.0)
    for _ in range(2):
        with SamplingWeights(policy).used():
            assert logits_of(policy).eq(2.0).all()
