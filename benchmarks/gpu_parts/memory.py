"""Parts about the card's memory: the plan against the peak, and an update that runs short of it."""

from __future__ import annotations

from functools import partial

import torch

from agent_r1.learner.learner import Learner
from agent_r1.learner.memory_plan import MemoryPlan, plan_memory
from agent_r1.learner.packed_trees import packs
from agent_r1.learner.settings import LearnerSettings
from agent_r1.model.settings import LoraSettings, ModelSettings
from gpu_parts.common import (
    Bench,
    Figures,
    Found,
    Variant,
    free,
    labelled,
    make_learner,
    qwen,
    random_policy,
    variants,
    workload,
)

GIB = 2**30
KINDS = {"whole": (False, False), "checkpointing": (True, False), "adapter": (False, True)}
"""Whether activations are computed again, and whether an adapter is trained."""


# memory -------------------------------------------------------------------------------------------


def memory(bench: Bench) -> Found:
    """What ``plan_memory`` says that an update takes, and what it took."""
    sizes = {"tiny": ("whole",)} if bench.small else {"0.5B": ("whole",), "1.5B": tuple(KINDS)}
    for variant in variants("memory", bench):
        for size, kinds in sizes.items():
            for kind in kinds:
                figures = bench.tried(partial(_memory, bench, size, kind, variant), seconds=3)
                yield labelled(f"{size}, {kind}", variant), figures


def _memory(bench: Bench, size: str, kind: str, variant: Variant) -> Figures:
    checkpointing, lora = KINDS[kind]
    tokens = 1024 if bench.small else 8192
    keys = {"checkpointing": checkpointing, **variant.learner}
    chosen = _plan(bench, size, LearnerSettings(**keys), lora)
    plan = _plan(bench, size, LearnerSettings(**keys, micro_batch_tokens=tokens), lora)
    groups, known = workload(4 if bench.small else 36, size)
    cut = packs(groups, max_tokens=tokens, device=torch.device("cpu"))
    largest = max(pack.num_tokens for pack in cut)
    planned = plan.weights + plan.activations * largest + plan.logits
    found: Figures = {
        "micro_batch_tokens_by_default": chosen.micro_batch_tokens,
        "largest_micro_batch": largest,
        "planned_gib": planned / GIB,
        "planned": {key: value / GIB for key, value in plan.figures(episodes=64, tokens=1).items()},
        "activations_kib_a_token": plan.activations / 1024,
    }
    if not bench.cuda:
        return found
    free()
    before = torch.cuda.memory_allocated()
    policy = random_policy(qwen(size), bench.device, bench.dtype, lora=lora)
    learner = make_learner(policy, tokens=tokens, variant=variant, checkpointing=checkpointing)
    learner.update(groups, known, lr=1e-9, seed=0)  # makes the optimiser's moments
    free()
    kept = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    update = learner.update(groups, known, lr=1e-9, seed=0)
    peak = torch.cuda.max_memory_allocated() - before
    return {
        **found,
        "peak_gib": peak / GIB,
        "peak_of_planned": peak / planned,
        "kept_between_updates_gib": kept / GIB,
        "reserved_gib": torch.cuda.memory_reserved() / GIB,
        "notes": update.notes,
    }


def _plan(bench: Bench, size: str, settings: LearnerSettings, lora: bool) -> MemoryPlan:
    model = ModelSettings(
        device=bench.device,
        dtype=str(bench.dtype).removeprefix("torch."),
        lora=LoraSettings() if lora else None,
    )
    return plan_memory(
        qwen(size),
        model,
        settings,
        device=torch.device(bench.device),
        longest=2048,
        reference=False,
    )


# shortage -----------------------------------------------------------------------------------------


def shortage(bench: Bench) -> Found:
    """An update with enough memory, then with too little for its micro-batches."""
    for variant in variants("shortage", bench):
        figures = bench.tried(partial(_shortage, bench, variant), seconds=5)
        yield labelled("update", variant), figures


def _shortage(bench: Bench, variant: Variant) -> Figures:
    size, tokens, episodes = ("tiny", 1024, 4) if bench.small else ("0.5B", 8192, 36)
    groups, known = workload(episodes, size)
    policy = random_policy(qwen(size), bench.device, bench.dtype)
    learner = make_learner(policy, tokens=tokens, variant=variant)
    learner.update(groups, known, lr=0.0, seed=0)  # makes the optimiser's moments
    free()
    ample_peak = 0
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
        ample_peak = -torch.cuda.memory_allocated()
    ample = learner.update(groups, known, lr=0.0, seed=0)
    if bench.cuda:
        ample_peak += torch.cuda.max_memory_allocated()
    free()
    ballast = _ballast(ample_peak) if bench.cuda else _pretend(learner, 800)
    try:
        scarce = learner.update(groups, known, lr=0.0, seed=0)
    finally:
        del ballast
        learner.__dict__.pop("_backward", None)
    if not scarce.notes:
        raise RuntimeError("memory did not run out: the ballast was too small")
    return {
        "how": "ballast" if bench.cuda else "an error raised by hand",
        "needed_gib": ample_peak / GIB,
        "micro_batch_tokens": [tokens, learner.micro_batch_tokens],
        "restarts": len(scarce.notes),
        "updates": scarce.num_steps,
        "skipped": scarce.skipped,
        "grad_norm": [ample.grad_norm, scarce.grad_norm],
        "relative_difference": abs(ample.grad_norm - scarce.grad_norm) / ample.grad_norm,
        "loss": [ample.loss, scarce.loss],
    }


def _ballast(needed: int) -> torch.Tensor:
    """Fills the card, so that 60 % of what an update needs are left."""
    left, _ = torch.cuda.mem_get_info()
    return torch.empty(max(left - int(0.6 * needed), 0), dtype=torch.uint8, device="cuda")


def _pretend(learner: Learner, most: int) -> None:
    """Where memory cannot be filled: larger micro-batches fail by hand."""
    backward = learner._backward

    def scarce(micro, *arguments, **options):  # type: ignore[no-untyped-def]
        if micro.num_tokens > most:
            raise torch.OutOfMemoryError("by hand")
        backward(micro, *arguments, **options)

    learner._backward = scarce  # type: ignore[method-assign]
