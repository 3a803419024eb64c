"""What it costs that a checkpoint outlives a power cut: seconds to write one, and seconds more to
read it for its checksums and to have it on the disk, by size of model and by folder (disk).

    python benchmarks/durable.py --folders /tmp /mnt/slow --out benchmarks/results/durable.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from first_light import machine
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from agent_r1.model.places import OURS
from agent_r1.model.policy import Policy
from agent_r1.utils.durable import seal, why_damaged

SIZES = {"hopworld-base": (128, 4), "30M": (512, 8)}
"""Width and layers."""


def measure(folder: Path, width: int, layers: int, repeats: int) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(OURS["hopworld-base"]())
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=2,
        head_dim=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    policy = Policy(model, tokenizer)
    moments = {name: (p.data.clone(), p.data.clone()) for name, p in model.named_parameters()}
    seconds: dict[str, list[float]] = {"write": [], "seal": [], "verify": []}
    for number in range(repeats):
        target = folder / f"checkpoint-{number}"
        target.mkdir(parents=True)
        start = time.perf_counter()
        policy.save(target)
        torch.save(moments, target / "trainer.pt")
        seconds["write"].append(time.perf_counter() - start)
        start = time.perf_counter()
        seal(target)
        seconds["seal"].append(time.perf_counter() - start)
        start = time.perf_counter()
        assert why_damaged(target) is None
        seconds["verify"].append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in target.iterdir())
        shutil.rmtree(target)
    medians = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    return {"MiB": round(size / 2**20, 1), **medians}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folders", nargs="+", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for number, folder in enumerate(arguments.folders):
        for name, (width, layers) in SIZES.items():
            figures = measure(folder / "durable", width, layers, arguments.repeats)
            rows.append({"disk": number, "model": name, **figures})
            print(rows[-1])
    if arguments.out:
        result = {"machine": machine(), "seconds": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
