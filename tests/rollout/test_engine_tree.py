"""The native engine's cache along the tree: exact for every family, nothing computed twice, memory
kept within its budget, and no episode held up by another's tools.
"""

import asyncio
import functools
import random
import time

import pytest
import torch

from agent_r1.errors import ConfigError
from agent_r1.model import sampling_weights
from agent_r1.model.logprobs import token_logprobs
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.native import engine
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.padded import PaddedEngine
from agent_r1.rollout.rollout import Rollout
from agent_r1.rollout.sampling import draw, truncated
from agent_r1.tasks.hopworld.env import HopWorld
from tests.families import FAMILIES, VOCABULARY, make_family

SAMPLING = Sampling(max_tokens=6, stop_token_ids=())
SETTINGS = {}


@pytest.fixture(autouse=True, params=["blocks", "slots"])
def cache(request, monkeypatch):
    """Where keys and values lie on a CPU, and where on a GPU; there with the passes that a GPU
    captures; on a CPU with the weights' copies, too, as for larger models.
    """
    monkeypatch.setattr(sampling_weights, "MIN_BYTES", 0)
    monkeypatch.setitem(SETTINGS, "cache", request.param)
    if request.param == "slots":
        monkeypatch.setattr(engine, "SHARE_OF_FREE", 1e-3)  # all of it is written to at once
    return request.param


def engine_of(policy, **settings):
    return NativeEngine(NativeEngine.Settings(**SETTINGS, **settings), policy)


def ids(start, count):
    return [(start + 7 * i) % VOCABULARY for i in range(count)]


async def converse(session, prompt, *, turns=3, rewrite=None, pause=0.0, sampling=SAMPLING):
    """Several turns with made-up observations; ``rewrite`` changes the history after the first."""
    prefix, calls = list(prompt), []
    for turn in range(turns):
        action = await session.generate(prefix, sampling, seed=100 * len(prompt) + turn)
        calls.append((prefix, action))
        prefix = [*prefix, *action.token_ids, *ids(turn + len(prompt), 5 + turn)]
        if rewrite and turn == 0:
            prefix = rewrite(prefix)
        await asyncio.sleep(pause)
    session.close()
    return calls


def check(policy, calls, tolerance=1e-4):
    """Every action's log-probabilities and entropies are those of a plain forward pass."""
    for prefix, action in calls:
        path = torch.tensor([[*prefix, *action.token_ids]])
        with torch.inference_mode():
            logits = policy.model(path).logits[0, len(prefix) - 1 : -1]
        expected = token_logprobs(logits, path[0, len(prefix) :], 1.0)
        for ours, theirs in zip((action.logprobs, action.entropies), expected, strict=True):
            assert (torch.tensor(ours) - theirs).abs().max() < tolerance


def run(engine, *conversations):
    async def all_at_once():
        sessions = [engine.session(number) for number in range(len(conversations))]
        pairs = zip(sessions, conversations, strict=True)
        return await asyncio.gather(*(converse(s, **options) for s, options in pairs))

    return asyncio.run(all_at_once())


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_plain_forward_for_every_family(family):
    """Shared long and short beginnings, several turns, histories cut back near and far."""
    policy = make_family(family)
    long, short = ids(1, 90), ids(1, 20)
    conversations = [
        {"prompt": long},
        {"prompt": long},
        {"prompt": long + ids(5, 9), "turns": 2},
        {"prompt": long + ids(5, 9) + ids(2, 3), "rewrite": lambda p: p[:95] + ids(50, 8)},
        {"prompt": short, "rewrite": lambda p: p[:12] + ids(40, 30)},
        {"prompt": short + ids(9, 2), "turns": 4},
        {"prompt": long, "rewrite": lambda p: p[:70] + ids(3, 4), "turns": 2},
    ]
    for calls in run(engine_of(policy), *conversations):
        check(policy, calls)


def test_a_shared_prompt_is_computed_once_and_a_turn_costs_its_new_tokens_only():
    engine = engine_of(make_family("qwen3"))
    prompt = ids(1, 100)
    run(engine, *[{"prompt": prompt, "turns": 1}] * 8)
    report = engine.report()
    assert report["prefilled"] == 100
    assert report["passes"] == SAMPLING.max_tokens
    (calls,) = run(engine, {"prompt": prompt, "turns": 2})
    observed = len(calls[1][0]) - len(calls[0][0]) - SAMPLING.max_tokens
    # The last token of a turn is sampled but not yet run: it comes with the observation.
    assert engine.report()["prefilled"] == 100 + observed + 1


