"""Parts that check: the tests for a card, log-probabilities, gradients."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from agent_r1.learner.learner import Learner, Update
from agent_r1.model.policy import Policy
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.native.engine import NativeEngine, NativeSession
from agent_r1.types import Estimates, Group, PerToken, Step, StepKey, Trajectory
from gpu_parts.common import (
    Bench,
    Figures,
    Found,
    Variant,
    in_float32,
    labelled,
    make_learner,
    padded,
    qwen,
    random_policy,
    variants,
    workload,
)

ROOT = Path(__file__).resolve().parent.parent.parent
DTYPES = (torch.float32, torch.bfloat16)


# tests --------------------------------------------------------------------------------------------


def tests(bench: Bench) -> Found:
    """``pytest -m gpu``; only the files with such tests are read, as others may need more than is
    installed. On a CPU the tests are collected, not run.
    """
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text()
    ]
    yield "files", files
    if not files:
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider"]
    known = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(ROOT), *([known] if known else [])])
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, *files, *([] if bench.cuda else ["--collect-only"])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=max(bench.left(), 20))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        yield "output", (process.communicate()[0] or "")[-6000:]
        raise
    lines = printed.strip().splitlines()
    yield "seconds", round(time.monotonic() - start, 1)
    yield "summary", lines[-1] if lines else ""
    if process.returncode:
        yield "output", printed[-6000:]
        raise RuntimeError(f"pytest's exit status is {process.returncode}")


# exactness ----------------------------------------------------------------------------------------

FAMILIES = ("llama", "qwen2", "qwen2-sliding", "qwen3", "mistral", "gemma3")
WIDER = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 32,
    "initializer_range": 0.15,
}
"""As in ``tests/families.py``, except for heads as wide as kernels of a card want them."""


def exactness(bench: Bench) -> Found:
    """Differences of log-probabilities, for each family, type and variant."""
    for variant in variants("exactness", bench):
        for family in FAMILIES[:1] if bench.small else FAMILIES:
            for dtype in DTYPES:
                name = f"{family} {str(dtype).removeprefix('torch.')}"
                measure = partial(_exact, family, dtype, bench.device, variant)
                yield labelled(name, variant), bench.tried(measure)


def family_policy(family: str, device: str, dtype: torch.dtype) -> Policy:
    from tests.families import make_family

    config = copy.deepcopy(make_family(family).model.config)
    for name, value in WIDER.items():
        setattr(config, name, value)
    return random_policy(config, device, dtype)


def _exact(family: str, dtype: torch.dtype, device: str, variant: Variant) -> Figures:
    from tests.families import random_groups

    groups = random_groups(num_groups=3)
    policy = family_policy(family, device, dtype)
    if policy.unpackable:
        return {"unpackable": policy.unpackable}
    played = play(policy, groups, variant)
    learner = make_learner(policy, tokens=512, variant=variant)
    packed = logprobs(learner, played)
    sampled = {key: step.action.logprobs for group in played for key, step in group.steps()}
    with padded(learner, tokens=512):
        plain = logprobs(learner, played)
    found: Figures = {
        "packed against plain": differences(packed, plain),
        "engine against learner": differences(sampled, packed),
    }
    if dtype != torch.float32:
        single = make_learner(in_float32(policy), tokens=512)
        with padded(single, tokens=512):
            exact = logprobs(single, played)
        found["packed against float32"] = differences(packed, exact)
        found["plain against float32"] = differences(plain, exact)
    return found


def logprobs(learner: Learner, groups: list[Group]) -> Mapping[StepKey, PerToken]:
    """Those of all action tokens, by step."""
    return learner.prepare(groups, old=True).old_logprobs


def differences(
    one: Mapping[StepKey, PerToken], other: Mapping[StepKey, PerToken]
) -> dict[str, float]:
    """The largest and the mean absolute difference over all tokens."""
    assert one.keys() == other.keys()
    apart = [abs(a - b) for key in one for a, b in zip(one[key], other[key], strict=True)]
    return {"max": max(apart), "mean": math.fsum(apart) / len(apart)}


def play(policy: Policy, groups: list[Group], variant: Variant) -> list[Group]:
    """The groups with actions of the same lengths that the native engine has sampled, all episodes
    at once.
    """
    engine = NativeEngine(NativeEngine.Settings(cache_gib=0.25, **variant.engine), policy)
    trajectories = [t for group in groups for t in group.trajectories]

    async def everything() -> list[Trajectory]:
        sessions = [engine.session(number) for number in range(len(trajectories))]
        pairs = zip(sessions, trajectories, strict=True)
        return await asyncio.gather(*(_episode(session, t) for session, t in pairs))

    rest = iter(asyncio.run(everything()))
    return [
        dataclasses.replace(group, trajectories=[next(rest) for _ in group.trajectories])
        for group in groups
    ]


async def _episode(session: NativeSession, trajectory: Trajectory) -> Trajectory:
    path = list(trajectory.prompt_ids)
    steps: list[Step] = []
    for number, step in enumerate(trajectory.steps):
        if step.context_ids is not None:
            path = list(step.context_ids)
        sampling = Sampling(max_tokens=len(step.action.token_ids), stop_token_ids=())
        action = await session.generate(path, sampling, 100 * session.number + number)
        path += [*action.token_ids, *step.observation_ids]
        steps.append(dataclasses.replace(step, action=action))
    session.close()
    return dataclasses.replace(trajectory, steps=steps)


# gradients ----------------------------------------------------------------------------------------

Gradient = dict[str, Tensor]


def gradients(bench: Bench) -> Found:
    """The gradient of an update by packed trees against that by padded rows: of a model with heads
    as those of Qwen2.5 0.5B, on long-tailed episodes.
    """
    for variant in variants("gradients", bench):
        for dtype in DTYPES:
            figures = bench.tried(partial(_gradients, bench, dtype, variant))
            yield labelled(str(dtype).removeprefix("torch."), variant), figures


def _gradients(bench: Bench, dtype: torch.dtype, variant: Variant) -> Figures:
    size = "tiny" if bench.small else "narrow"
    groups, known = workload(2 if bench.small else 32, size)
    policy = random_policy(qwen(size), bench.device, dtype)
    learner = make_learner(policy, tokens=4096, variant=variant, max_grad_norm=1e9)
    update, packed = gradient(learner, groups, known)
    with padded(learner, tokens=4096):
        other, plain = gradient(learner, groups, known)
    found: Figures = {
        "packed": {"norm": update.grad_norm, "loss": update.loss, "tokens": update.num_tokens},
        "padded": {"norm": other.grad_norm, "loss": other.loss, "tokens": other.num_tokens},
        "packed against padded": apart(packed, plain),
    }
    if dtype != torch.float32:
        single = make_learner(in_float32(policy), tokens=4096, max_grad_norm=1e9)
        with padded(single, tokens=4096):
            _, exact = gradient(single, groups, known)
        found["packed against float32"] = apart(packed, exact)
        found["padded against float32"] = apart(plain, exact)
    return found


def gradient(learner: Learner, groups: list[Group], known: Estimates) -> tuple[Update, Gradient]:
    """An update without its step, and the gradient by parameter."""
    optimizer, kept = learner.optimizer, {}
    named = [n for n, p in learner.policy.model.named_parameters() if p.requires_grad]

    def keep(lr: float) -> None:
        for name, master in zip(named, optimizer.masters, strict=True):
            if master.grad is not None:
                kept[name] = master.grad.float().clone()

    step, optimizer.step = optimizer.step, keep  # type: ignore[method-assign]
    try:
        return learner.update(groups, known, lr=1.0, seed=0), kept
    finally:
        optimizer.step = step  # type: ignore[method-assign]


def apart(one: Gradient, other: Gradient) -> Figures:
    """Norms of the difference, relative to the other's: of the whole, and the worst parameter's."""
    assert one.keys() == other.keys()
    squares = {n: ((one[n] - other[n]).norm().item(), other[n].norm().item()) for n in one}
    worst = max(squares, key=lambda name: squares[name][0] / (squares[name][1] + 1e-12))
    difference, norm = squares[worst]
    whole = math.sqrt(sum(d * d for d, _ in squares.values()))
    return {
        "relative": whole / math.sqrt(sum(n * n for _, n in squares.values())),
        "worst": difference / (norm + 1e-12),
        "worst parameter": worst,
    }
