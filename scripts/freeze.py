"""Proof that a change of the code changes no number: two checkouts train the same, and what the
older one has left behind goes on in the newer one.

python scripts/freeze.py OLD NEW      # folders of two checkouts, in the environment of this Python

HopWorld, one thread, seed 0: GRPO (5 iterations), PPO (3) and SFT (3). Compared bit for bit: rows
of metrics (without seconds), trajectories (without the raw results of calls), weights, optimiser.
Then both resume OLD's run of GRPO for an iteration, explain it and evaluate it, and must say the
same.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

COMMON = (
    "--threads 1 --seed 0 --evaluation.test_tasks 0 --evaluation.every 2 --evaluation.tasks 16 "
    "--checkpoint.every 1"
)
RUNS = {
    "grpo": f"train hopworld --train.iterations 5 {COMMON}",
    "ppo": f"train hopworld --algorithm ppo --train.iterations 3 {COMMON}",
    "sft": f"sft hopworld --train.iterations 3 {COMMON}",
}
TIMES = ("seconds", "tokens_per_second", "memory_gib")
NEW_NAMES = {"ticks": "passes"}
"""Of figures that OLD may still call otherwise."""
START = """import sys, agent_r1
assert agent_r1.__file__.startswith(sys.argv.pop(1)), agent_r1.__file__
from agent_r1.cli import main
sys.exit(main())"""


def main(old: str, new: str) -> int:
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        prints, said = {}, {}
        for side, checkout in (("old", old), ("new", new)):
            for name, command in RUNS.items():
                run = Path(folder) / side / name
                agent_r1(checkout, f"{command} --run {run}")
                prints[side, name] = content_of(run)
                print(f"{side} {name}: {len(prints[side, name])} parts", flush=True)
        for side, checkout in (("old", old), ("new", new)):
            run = Path(folder) / "again" / "grpo"  # one place: a run's explanation may name it
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(Path(folder) / "old" / "grpo", run, symlinks=True)
            agent_r1(checkout, f"train --resume {run} --train.iterations 6 --trust")
            prints[side, "resumed"] = content_of(run)
            said[side] = [
                agent_r1(checkout, f"{command} {run} --json")
                for command in ("explain", "eval --tasks 16")
            ]
    for name in (*RUNS, "resumed"):
        ours, theirs = prints["old", name], prints["new", name]
        differences += [
            f"{name}: {part}"
            for part in sorted(ours.keys() | theirs.keys())
            if ours.get(part) != theirs.get(part)
        ]
    if without_times(said["old"]) != without_times(said["new"]):
        differences.append("what explain or eval says of OLD's run")
    print("\n".join(differences) or "equal, bit for bit")
    return 1 if differences else 0


def agent_r1(checkout: str, command: str) -> str:
    place = str(Path(checkout).resolve())
    environment = os.environ | {"PYTHONPATH": place, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", START, place, *command.split()],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: agent-r1 {command}\n{done.stderr}")
    return done.stdout


def content_of(run: Path) -> dict[str, str]:
    """Part of a run to its fingerprint."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {key: value for key, value in row.items() if key not in TIMES}
        found[f"metrics {row['iteration']}"] = json.dumps(without_times(kept), sort_keys=True)
    for file in sorted((run / "trajectories").glob("*.gz")):
        lines = map(json.loads, gzip.decompress(file.read_bytes()).splitlines())
        found[f"trajectories {file.name}"] = _sum(json.dumps([without_times(x) for x in lines]))
    for file in sorted((run / "checkpoints").glob("[0-9]*/*")):
        if file.suffix == ".safetensors":
            found[f"{file.parent.name}/{file.name}"] = _sum(file.read_bytes())
        if file.suffix == ".pt":  # by value: a pickle's bytes depend on which objects are one
            values = _values(torch.load(file, weights_only=True), f"{file.parent.name}/{file.name}")
            found |= dict(values)
    return found


def without_times(value: object) -> object:
    """JSON without what a clock has measured."""
    if isinstance(value, str):
        return without_times(json.loads(value)) if value.startswith("{") else value
    if isinstance(value, list):
        return [without_times(item) for item in value]
    if isinstance(value, dict):
        value = {NEW_NAMES.get(key, key): inner for key, inner in value.items()}
        return {k: without_times(v) for k, v in value.items() if not _is_left_out(k, v)}
    return value


def _is_left_out(key: str, value: object) -> bool:
    """Times, and what an OLD before the window on runs has not: a step's results, a figure."""
    is_figure = key == "tool_calls" and not isinstance(value, list)
    return key.endswith("seconds") or key == "results" or is_figure


def _values(value: object, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _values(inner, f"{place}/{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _values(inner, f"{place}/{index}")
    elif isinstance(value, torch.Tensor):
        yield place, f"{tuple(value.shape)} {_sum(value.contiguous().numpy().tobytes())}"
    else:
        yield place, repr(value)


def _sum(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
