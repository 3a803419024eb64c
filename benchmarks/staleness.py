"""What sampling ahead of the learner is worth where tools are slow: HopWorld whose searches take
seconds with a long tail, with train.staleness of 0 and more, same tasks and seeds otherwise.

    python benchmarks/staleness.py --out benchmarks/results/staleness.json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from first_light import machine

import agent_r1
from agent_r1.envs.base import Transition
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.types import Message, Task

MEDIAN_SECONDS, SPREAD, MOST_SECONDS = 1.0, 1.0, 20.0
"""Of a tool's answer: lognormal."""
EPISODES = itertools.count()


class SlowHopWorld(HopWorld):
    """Each turn's tools take a time of their own."""

    class Settings(HopWorld.Settings):
        name: str = "slow-hopworld"

    async def reset(self, task: Task, seed: int) -> Any:
        self._clock = random.Random(next(EPISODES))
        return await super().reset(task, seed)

    async def step(self, message: Message) -> Transition:
        if message.tool_calls:
            drawn = MEDIAN_SECONDS * math.exp(SPREAD * self._clock.gauss(0, 1))
            await asyncio.sleep(min(drawn, MOST_SECONDS))
        return await super().step(message)


def measure(staleness: int, iterations: int, seed: int) -> dict[str, Any]:
    """Wall seconds of training and both sides' idle shares."""
    with tempfile.TemporaryDirectory() as folder:
        result = agent_r1.train(
            "hopworld",
            run=Path(folder) / "run",
            overrides={
                "env.name": f"{__file__}:SlowHopWorld",
                "seed": seed,
                "engine.patience": 0.0,
                "train.iterations": iterations,
                "train.staleness": staleness,
                "train.concurrency": 64 * (staleness + 1),
                "evaluation.every": 0,
                "evaluation.test_tasks": 0,
                "checkpoint.every": iterations,
            },
        )
    rows = [row for row in result.metrics if "figures" in row]
    seconds = [row["seconds"] for row in rows]
    total = sum(part["total"] for part in seconds)
    return {
        "staleness": staleness,
        "seed": seed,
        "seconds": total,
        "learner_idle": sum(part["rollout"] for part in seconds) / total,
        "engine_idle": sum(part["engine_idle"] for part in seconds) / total,
        "success": [row["figures"]["success"] for row in rows],
        "age": [row["figures"].get("age/mean", 0.0) for row in rows],
        "effective": [row["figures"].get("importance/effective") for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = [measure(s, given.iterations, seed) for seed in given.seeds for s in given.staleness]
    base = statistics.mean(row["seconds"] for row in found if row["staleness"] == 0)
    for row in found:
        row["times_faster"] = base / row["seconds"]
        print({k: v for k, v in row.items() if not isinstance(v, list)})
    if given.out:
        data = {"machine": machine(), "iterations": given.iterations, "runs": found}
        given.out.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