@pytest.mark.parametrize(("shared", "again"), [(90, 1), (40, 1)])
def test_one_who_comes_later_takes_over_what_another_has_computed(shared, again):
    """Long beginnings become a prefix, short ones are copied; the next token needs one computed."""
    policy = make_family("llama")
    engine = engine_of(policy, patience=0.0)
    prompt = ids(1, shared)

    async def staggered():
        one, two = engine.session(0), engine.session(1)
        first = asyncio.ensure_future(converse(one, prompt, turns=2))
        while engine.counters.passes < 2:
            await asyncio.sleep(0)
        before = engine.counters.prefilled
        action = await two.generate(prompt, SAMPLING, 5)
        assert engine.counters.prefilled - before in (again, again + 6)  # and one's next turn
        return await first, [(prompt, action)]

    for calls in asyncio.run(staggered()):
        check(policy, calls)


def gib(policy, tokens):
    return tokens * policy.cache_bytes / 2**30


def test_new_episodes_wait_while_memory_is_short():
    policy = make_family("llama")
    conversations = [{"prompt": ids(number, 30)} for number in range(6)]
    engine = engine_of(policy, cache_gib=gib(policy, 3 * 128))
    scarce = run(engine, *conversations)
    assert engine.report()["passes"] > 2 * 3 * SAMPLING.max_tokens - 1  # two waves at least
    plenty = run(engine_of(policy), *conversations)
    for calls, others in zip(scarce, plenty, strict=True):
        check(policy, calls)
        assert [a.token_ids for _, a in calls] == [a.token_ids for _, a in others]


def test_caches_of_those_who_wait_for_tools_are_dropped_and_computed_again():
    policy = make_family("llama")
    engine = engine_of(policy, cache_gib=gib(policy, 2 * 128 + 60), patience=0.0)
    slow = [{"prompt": ids(n, 40), "turns": 2, "pause": 0.3} for n in range(3)]
    quick = [{"prompt": ids(n, 50), "turns": 2} for n in range(3, 6)]
    for calls in run(engine, *slow, *quick):
        check(policy, calls)
    assert engine.report()["dropped"] > 0


def test_an_episode_that_alone_exceeds_the_memory_ends_truncated():
    policy = make_family("llama")
    engine = engine_of(policy, cache_gib=gib(policy, 200))
    sampling = Sampling(max_tokens=64, stop_token_ids=())
    some = {"prompt": ids(1, 100), "turns": 1, "sampling": sampling}
    none = {"prompt": ids(1, 150), "turns": 1, "sampling": sampling}
    ((_, cut),), ((_, nothing),) = run(engine, some, none)
    assert (cut.stop, len(cut.token_ids)) == ("memory", 28)
    assert (nothing.stop, nothing.token_ids) == ("memory", ())


@pytest.mark.parametrize(("patience", "late"), [(0.0, True), (0.05, True), (10.0, False)])
def test_a_slow_tool_holds_up_its_own_episode_only(patience, late):
    engine = engine_of(make_family("llama"), patience=patience)
    ended = {}

    async def timed(number, pause):
        await converse(engine.session(number), ids(number, 20), turns=2, pause=pause)
        ended[number] = time.perf_counter()

    async def both():
        await asyncio.gather(timed(0, 0.5), timed(1, 0.0))

    start = time.perf_counter()
    asyncio.run(both())
    assert (ended[1] - start < 0.5) == late
    assert bool(engine.report()["late"]) == late


def test_who_was_late_once_is_not_waited_for_again():
    engine = engine_of(make_family("llama"), patience=0.2)
    slow, quick = {"prompt": ids(1, 20), "pause": 0.5, "turns": 4}, {"prompt": ids(2, 20)}
    run(engine, slow, {**quick, "turns": 12, "pause": 0.1})
    report = engine.report()
    assert report["late"] == 1 and report["wait_seconds"] < 1.5  # of the quick one's pauses, most


def test_a_history_rewritten_while_the_others_went_on():
    """The sequence was taken out of its block meanwhile, and is cut back then."""
    policy = make_family("llama")
    late = {"prompt": ids(1, 40), "pause": 0.1, "rewrite": lambda p: p[:30] + ids(8, 9)}
    busy = {"prompt": ids(2, 40), "turns": 6, "pause": 0.02}
    for calls in run(engine_of(policy, patience=0.0), late, busy):
        check(policy, calls)


