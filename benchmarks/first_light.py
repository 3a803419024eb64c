"""The figures of the quick start: what it learns for several seeds, and where the time goes.

    python benchmarks/first_light.py --seeds 0 1 2 --out benchmarks/results/first_light.json

Runs ``agent-r1 train hopworld`` once a seed, one after another, and times the light commands.
Seconds depend on the machine, which the file names.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARTS = ("rollout", "credit", "learner", "other", "total")


def best_of(count: int, *command: str) -> float:
    """Fewest wall seconds of several runs of a command."""

    def once() -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    return min(once() for _ in range(count))


def train(seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One run; its result and the means of its iterations."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "agent_r1.cli", "train", "hopworld"]
    subprocess.run([*command, "--seed", str(seed), "--run", str(folder), *overrides], check=True)
    wall = time.perf_counter() - start
    result = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    validations = {r["iteration"]: r["validation"]["categories"] for r in rows if "validation" in r}
    return {
        "seed": seed,
        "wall_seconds": wall,
        **{key: result[key] for key in ("before", "after", "greedy", "tasks", "seconds")},
        "seconds_per_iteration": {
            part: statistics.fmean(row["seconds"][part] for row in rows) for part in PARTS
        },
        "tokens_per_second": {
            kind: statistics.fmean(row["tokens_per_second"][kind] for row in rows)
            for kind in ("generated", "trained")
        },
        "largest_logprob_error": max(row["figures"]["logprob_error"] for row in rows),
        "curve": {
            iteration: {name: scores["success"] for name, scores in categories.items()}
            for iteration, categories in validations.items()
        },
    }


def machine() -> dict[str, Any]:
    """What the seconds depend on."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    return {
        "processor": ", ".join(models) or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, help="where the run folders go (default: a new one)")
    arguments, overrides = parser.parse_known_args()
    folder = arguments.runs or Path(tempfile.mkdtemp(prefix="first-light-"))
    report = {
        "machine": machine(),
        "overrides": overrides,
        "import_seconds": best_of(5, sys.executable, "-c", "import agent_r1"),
        "python_start_seconds": best_of(5, sys.executable, "-c", "pass"),
        "help_seconds": best_of(5, sys.executable, "-m", "agent_r1.cli", "--help"),
        "runs": [train(seed, folder / f"seed-{seed}", overrides) for seed in arguments.seeds],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {arguments.out}; runs in {folder}")


if __name__ == "__main__":
    main()
