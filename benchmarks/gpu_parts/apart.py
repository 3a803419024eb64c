"""Parts that run only if named: they need a real model, and what else their docstrings say."""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gpu_parts.common import Bench, Figures, Found

PEERS = Path(__file__).resolve().parent.parent / "peers"


# trl ----------------------------------------------------------------------------------------------


def trl(bench: Bench) -> Found:
    """A step of GRPO on the forced workload of ``benchmarks/peers``, which see, by both sides on
    this device. On a card in bfloat16: ours with float32 masters, TRL's by autocast over float32
    weights. Each side's first step warms up, its second counts.
    """
    import trl as library

    yield "version", library.__version__
    sys.path.insert(0, str(PEERS))
    from agent_r1.model.places import local_path

    model = local_path(bench.model)
    for shape in ("tiny",) if bench.small else ("even", "long-tailed"):
        for side in (_ours, _theirs):
            for run in ("warm-up", "measured"):
                measure = partial(side, bench, model, shape)
                found = bench.tried(measure, seconds=10)
                yield f"{shape}, {side.__name__.strip('_')}, {run}", found


def _ours(bench: Bench, model: str, shape: str) -> Figures:
    import ours_side

    plain = ours_side.recipe

    def recipe(*arguments: Any) -> dict[str, Any]:
        made = plain(*arguments)
        made["model"] |= {"device": bench.device, "dtype": str(bench.dtype).split(".")[-1]}
        return made

    with tempfile.TemporaryDirectory() as folder, patch.object(ours_side, "recipe", recipe):
        return ours_side.measure(model, shape, Path(folder))


def _theirs(bench: Bench, model: str, shape: str) -> Figures:
    import trl_side

    config = trl_side.trl.GRPOConfig

    def on_card(**settings: Any) -> Any:
        return config(**{**settings, "use_cpu": not bench.cuda, "bf16": bench.cuda})

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(trl_side.trl, "GRPOConfig", on_card),
    ):
        return trl_side.measure(model, shape, Path(folder))


# multihop -----------------------------------------------------------------------------------------


def multihop(bench: Bench) -> Found:
    """Warm start and GRPO by the recipes that ship, on HotpotQA alone; four minutes. With
    ``--small`` the invented questions of ``tests/data/multihop``.
    """
    if bench.data is None:
        raise ValueError("--data FOLDER is needed: a folder with HotpotQA")
    common: dict[str, Any] = {
        "env.path": str(bench.data.resolve()),
        "env.datasets": ["invented" if bench.small else "hotpotqa"],
        "model.path": bench.model,
        "model.device": bench.device,
        "model.dtype": str(bench.dtype).split(".")[-1],
        "checkpoint.every": 1000,
    }
    budget = max(bench.left(), 60)
    with tempfile.TemporaryDirectory() as folder:
        warm, run = Path(folder) / "warm", Path(folder) / "grpo"
        overrides = {**common, "evaluation.every": 0, "train.seconds": 0.2 * budget}
        overrides |= {"train.temperature": 1.0}  # nothing is sampled
        if bench.small:
            overrides |= {"train.iterations": 1, "train.tasks": 1, "learner.warmup": 0}
        yield "warm start", _trained("multihop-smollm2-sft", warm, overrides)
        overrides = {
            **common,
            "model.lora.start": str(warm),
            "evaluation.every": 1000,  # at the start and at the end
            "train.seconds": 0.4 * budget,
        }
        if bench.small:
            overrides |= {"train.iterations": 1, "train.tasks": 1, "train.attempts": 2}
            overrides |= {"evaluation.tasks": 2, "limits.tokens_per_turn": 16}
            overrides |= {"learner.warmup": 0, "learner.minibatches": 1}
        yield "grpo", _trained("multihop-smollm2", run, overrides)


def _trained(recipe: str, run: Path, overrides: dict[str, Any]) -> Figures:
    """A run's iterations and validations."""
    import agent_r1

    result = agent_r1.train(recipe, run=run, overrides=overrides)
    rows = [row for row in result.metrics if row["iteration"]]
    names = ("reward", "success", "logprob_error", "updates_skipped")
    return {
        "iterations": len(rows),
        "seconds": [row["seconds"]["total"] for row in rows],
        "rollout_seconds": [row["seconds"]["rollout"] for row in rows],
        "learner_seconds": [row["seconds"]["learner"] for row in rows],
        "engine": rows[-1].get("engine") if rows else None,
        **{name: [row["figures"].get(name) for row in rows] for name in names},
        "validations": {
            row["iteration"]: row["validation"]["total"]
            for row in result.metrics
            if "validation" in row
        },
    }
