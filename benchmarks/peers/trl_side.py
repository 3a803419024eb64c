"""One step of GRPO on the forced workload by TRL, with its own tool loop; prints one line of JSON.

    .venv-trl/bin/python benchmarks/peers/trl_side.py --model FOLDER --shape even

As on our side: float32, no gradient checkpointing, no KL term, one update, about as many tokens at
once in it. Other settings are TRL's own. A logits processor leaves one token to draw. Reaches into
names of TRL 1.16 that begin with an underscore.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
import workload
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)

MICRO_BATCH = {"tiny": 2, "even-short": 4, "even": 4, "long-tailed": 2}
"""Attempts at once in the update: with their padding up to 4,096 tokens, which is what our learner
takes on a CPU. Four of the longest would need 24 GiB, as estimated from ``even``.
"""


class OneLeft(LogitsProcessor):
    """Leaves each row its next token; a row that has said all ends again and again."""

    def __init__(self, rows: list[list[int]], prompt_length: int, end: int) -> None:
        self._rows, self._start, self._end = rows, prompt_length, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - self._start
        ids = [row[at] if at < len(row) else self._end for row in self._rows]
        left = torch.full_like(scores, -1e9)
        return left.scatter_(1, torch.tensor(ids, device=scores.device)[:, None], 0.0)


class Trainer(trl.GRPOTrainer):
    """GRPO that says what the script says, and counts and times what it does."""

    def __init__(self, script: workload.Script, **settings: Any) -> None:
        super().__init__(**settings)
        self.script = script
        self.spent: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        generate = self.model.generate
        self.model.generate = lambda *args, **kwargs: generate(
            *args, logits_processor=self._left, **kwargs
        )

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        rows = [self.script.action(ids) for ids in prompt_ids]
        longest = max(map(len, prompt_ids))
        end = self.processing_class.eos_token_id
        self._left = LogitsProcessorList([OneLeft(rows, longest, end)])
        self.seen["prefilled"] += longest * len(rows)
        self.seen["passes"] += max(map(len, rows))
        self.seen["turns"] += len(rows)
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        start = time.perf_counter()
        out = super()._generate_and_score_completions(inputs)
        self.spent["rollout"] += time.perf_counter() - start
        self.seen["trained"] += out["completion_ids"].numel() + out["prompt_ids"].numel()
        own = out["tool_mask"].bool() & out["completion_mask"].bool()
        self.seen["action_tokens"] += int(own.sum())
        return out


class Steps(TrainerCallback):
    """Seconds of whole steps: rollout, gradients, the optimiser's step."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self._start


def settings_of(name: str, folder: Path, *, bf16: bool = False) -> trl.GRPOConfig:
    shape, at_once = workload.SHAPES[name], MICRO_BATCH[name]
    return trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=shape.tasks * shape.attempts // at_once,
        num_generations=shape.attempts,
        max_completion_length=4000,
        max_tool_calling_iterations=10,
        max_steps=1,
        learning_rate=1e-6,
        temperature=1.0,
        beta=0.0,
        bf16=bf16,  # autocast: weights stay float32
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )


def measure(model: str, shape: str, folder: Path, *, bf16: bool = False) -> dict[str, Any]:
    """One step, in seconds."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "qwen2_5.jinja").read_text()
    work = workload.make(tokenizer, workload.SHAPES[shape])

    def search(query: str) -> str:
        """Search the document collection and return the best passages.

        Args:
            query: What to look for.

        Returns:
            The passages.
        """
        return work.search(query)

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [workload.reward(messages[-1]["content"]) for messages in completions]

    steps = Steps()
    trainer = Trainer(
        workload.Script(tokenizer, work),
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        args=settings_of(shape, folder, bf16=bf16),
        train_dataset=datasets.Dataset.from_list([{"prompt": p} for p in work.prompts]),
        tools=[search],
        processing_class=tokenizer,
        callbacks=[steps],
    )
    trainer.train()
    counts, seen = work.counts(), trainer.seen
    trained = {key: seen[key] for key in ("turns", "action_tokens")}
    if any(trained[key] != counts[key] for key in trained):
        raise RuntimeError(f"trained on {trained}, not on {counts}")
    rollout = trainer.spent["rollout"]
    return {
        "workload": counts,
        "trained": trained,
        "seconds": {"step": steps.seconds, "rollout": rollout, "training": steps.seconds - rollout},
        "tokens": {"prefilled": seen["prefilled"], "trained": seen["trained"]},
        "passes": seen["passes"],
        "threads": torch.get_num_threads(),
        "versions": {
            "trl": trl.__version__,
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
