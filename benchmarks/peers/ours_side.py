"""One step of GRPO on the forced workload by Agent-R1; prints one line of JSON.

    python benchmarks/peers/ours_side.py --model FOLDER --shape even

Everything is what ``agent-r1 train`` does, except which tokens are drawn: the engine pays for real
sampling, then takes the workload's token. Whether exactly those were trained on is checked.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import workload

from agent_r1 import Message, Sampling, Task, ToolEnv, tool


@functools.cache
def given(model: str, shape: str) -> tuple[Any, workload.Workload]:
    """The tokenizer and the workload."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer, workload.make(tokenizer, workload.SHAPES[shape])


class Work(ToolEnv):
    """The workload as an environment."""

    class Settings(ToolEnv.Settings):
        model: str
        shape: str

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        _, self.work = given(settings.model, settings.shape)

    @classmethod
    def tasks(cls, settings: Settings, split: str) -> list[Task]:
        _, work = given(settings.model, settings.shape)
        return [Task(str(i), prompt[-1]["content"]) for i, prompt in enumerate(work.prompts)]

    def prompt(self) -> list[Message]:
        messages = self.work.prompts[int(self.task.id)]
        return [Message(message["role"], message["content"]) for message in messages]

    @tool
    def search(self, query: str) -> str:
        """Search the document collection and return the best passages.

        Args:
            query: What to look for.
        """
        return self.work.search(query)

    def score(self, answer: str | None) -> float:
        return workload.reward(answer or "")


@dataclass(frozen=True)
class Forced(Sampling):
    """How to sample, with the tokens that are then taken."""

    token_ids: Iterator[int] = field(default_factory=lambda: iter(()))


@contextmanager
def forced(script: workload.Script) -> Iterator[None]:
    """The native engine says what the script says. Two names of the package are replaced: what an
    episode asks the engine by, and what the engine draws by.
    """
    import torch

    from agent_r1.rollout.native import engine, scheduler

    generate, draw = engine.NativeSession.generate, scheduler.draw

    async def generate_forced(
        self: Any, prefix: Sequence[int], sampling: Sampling, seed: int
    ) -> Any:
        known = {f.name: getattr(sampling, f.name) for f in fields(sampling)}
        ids = iter(script.action(prefix))
        return await generate(self, prefix, Forced(**known, token_ids=ids), seed)

    def draw_forced(
        logits: torch.Tensor, uniforms: Sequence[float], samplings: Sequence[Forced]
    ) -> tuple[list[int], list[float], list[float]]:
        ids = [next(sampling.token_ids) for sampling in samplings]
        chosen = torch.tensor(ids, device=logits.device)[:, None]
        logprobs = logits.gather(1, chosen).float() - logits.float().logsumexp(-1, keepdim=True)
        _, _, entropies = draw(logits, uniforms, samplings)  # overwrites the logits
        return ids, logprobs.squeeze(1).tolist(), entropies

    with (
        patch.object(engine.NativeSession, "generate", generate_forced),
        patch.object(scheduler, "draw", draw_forced),
    ):
        yield


def recipe(model: str, shape: str, *, bf16: bool = False) -> dict[str, Any]:
    size = workload.SHAPES[shape]
    precision = {"matmul": "bf16"} if bf16 else {}
    return {
        "env": {"name": f"{Path(__file__).resolve()}:Work", "model": model, "shape": shape},
        "model": {"path": model, "device": "cpu", "dtype": "float32", **precision},
        "limits": {"turns": 10, "tokens_per_turn": 200, "tokens": 4000, "seconds": 36000},
        "algorithm": {"name": "grpo"},
        "train": {
            "iterations": 1,
            "tasks": size.tasks,
            "attempts": size.attempts,
            "concurrency": size.tasks * size.attempts,
        },
        "learner": {"lr": 1e-6},
        "evaluation": {"every": 0, "test_tasks": 0},
        "checkpoint": {"every": 1000},
    }


def trained(run: Any, work: workload.Workload) -> dict[str, int]:
    """What a run's first iteration was trained on; raises if it is not the workload."""
    wanted = Counter(tuple(ids) for episode in work.episodes.values() for ids, _ in episode)
    found: Counter[tuple[int, ...]] = Counter()
    for group, known in run.estimated(1):
        for key, step in group.steps():
            if len(known.ratios.get(key, ())) == len(step.action.token_ids):
                found[step.action.token_ids] += 1
    if found != wanted:
        raise RuntimeError(f"trained on {found.total()} actions, {(found & wanted).total()} right")
    return {"turns": found.total(), "action_tokens": sum(len(k) * n for k, n in found.items())}


def measure(model: str, shape: str, folder: Path, *, bf16: bool = False) -> dict[str, Any]:
    """One step, in seconds; a run's folder is left in ``folder``."""
    import torch
    import transformers

    import agent_r1

    tokenizer, work = given(model, shape)
    with forced(workload.Script(tokenizer, work)):
        result = agent_r1.train(recipe(model, shape, bf16=bf16), run=folder / "run")
    row = result.metrics[-1]
    seconds, figures = row["seconds"], row["figures"]
    return {
        "workload": work.counts(),
        "trained": trained(result.run, work),
        "seconds": {
            "step": seconds["total"],
            "rollout": seconds["rollout"],
            "training": seconds["credit"] + seconds["learner"],
        },
        "tokens": {
            "prefilled": row["engine"]["prefilled"],
            "trained": round(row["tokens_per_second"]["trained"] * seconds["learner"]),
        },
        "passes": row["engine"]["passes"],
        "logprob_error": figures["logprob_error"],
        "threads": torch.get_num_threads(),
        "versions": {
            "agent_r1": agent_r1.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--shape", choices=workload.SHAPES, default="even")
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.model, arguments.shape, Path(folder), bf16=arguments.bf16)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
