"""Parts that measure speed: the card, the quick start, passes of the engine, the learner."""

from __future__ import annotations

import asyncio
import platform
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import transformers

from agent_r1.learner.learner import Learner
from agent_r1.learner.memory_plan import plan_memory
from agent_r1.learner.padded_rows import rows
from agent_r1.learner.settings import LearnerSettings
from agent_r1.model.policy import Policy
from agent_r1.model.settings import ModelSettings
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.native.engine import NativeEngine, NativeSession
from agent_r1.types import Action, Estimates, Group
from gpu_parts.common import (
    Bench,
    Figures,
    Found,
    Variant,
    labelled,
    make_learner,
    matmul_peak,
    padded,
    qwen,
    random_policy,
    seconds_of,
    shared_out,
    useful_flops,
    variants,
    workload,
)


def machine(bench: Bench) -> Found:
    """What the figures depend on."""
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    yield "transformers", transformers.__version__
    if bench.cuda:
        properties = torch.cuda.get_device_properties(0)
        yield "card", properties.name
        yield "memory_gib", properties.total_memory / 2**30
    yield "cpu_threads", torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        key = f"{str(dtype).removeprefix('torch.')} matmul peak, tera FLOP/s"
        yield key, bench.tried(lambda dtype=dtype: matmul_peak(bench.device, dtype) / 1e12)


# quickstart ---------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"model.dtype": "bfloat16"},
    "bfloat16, adapter": {
        "model.dtype": "bfloat16",
        "model.lora": {"rank": 16},
        "learner.lr": 2e-3,
    },
}


def quickstart(bench: Bench) -> Found:
    """Iterations of the recipe ``hopworld``, without evaluation."""
    size = {"train.iterations": 1, "train.tasks": 2, "train.attempts": 4}
    common = {
        "model.device": bench.device,
        "train.iterations": 3,
        "evaluation.every": 0,
        "evaluation.test_tasks": 0,
        "checkpoint.every": 1000,
        **(size if bench.small else {}),
    }
    for variant in variants("quickstart", bench):
        chosen = {f"learner.{key}": value for key, value in variant.learner.items()}
        chosen |= {f"engine.{key}": value for key, value in variant.engine.items()}
        for kind, more in KINDS.items():
            measure = partial(_train, {**common, **more, **chosen})
            yield labelled(kind, variant), bench.tried(measure, seconds=15)


def _train(overrides: dict[str, Any]) -> Figures:
    import agent_r1

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = agent_r1.train("hopworld", run=f"{folder}/run", overrides=overrides)
    rows = [row for row in result.metrics if row["iteration"]]
    return {
        "seconds": time.perf_counter() - start,
        "iterations": [
            {
                **{f"{key}_seconds": row["seconds"][key] for key in ("rollout", "learner")},
                "ms_a_pass": 1000 * row["engine"]["model_seconds"] / row["engine"]["passes"],
                **{key: row["engine"][key] for key in ("passes", "sampled")},
                **{key: row["figures"][key] for key in ("success", "logprob_error")},
                "updates_skipped": row["figures"]["updates_skipped"],
            }
            for row in rows
        ],
    }


# decode -------------------------------------------------------------------------------------------

WARM_UP = 8
"""Passes before those that are measured."""
MOST = 200
"""Tokens that a sequence may sample: with its own part of the prompt it stays within 512."""
FIRST = 100
"""The smallest token of prompts; all that are smaller may be special ones."""


def decode(bench: Bench) -> Found:
    """Passes in which each sequence samples one token; contexts of 600 tokens, 300 of them shared
    by all and 36 by eight each.
    """
    sizes = ("tiny",) if bench.small else ("0.5B", "1.5B")
    counts = (1, 4) if bench.small else (1, 16, 64, 256)
    models = [(variant, size) for variant in variants("decode", bench) for size in sizes]
    for part, (variant, size) in shared_out(bench, models):
        policy = random_policy(qwen(size), bench.device, bench.dtype)
        for own, count in shared_out(part, counts):
            figures = own.tried(partial(_decode, own, policy, count, variant), seconds=2)
            yield labelled(f"{size} x {count}", variant), figures
        if bench.cuda:
            calls = bench.tried(partial(_calls, policy, variant), seconds=5)
            yield labelled(f"{size} x 16, calls a pass", variant), calls
        del policy


