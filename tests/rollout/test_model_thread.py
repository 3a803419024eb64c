"""The model samples in a thread: the event loop goes on, and engines take turns."""

import asyncio
import contextlib
import threading
import time

import pytest

from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.padded import PaddedEngine, sample
from agent_r1.types import Message
from agent_r1.utils.scope import run_async, scope

SAMPLING = Sampling(3, ())


def slowed(monkeypatch):
    """Every pass takes more than half a second more; who ran it is noted."""
    ran = []

    def slow(function):
        def run(*args):
            ran.append(threading.current_thread().name)
            time.sleep(0.6)
            return function(*args)

        return run

    monkeypatch.setattr(NativeEngine, "_run", slow(NativeEngine._run))
    monkeypatch.setattr("agent_r1.rollout.padded.sample", slow(sample))
    return ran


async def longest_pause(work):
    """The longest time for which the loop stood still meanwhile, in seconds."""
    task, longest = asyncio.ensure_future(work), 0.0
    while not task.done():
        start = time.perf_counter()
        await asyncio.sleep(0.01)
        longest = max(longest, time.perf_counter() - start)
    return longest, task.result()


async def generate(engine, prompt):
    session = engine.session()
    try:
        return await session.generate(prompt, SAMPLING, 0)
    finally:
        session.close()
        await engine.idle()


@pytest.mark.parametrize("kind", [NativeEngine, PaddedEngine])
def test_the_loop_goes_on_while_the_model_works(base_policy, renderer, monkeypatch, kind):
    engine = kind(kind.Settings(), base_policy)
    prompt = list(renderer.prompt([Message("user", "Who?")], []))
    expected = asyncio.run(generate(engine, prompt))
    ran, before = slowed(monkeypatch), threading.active_count()
    with scope():
        pause, action = run_async(longest_pause(generate(engine, prompt)))
        again = run_async(generate(kind(kind.Settings(), base_policy), prompt))
    assert action == again == expected
    assert ran and set(ran) == {"model_0"}, "one thread for all engines of a scope"
    assert pause < 0.5
    assert threading.active_count() == before


def test_sessions_that_are_given_up_during_a_pass_leave_the_engine_whole(
    base_policy, renderer, monkeypatch
):
    engine = NativeEngine(NativeEngine.Settings(), base_policy)
    prompt = list(renderer.prompt([Message("user", "Who?")], []))
    expected = asyncio.run(generate(engine, prompt))
    slowed(monkeypatch)

    async def given_up():
        sessions = [engine.session(number) for number in range(2)]
        first, second = (
            asyncio.ensure_future(session.generate(prompt, SAMPLING, 0)) for session in sessions
        )
        await asyncio.sleep(0.1)  # a pass is under way
        first.cancel()
        sessions[0].close()
        action = await second
        sessions[1].close()
        await engine.idle()
        return action

    with scope():
        assert run_async(given_up()).token_ids == expected.token_ids
        assert not engine.open and not engine.requests
        assert run_async(generate(engine, prompt)) == expected


def test_one_who_asks_again_during_a_pass_is_not_given_the_old_answer(
    base_policy, renderer, monkeypatch
):
    engine = NativeEngine(NativeEngine.Settings(), base_policy)
    one, other = (list(renderer.prompt([Message("user", q)], [])) for q in ("Who?", "Where is it?"))
    expected = asyncio.run(generate(engine, other))
    slowed(monkeypatch)

    async def impatient():
        session = engine.session()
        short = Sampling(1, ())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await session.generate(one, short, 0)
        action = await session.generate(other, SAMPLING, 0)
        session.close()
        await engine.idle()
        return action

    with scope():
        action = run_async(impatient())
    assert action.token_ids == expected.token_ids
    assert action.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