def test_a_row_that_fills_its_slab_while_it_has_to_wait():
    """128 tokens are just a block; the next turn finds no room as long as others sample."""
    policy = make_family("llama")
    sampling = Sampling(max_tokens=29, stop_token_ids=())
    full = {"prompt": ids(1, 100), "turns": 2, "sampling": sampling}
    others = [{"prompt": ids(n, 60), "turns": 3, "sampling": sampling} for n in (2, 3)]
    engine = engine_of(policy, cache_gib=gib(policy, 4 * 128), patience=0.0)
    for calls in run(engine, full, *others):
        check(policy, calls)


def test_an_engine_that_fails_leaves_no_session_open(base_policy, renderer):
    class Broken(HopWorld):
        def __init__(self, settings):
            raise ConfigError("no such thing")

    engine = engine_of(base_policy)
    rollout = Rollout(
        functools.partial(Broken, HopWorld.Settings()), engine, renderer, Limits(), concurrency=2
    )
    tasks = HopWorld.tasks(HopWorld.Settings(), "train")[:4]
    with pytest.raises(ConfigError, match="no such thing"):
        asyncio.run(rollout.run(tasks, attempts=1, temperature=1.0, seed=0))
    assert not engine.open


def test_a_cancelled_call_leaves_the_session_usable():
    policy = make_family("llama")
    engine = engine_of(policy)

    async def scenario():
        session = engine.session()
        long = Sampling(max_tokens=10_000, stop_token_ids=())
        call = asyncio.ensure_future(session.generate(ids(1, 20), long, 0))
        await asyncio.sleep(0.05)
        call.cancel()
        await asyncio.sleep(0)
        return await converse(session, ids(1, 30))

    check(policy, asyncio.run(scenario()))


def test_what_cannot_be_packed_is_refused_with_the_reason_and_the_cure():
    policy = make_family("llama")
    policy.unpackable = "it has layers of type linear_attention"
    with pytest.raises(ConfigError, match=r"linear_attention; set engine = 'padded'"):
        engine_of(policy)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_padded_engine_gives_the_same(family):
    policy = make_family(family)
    conversations = [{"prompt": ids(n, 12 + 5 * n), "turns": 2} for n in range(3)]
    padded = PaddedEngine(PaddedEngine.Settings(), policy)
    for calls, others in zip(
        run(padded, *conversations), run(engine_of(policy), *conversations), strict=True
    ):
        check(policy, calls)
        assert [a.token_ids for _, a in calls] == [a.token_ids for _, a in others]
    report = padded.report()
    assert report["sampled"] == 3 * 2 * SAMPLING.max_tokens
    assert report["prefilled"] > sum(12 + 5 * n for n in range(3))


def test_stop_strings_end_a_turn_with_the_token_that_completes_them(base_policy):
    encode = base_policy.tokenizer.encode
    prefix = encode("Who is the mentor of Bana Dont?", add_special_tokens=False)

    async def sample(stop_strings):
        sampling = Sampling(20, (), stop_strings, temperature=0.0)
        return await engine_of(base_policy).session().generate(prefix, sampling, 0)

    whole = asyncio.run(sample(()))
    text = base_policy.tokenizer.decode(whole.token_ids)
    wanted = text[len(text) // 3 :][:3]
    cut = asyncio.run(sample((wanted,)))
    assert cut.stop == "stop"
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
    assert wanted in base_policy.tokenizer.decode(cut.token_ids)
    assert wanted not in base_policy.tokenizer.decode(cut.token_ids[:-1])


def test_truncation_by_hand():
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert truncated(p, top_k=2, top_p=1.0).tolist() == pytest.approx([0, 0.4, 0, 0.3])
    assert truncated(p, top_k=0, top_p=0.5).tolist() == pytest.approx([0, 0.4, 0, 0.3])
    assert truncated(p, top_k=0, top_p=0.4).tolist() == pytest.approx([0, 0.4, 0, 0])
    assert truncated(p, top_k=3, top_p=0.7).tolist() == pytest.approx([0, 0.4, 0, 0.3])


def test_truncated_sampling_keeps_the_probabilities_before_truncation():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).repeat(4, 1)
    samplings = [
        Sampling(1, (), top_k=1),
        Sampling(1, (), temperature=0.0),
        Sampling(1, (), top_p=0.01),
        Sampling(1, (), temperature=0.5),
    ]
    token_ids, logprobs, entropies = draw(logits.clone(), [0.99] * 4, samplings)
    assert token_ids == [1, 1, 1, 2]
    plain = token_logprobs(logits, torch.tensor(token_ids), 1.0)
    assert logprobs[:3] == pytest.approx(plain[0][:3].tolist())
    assert entropies[:3] == pytest.approx(plain[1][:3].tolist())
    cold = token_logprobs(logits[:1], torch.tensor([2]), 0.5)
    assert (logprobs[3], entropies[3]) == pytest.approx((cold[0].item(), cold[1].item()))