def _decode(bench: Bench, policy: Policy, count: int, variant: Variant) -> Figures:
    passes = 10 if bench.small else 100
    work = _passes(_engine(policy, variant), _prompts(count), passes, nullcontext(), bench.left)
    return asyncio.run(work)


def _calls(policy: Policy, variant: Variant) -> Figures:
    """How often a pass calls the card: what a slow host pays for. 16 sequences."""
    from torch.profiler import ProfilerActivity, profile

    profiled = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    work = _passes(_engine(policy, variant), _prompts(16), 20, profiled, lambda: 4.0)
    found = asyncio.run(work)
    counts = {event.key: event.count for event in profiled.key_averages()}
    names = [key for key in counts if key.startswith(("cuda", "cuLaunch"))]
    names.sort(key=lambda key: -counts[key])
    return {key: counts[key] / found["passes"] for key in names[:12]}


def _engine(policy: Policy, variant: Variant) -> NativeEngine:
    settings = NativeEngine.Settings(patience=0, cache_gib=12, **variant.engine)
    return NativeEngine(settings, policy)


def _prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)

    def ids(length: int) -> list[int]:
        return [rng.randrange(FIRST, 1000) for _ in range(length)]

    system = ids(300)
    questions = [ids(36) for _ in range((count + 7) // 8)]
    return [system + questions[number // 8] + ids(264) for number in range(count)]


async def _passes(
    engine: NativeEngine,
    prompts: Sequence[list[int]],
    passes: int,
    around: AbstractContextManager[Any],
    left: Callable[[], float],
) -> Figures:
    """The engine's own count of so many passes, or of fewer when no time is ``left``, but at least
    a second's: all prompts are run first, then all sequences sample at once. Measured within
    ``around``.
    """
    sessions = [engine.session(number) for number in range(len(prompts))]
    asked: list[asyncio.Task[Any]] = []

    async def until(reached: Callable[[], bool]) -> None:
        while not reached():
            if done := [task for task in asked if task.done()]:
                raise RuntimeError(f"a sequence has ended: {done[0].exception()!r}")
            await asyncio.sleep(0.01)

    try:
        said = await asyncio.gather(*map(_ask, sessions, prompts, [1] * len(prompts)))
        before = engine.report()
        for session, ids, action in zip(sessions, prompts, said, strict=True):
            path = [*ids, *action.token_ids, FIRST]
            asked.append(asyncio.create_task(_ask(session, path, MOST)))
        begun = engine.counters.passes
        await until(lambda: engine.counters.passes - begun >= WARM_UP)
        await engine.pause()  # so that no pass is counted that began before
        engine.report()
        begun = engine.counters.passes
        with around:
            start = time.perf_counter()
            engine.resume()
            end = start + min(max(left(), 1.0), 8.0)
            await until(
                lambda: engine.counters.passes - begun >= passes or time.perf_counter() > end
            )
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await engine.idle()  # the pass at work is counted whole
        stopped = time.perf_counter()
        for session in sessions:
            session.close()
    wall, found = stopped - start, engine.report()
    return {
        "ms_a_pass": 1000 * found["model_seconds"] / found["passes"],
        "ms_a_pass_with_the_event_loop": 1000 * wall / found["passes"],
        "tokens_per_second": found["sampled"] / wall,
        "passes": found["passes"],
        "sequences_a_pass": found["sampled"] / found["passes"],
        "prompts": {key: before[key] for key in ("prefilled", "passes", "model_seconds")},
    }


async def _ask(session: NativeSession, path: list[int], most: int) -> Action:
    sampling = Sampling(max_tokens=most, stop_token_ids=())
    return await session.generate(path, sampling, session.number)


# learner ------------------------------------------------------------------------------------------

ROWS = 4096
"""Padded tokens of a micro-batch of rows; their logits take more memory than those of trees."""


def learner(bench: Bench) -> Found:
    """Updates of GRPO: 64 episodes are 16 thousand tokens in a tree, 256 are 54 thousand."""
    peak = matmul_peak(bench.device, bench.dtype)
    yield "matmul peak, tera FLOP/s", peak / 1e12
    sizes = ("tiny",) if bench.small else ("0.5B", "1.5B", "3B")
    for part, size in shared_out(bench, sizes):
        for own, variant in shared_out(part, variants("learner", bench)):
            yield from _updates(own, size, variant, peak)


def _updates(bench: Bench, size: str, variant: Variant, peak: float) -> Found:
    """All updates of one model; with the first variant padded rows, too: no variant changes
    them.
    """
    made = bench.tried(partial(_make, bench, size, variant))
    if not isinstance(made, Learner):
        yield labelled(size, variant), made
        return
    rate = 0.0
    for episodes in (2, 4) if bench.small else (64, 256):
        groups, known = workload(episodes, size)
        flops = useful_flops(made.policy, groups, tokens=made.micro_batch_tokens)
        if variant == variants("learner", bench)[0]:
            few = _fitting(bench, made.policy, size, episodes, peak)
            measure = partial(_rows, bench, made, size, few, peak)
            yield f"{size}, {few} episodes, padded rows", bench.tried(measure)
        measure = partial(_update, bench, made, groups, known, flops, peak)
        figures = bench.tried(measure, seconds=rate * flops)
        if "seconds" in figures:
            rate = 1.3 * figures["seconds"] / flops
        yield labelled(f"{size}, {episodes} episodes, tree", variant), figures


def _make(bench: Bench, size: str, variant: Variant) -> Learner:
    """With micro-batches as a run would plan them, of 16,384 tokens at most."""
    plan = plan_memory(
        qwen(size),
        ModelSettings(device=bench.device, dtype=str(bench.dtype).removeprefix("torch.")),
        LearnerSettings(),
        device=torch.device(bench.device),
        longest=2048,
        reference=False,
    )
    policy = random_policy(qwen(size), bench.device, bench.dtype)
    return make_learner(policy, tokens=min(16_384, plan.micro_batch_tokens), variant=variant)


def _update(
    bench: Bench,
    learner: Learner,
    groups: list[Group],
    known: Estimates,
    flops: float,
    peak: float,
) -> Figures:
    """The fewest seconds of up to three updates; the first may have to warm up."""
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    updates = []
    most = 1 if bench.small else 3
    while len(seconds) < most and (not seconds or 1.2 * seconds[-1] < bench.left()):
        seconds.append(
            seconds_of(lambda: updates.append(learner.update(groups, known, lr=1e-9, seed=0)))
        )
    least, update = min(seconds), updates[-1]
    together = sum(t.num_tokens for group in groups for t in group.trajectories)
    return {
        "seconds": least,
        "all_seconds": seconds,
        "share_of_peak": flops / least / peak,
        "tokens": update.num_tokens,
        "tokens_as_sequences": together,
        "tokens_as_sequences_per_second": together / least,
        "micro_batch_tokens": learner.micro_batch_tokens,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if bench.cuda else None,
        "grad_norm": update.grad_norm,
        "notes": [*update.notes, *(note for u in updates for note in u.skipped)],
    }


def _rows(bench: Bench, learner: Learner, size: str, episodes: int, peak: float) -> Figures:
    """As ``_update``, of rows. The share counts the work that the tree would have had; the tokens,
    padding too.
    """
    groups, known = workload(episodes, size)
    flops = useful_flops(learner.policy, groups, tokens=learner.micro_batch_tokens)
    with padded(learner, tokens=ROWS):
        found = _update(bench, learner, groups, known, flops, peak)
        cut = rows(groups, max_tokens=learner.micro_batch_tokens, device=torch.device("cpu"))
        return {**found, "tokens_with_padding": sum(part.token_ids.numel() for part in cut)}


def _fitting(bench: Bench, policy: Policy, size: str, episodes: int, peak: float) -> int:
    """So many episodes, or fewer if rows of them might take more than a third of the time left: at
    a tenth of the peak, three times a tree's work.
    """
    while episodes > 8:
        groups, _ = workload(episodes, size)
        flops = useful_flops(policy, groups, tokens=16_384)
        if 30 * flops / peak < bench.left() / 3:
            break
        episodes //= 2
    return episodes
