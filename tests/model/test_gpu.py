"""``pytest -m gpu``: exact on a CUDA device, too: the learner's two kernels, the engine's captured
passes. Run by ``benchmarks/gpu.py``; elsewhere deselected.
"""

import asyncio
from functools import partial

import pytest
import torch

from agent_r1.algorithms.grpo import GRPO
from agent_r1.learner.learner import Learner
from agent_r1.learner.packed_trees import packs
from agent_r1.learner.padded_rows import rows
from agent_r1.learner.settings import LearnerSettings
from agent_r1.learner.sums import Sums
from agent_r1.model.logprobs import token_logprobs
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.native.engine import NativeEngine
from tests.families import FAMILIES, make_family, random_batch, random_groups

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def on_gpu(family):
    policy = make_family(family)
    policy.model.to(GPU)
    return policy


def gradients(policy, cut, **options):
    algorithm = GRPO(GRPO.Settings(entropy_coef=0.1))
    learner = Learner(policy, algorithm, LearnerSettings(), temperature=0.8)
    policy.model.zero_grad()
    groups, sums = random_groups(), Sums()
    batch = random_batch(groups, algorithm)
    with policy.packed() if cut is not rows else torch.enable_grad():
        for micro in cut(groups, device=GPU, **options):
            learner._backward(micro, batch, sums)
    return {name: p.grad.clone() for name, p in policy.model.named_parameters()}


@pytest.mark.parametrize("attention", ["parts", "flex"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_padded_rows(family, attention):
    policy = on_gpu(family)
    expected = gradients(policy, rows, max_tokens=10**6)
    by_tree = partial(packs, attention=attention)
    for max_tokens in (10**6, 60):
        found = gradients(policy, by_tree, max_tokens=max_tokens)
        for name, gradient in expected.items():
            difference = (found[name] - gradient).norm()
            assert difference <= 1e-4 * gradient.norm(), (name, max_tokens)


@pytest.mark.parametrize("cache", ["blocks", "slots"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_engine_samples_has_the_logprobs_of_a_plain_forward(family, cache):
    """Sessions that end early and ask again, so that passes of several sizes are captured."""
    policy = on_gpu(family)
    engine = NativeEngine(NativeEngine.Settings(cache_gib=0.1, cache=cache), policy)
    prompt = [7 * i % 97 for i in range(150)]

    async def converse(number):
        session, prefix, calls = engine.session(number), [*prompt, number], []
        for turn in range(3):
            sampling = Sampling(5 + 4 * number, (), temperature=(1.0, 0.7, 0.0)[turn])
            action = await session.generate(prefix, sampling, seed=10 * number + turn)
            calls.append((prefix, action, sampling.temperature))
            prefix = [*prefix, *action.token_ids, turn, number]
        session.close()
        return calls

    async def everyone():
        return await asyncio.gather(*map(converse, range(6)))

    for calls in asyncio.run(everyone()):
        for prefix, action, temperature in calls:
            path = torch.tensor([[*prefix, *action.token_ids]], device=GPU)
            with torch.inference_mode():
                logits = policy.model(path).logits[0, len(prefix) - 1 : -1]
            logprobs, entropies = token_logprobs(logits, path[0, len(prefix) :], temperature)
            assert (torch.tensor(action.logprobs) - logprobs.cpu()).abs().max() < 1e-3
            assert (torch.tensor(action.entropies) - entropies.cpu()).abs().max() < 1e-3
            if temperature == 0.0:
                assert list(action.token_ids) == logits.argmax(-1).tolist()