@pytest.mark.parametrize("size", [3, 256, 257, 1000])
def test_drawing_in_two_steps_is_the_inverse_of_the_cumulated_probabilities(size):
    torch.manual_seed(0)
    logits = torch.randn(50, size) * 3
    uniforms = torch.rand(50, dtype=torch.float64)
    token_ids, _, _ = draw(logits.clone(), uniforms.tolist(), [Sampling(1, ())] * 50)
    cdf = logits.double().softmax(-1).cumsum(-1)
    for row, token_id in enumerate(token_ids):
        below = cdf[row, token_id - 1].item() if token_id else 0.0
        assert below - 1e-6 <= uniforms[row].item() <= cdf[row, token_id].item() + 1e-6


def test_the_ends_of_the_unit_interval_give_possible_tokens():
    logits = torch.full((2, 600), float("-inf"))
    logits[:, 300], logits[:, 400] = 0.0, 0.0
    token_ids, logprobs, _ = draw(logits, [0.0, 1.0 - 1e-16], [Sampling(1, ())] * 2)
    assert token_ids == [300, 400]
    assert logprobs == pytest.approx([-0.6931, -0.6931], abs=1e-3)


def test_who_alone_exceeds_the_memory_drops_the_caches_of_those_who_wait():
    """One waits for its tool with a long history; the other needs all there is."""
    policy = make_family("llama")
    engine = engine_of(policy, patience=0.0, cache_gib=gib(policy, 260))

    async def both():
        waiting, other = engine.session(0), engine.session(1)
        sampling = Sampling(max_tokens=20, stop_token_ids=())
        first = await waiting.generate(ids(0, 70), sampling, seed=0)
        long = Sampling(max_tokens=150, stop_token_ids=())
        second = await other.generate(ids(1, 110), long, seed=1)
        prefix = [*ids(0, 70), *first.token_ids, *ids(2, 3)]
        third = await waiting.generate(prefix, sampling, seed=2)
        waiting.close()
        other.close()
        return [(ids(0, 70), first), (ids(1, 110), second), (prefix, third)]

    calls = asyncio.run(both())
    assert calls[1][1].stop == "memory"
    check(policy, calls)
    assert engine.report()["dropped"] > 0


@pytest.mark.parametrize("seed", range(8))
def test_conversations_at_random_within_little_memory(seed):
    """Lengths of every kind, shared beginnings, sessions that come late and go early."""
    rng = random.Random(seed)
    policy = make_family(("llama", "gemma3")[seed % 2])
    engine = engine_of(policy, patience=0.0, cache_gib=gib(policy, rng.randint(300, 900)))
    shared = [ids(7, rng.randint(60, 150)), ids(8, rng.randint(5, 90))]

    async def converse_at_random(number):
        await asyncio.sleep(rng.random() / 50)
        session, prefix, calls = engine.session(number), list(rng.choice(shared)), []
        prefix += ids(number, rng.randint(1, 20))
        for turn in range(rng.randint(1, 4)):
            sampling = Sampling(rng.randint(1, 40), ())
            action = await session.generate(prefix, sampling, seed=10 * number + turn)
            calls.append((prefix, action))
            prefix = [*prefix, *action.token_ids, *ids(turn, rng.randint(1, 30))]
            if rng.random() < 0.2:
                prefix = prefix[: rng.randint(30, len(prefix))] + ids(3, 4)
            await asyncio.sleep(rng.random() / 100)
        session.close()
        return calls

    async def everybody():
        found = await asyncio.gather(*map(converse_at_random, range(9)))
        return [call for calls in found for call in calls if call[1].token_ids]

    calls = asyncio.run(everybody())
    assert calls
    check(policy, calls)
