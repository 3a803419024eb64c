"""The native engine with the real tiny model, against plain forward passes."""

import asyncio
import functools

import pytest
import torch

from agent_r1.model.logprobs import token_logprobs
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.rollout import Rollout
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.tree import build_tree

SETTINGS = HopWorld.Settings()
LIMITS = Limits(turns=4, tokens_per_turn=64, tokens=600)


def roll(policy, renderer, *, tasks=4, attempts=3, temperature=1.0, seed=1, **settings):
    engine = NativeEngine(NativeEngine.Settings(**settings), policy)
    rollout = Rollout(functools.partial(HopWorld, SETTINGS), engine, renderer, LIMITS)
    drawn = HopWorld.tasks(SETTINGS, "train")[:tasks]
    return asyncio.run(rollout.run(drawn, attempts=attempts, temperature=temperature, seed=seed))


def actions(groups):
    return [[step.action for step in t.steps] for group in groups for t in group.trajectories]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_fresh_full_forward(base_policy, renderer, temperature):
    groups = roll(base_policy, renderer, temperature=temperature)
    num_turns, worst = 0, 0.0
    for group in groups:
        for branch in build_tree(group).branches():
            ids = torch.tensor([branch.token_ids])
            with torch.inference_mode():
                logits = base_policy.model(ids).logits[0, :-1]
            logprobs, entropies = token_logprobs(logits, ids[0, 1:], temperature)
            for start, _, key in branch.actions:
                num_turns += 1
                step = group.trajectories[key.attempt].steps[key.step]
                for offset, (logprob, entropy) in enumerate(
                    zip(step.action.logprobs, step.action.entropies, strict=True)
                ):
                    worst = max(worst, abs(logprobs[start + offset - 1].item() - logprob))
                    worst = max(worst, abs(entropies[start + offset - 1].item() - entropy))
    assert num_turns > 12  # several turns, so that kept caches were used
    assert worst < 1e-4


def test_the_same_seed_gives_the_same_bits(base_policy, renderer):
    assert actions(roll(base_policy, renderer)) == actions(roll(base_policy, renderer))
    assert actions(roll(base_policy, renderer)) != actions(roll(base_policy, renderer, seed=2))


def test_attempts_differ(base_policy, renderer):
    (group,) = roll(base_policy, renderer, tasks=1, attempts=6)
    assert len({t.steps[0].action.token_ids for t in group.trajectories}) > 1


def test_greedy_equals_generate(base_policy, renderer):
    (group,) = roll(base_policy, renderer, tasks=1, attempts=1, temperature=0.0)
    step = group.trajectories[0].steps[0]
    prompt = torch.tensor([group.trajectories[0].prompt_ids])
    expected = base_policy.model.generate(
        prompt, max_new_tokens=LIMITS.tokens_per_turn, do_sample=False
    )
    assert list(step.action.token_ids) == expected[0, prompt.shape[1] :].tolist()


def test_sampling_follows_the_distribution(base_policy):
    """Frequencies of the first token over many seeds are the model's probabilities."""
    prefix = base_policy.tokenizer.encode("Who is the", add_special_tokens=False)
    engine = NativeEngine(NativeEngine.Settings(), base_policy)
    count = 2000

    async def sample():
        sessions = [engine.session() for _ in range(count)]
        sampling = Sampling(max_tokens=1, stop_token_ids=())
        work = (s.generate(prefix, sampling, seed) for seed, s in enumerate(sessions))
        return await asyncio.gather(*work)

    drawn = torch.tensor([action.token_ids[0] for action in asyncio.run(sample())])
    with torch.inference_mode():
        p = base_policy.model(torch.tensor([prefix])).logits[0, -1].softmax(-1)
    frequencies = torch.bincount(drawn, minlength=len(p)) / count
    assert (frequencies - p).abs().max() < 4 * (0.25 / count) ** 0.5


def test_a_rewritten_prefix_is_noticed(base_policy):
    """A session whose history was replaced gives what a fresh session gives."""
    encode = functools.partial(base_policy.tokenizer.encode, add_special_tokens=False)
    first, second = encode("Who is the mentor of Bana"), encode("Who is the rival of Bana Dont?")
    sampling = Sampling(max_tokens=8, stop_token_ids=(), temperature=0.0)

    async def both():
        engine = NativeEngine(NativeEngine.Settings(), base_policy)
        session = engine.session()
        await session.generate(first, sampling, 0)
        rewritten = await session.generate(second, sampling, 0)
        session.close()
        return rewritten, await engine.session().generate(second, sampling, 0)

    rewritten, fresh = asyncio.run(both())
    assert rewritten.token_ids == fresh.token_ids
    assert rewritten.logprobs == pytest.approx(fresh.logprobs, abs=1e-4)


def test_a_batch_waits_for_open_sessions_and_a_cancelled_one_does_not_hold_it_up(base_policy):
    sampling = Sampling(max_tokens=1, stop_token_ids=())

    async def scenario():
        engine = NativeEngine(NativeEngine.Settings(), base_policy)
        one, two = engine.session(), engine.session()
        first = asyncio.ensure_future(one.generate([5, 6], sampling, 0))
        await asyncio.sleep(0.05)
        assert not first.done()
        second = asyncio.ensure_future(two.generate([5, 6, 7], sampling, 0))
        await asyncio.wait_for(asyncio.gather(first, second), 5)
        third = asyncio.ensure_future(one.generate([5, 6, 7], sampling, 0))
        await asyncio.sleep(0.05)
        assert not third.done()
        two.close()
        await asyncio.wait_for(third, 5)
        fourth = asyncio.ensure_future(one.generate([5, 6], sampling, 0))
        three = engine.session()
        await asyncio.sleep(0.05)
        fourth.cancel()
        await asyncio.wait_for(three.generate([8], sampling, 0), 5) if one.close() is None else None

    asyncio.run(scenario())


def test_an_engine_failure_reaches_every_waiting_episode(base_policy, renderer, monkeypatch):
    monkeypatch.setattr(base_policy.model.get_decoder(), "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        roll(base_policy, renderer, tasks=1, attempts=2)
