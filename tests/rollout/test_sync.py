"""New weights while actions are sampled: every token under the weights that its span names."""

import asyncio

import pytest
import torch

from agent_r1.model import sampling_weights
from agent_r1.model.logprobs import token_logprobs
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.native import engine as native
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.padded import PaddedEngine
from tests.families import make_family

LONG = Sampling(max_tokens=24, stop_token_ids=())
PROMPTS = ([*range(1, 41)], [*range(1, 41)], [*range(1, 31), 5, 6], [7, 8, 9])


def changed(seed):
    """Another policy of the same shape."""
    policy = make_family("qwen3")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return policy


@pytest.fixture(params=["blocks", "slots", "padded"])
def make(request, monkeypatch):
    if request.param == "padded":
        return lambda policy: PaddedEngine(PaddedEngine.Settings(), policy)
    monkeypatch.setattr(sampling_weights, "MIN_BYTES", 0)
    monkeypatch.setattr(native, "SHARE_OF_FREE", 1e-3)
    settings = NativeEngine.Settings(cache=request.param)
    return lambda policy: NativeEngine(settings, policy)


def check(policies, prefix, action):
    """Log-probabilities and entropies, span by span, beside plain forward passes."""
    ids = torch.tensor([[*prefix, *action.token_ids]])
    assert [span.start for span in action.versions] == [
        0,
        *(span.end for span in action.versions[:-1]),
    ]
    assert action.versions[-1].end == len(action.token_ids) == len(action.logprobs)
    for version, start, end in action.versions:
        with torch.inference_mode():
            logits = policies[version].model(ids).logits[0, len(prefix) - 1 : -1]
        expected = token_logprobs(logits, ids[0, len(prefix) :], 1.0)
        for ours, theirs in zip((action.logprobs, action.entropies), expected, strict=True):
            assert (torch.tensor(ours[start:end]) - theirs[start:end]).abs().max() < 1e-4


def test_an_action_tells_which_weights_sampled_which_of_its_tokens(make):
    policies = [make_family("qwen3"), changed(1), changed(2)]

    async def converse(session, prompt):
        prefix, found = list(prompt), []
        for turn in range(5):
            action = await session.generate(prefix, LONG, seed=len(prompt) + turn)
            found.append((list(prefix), action))
            prefix += [*action.token_ids, 3, 4, 5]
        session.close()
        return found

    async def scenario():
        engine = make(policies[0])
        await engine.start()
        sessions = [engine.session(number) for number in range(len(PROMPTS))]
        talks = [
            asyncio.ensure_future(converse(s, p)) for s, p in zip(sessions, PROMPTS, strict=True)
        ]
        for version in (1, 2):
            seen = engine.report()["sampled"]
            while seen < 9 * len(PROMPTS):
                await asyncio.sleep(0)  # so that none of its passes is missed
                seen += engine.report()["sampled"]
            await engine.sync(policies[version], version)
        found = await asyncio.gather(*talks)
        fresh = await engine.session().generate(list(PROMPTS[3]), LONG, seed=3)
        await engine.close()
        return [pair for talk in found for pair in talk], fresh

    found, fresh = asyncio.run(scenario())
    for prefix, action in [*found, (PROMPTS[3], fresh)]:
        check(policies, prefix, action)
    assert [span.version for span in fresh.versions] == [2]
    used = [[span.version for span in action.versions] for _, action in found]
    assert any(0 in row for row in used) and any(2 in row for row in used)
    if isinstance(make(policies[0]), NativeEngine):
        assert any(len(row) > 1 for row in used)
    else:
        assert all(len(row) == 1 for row in used)  # batches are sampled whole


def test_the_same_weights_again_change_nothing_but_the_version(make):
    """Randomness is the request's own: a change of weights in between draws the same numbers."""
    policy = make_family("qwen3")

    async def sample(*, sync):
        engine = make(policy)
        session = engine.session()
        asked = asyncio.ensure_future(session.generate([1, 2, 3, 4], LONG, seed=5))
        while sync and not engine.report()["sampled"]:
            await asyncio.sleep(0)
        if sync:
            await engine.sync(policy, 1)
        action = await asked
        session.close()
        return action

    alone, across = asyncio.run(sample(sync=False)), asyncio.run(sample(sync=True))
    assert alone.token_ids == across.token_ids
    assert alone.logprobs == pytest.approx(across.logprobs, abs=1e-5)
