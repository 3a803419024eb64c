"""Writes a run's adapter in half precision, half the size: to be kept where results are.

python scripts/keep_adapter.py runs/warm docs/results/multihop-smollm2/warm-start
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from agent_r1.model.checkpoint_folder import model_folder
from agent_r1.run.folder import RunFolder


def main(run: str, out: str) -> None:
    source, target = model_folder(Path(run), "best"), Path(out)
    target.mkdir(parents=True, exist_ok=True)
    weights = load_file(source / "adapter_model.safetensors")
    halves = {name: weight.to(torch.float16) for name, weight in weights.items()}
    save_file(halves, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text())
    recipe = RunFolder.open(run).recipe_data()
    config["base_model_name_or_path"] = recipe["model"]["path"]  # not this machine's folder
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
