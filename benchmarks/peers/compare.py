"""This package beside TRL (and vLLM's rollout) on the same forced tokens: seconds, memory, ratios.

    make bench          # all of it, three times in turn, into benchmarks/results/peers.json
    make bench-quick    # short, even episodes once, beside what is in that file

How to read the file: benchmarks/README.md. Each measurement is a process of its own; they run one
after another, the sides in turn. This process loads no model and no torch, so that it is small.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
MODEL = "smollm2-135m"
SHAPES = ("even-short", "even", "long-tailed")
"""``--quick`` takes the first alone."""
FIGURES = {
    "step_seconds": "seconds a step",
    "rollout_seconds": "  rollout",
    "training_seconds": "  training",
    "peak_memory_mib": "MiB at most",
}
"""What is compared, and how it is called in print."""
THREADING = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")

Figures = dict[str, float]


# Numbers -----------------------------------------------------------------------------------------


def medians(runs: Sequence[Mapping[str, float]]) -> Figures:
    """The median of each figure that all runs have."""
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    return {name: statistics.median(run[name] for run in runs) for name in shared}


def ratios(
    ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Theirs over ours, of the medians; and the smallest and the largest of runs that followed one
    another. Over 1: ours needs less.
    """
    us, them = medians(ours), medians(theirs)
    result = {}
    for name in FIGURES:
        if name in us and name in them:
            pairs = [b[name] / a[name] for a, b in zip(ours, theirs, strict=True)]
            result[name] = {
                "ratio": them[name] / us[name],
                "lowest": min(pairs),
                "highest": max(pairs),
            }
    return result


def summary(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The file's entry of one workload, from what each side printed in each run."""
    counts = [result["workload"] for runs in results.values() for result in runs]
    if any(count != counts[0] for count in counts):
        raise ValueError(f"the sides had different workloads: {counts}")
    flat = {side: [flattened(result) for result in runs] for side, runs in results.items()}
    sides = {
        side: {
            "versions": results[side][0]["versions"],
            "threads": results[side][0].get("threads"),
            "median": medians(runs),
            "runs": runs,
        }
        for side, runs in flat.items()
    }
    others = [side for side in flat if side != "ours"]
    return {
        "workload": counts[0],
        "sides": sides,
        "ratios": {side: ratios(flat["ours"], flat[side]) for side in others},
    }


def flattened(result: Mapping[str, Any]) -> Figures:
    """The numbers of one run, each with its unit in its name."""
    figures = {f"{part}_seconds": value for part, value in result["seconds"].items()}
    figures |= {f"{kind}_tokens": value for kind, value in result.get("tokens", {}).items()}
    more = ("peak_memory_mib", "passes", "logprob_error")
    return figures | {name: result[name] for name in more if name in result}


# Print -------------------------------------------------------------------------------------------


def lines(name: str, entry: Mapping[str, Any], committed: Mapping[str, Any]) -> Iterator[str]:
    """A workload's entry as text, its ratios beside the committed ones."""
    count = entry["workload"]
    yield (
        f"{name}: {count['tasks']} x {count['attempts']} episodes, {count['turns']} turns, "
        f"{count['action_tokens']:,} action tokens"
    )
    before = committed.get("workloads", {}).get(name, {}).get("ratios", {})
    ours = entry["sides"]["ours"]["median"]
    for side, found in entry["ratios"].items():
        theirs = entry["sides"][side]["median"]
        version = entry["sides"][side]["versions"].get(side, "")
        yield f"{'':16}{f'{side} {version}':>14}{'here':>10}{'ratio':>8}{'committed':>11}"
        for figure, ratio in found.items():
            old = before.get(side, {}).get(figure)
            shown = f"{old['ratio']:.2f}" if old else "-"
            yield (
                f"{FIGURES[figure]:16}{theirs[figure]:14.1f}{ours[figure]:10.1f}"
                f"{ratio['ratio']:8.2f}{shown:>11}"
            )


def machine_line(label: str, report: Mapping[str, Any]) -> str:
    machine = report.get("machine")
    if not machine:
        return f"{label}: nothing"
    return (
        f"{label}: {machine['processor']}, {machine['instructions']}, {machine['cores']} cores, "
        f"commit {report.get('commit')}"
    )


# Measure -----------------------------------------------------------------------------------------


def prepared() -> dict[str, Any]:
    """The folder of the model and what the machine is; loads torch."""
    sys.path.insert(0, str(HERE.parent))
    from first_light import machine

    from agent_r1.model.places import local_path

    return {"model": local_path(MODEL), "machine": machine()}


def elsewhere(function: Any) -> Any:
    """What a function returns, called in a process of its own: the memory of a parent counts as
    that of its children until they have begun.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function).result()


def measured(command: Sequence[str]) -> dict[str, Any]:
    """What a side printed on its last line, with its peak of memory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise SystemExit(f"{err.read()[-4000:]}\n{' '.join(command)} failed")
        result: dict[str, Any] = json.loads(out.read().splitlines()[-1])
    return {**result, "peak_memory_mib": usage.ru_maxrss / 1024}


def commands(
    model: str, shape: str, trl: Path | None, vllm: Path | None, *, bf16: bool
) -> dict[str, list[str]]:
    """How each side is run."""
    ours = sys.executable
    end = ["--model", model, "--shape", shape, *(["--bf16"] if bf16 else [])]
    found = {"ours": [ours, str(HERE / "ours_side.py"), *end]}
    if trl:
        found["trl"] = [str(trl / "bin" / "python"), str(HERE / "trl_side.py"), *end]
    if vllm:
        found["vllm"] = [ours, str(HERE / "vllm_side.py"), *end, "--vllm-venv", str(vllm)]
    return found


def in_turn(sides: Mapping[str, list[str]], shape: str, runs: int) -> dict[str, list[Any]]:
    """What each side printed in each run."""
    results: dict[str, list[Any]] = {side: [] for side in sides}
    for number in range(1, runs + 1):
        for side, command in sides.items():
            result = measured(command)
            if side == "vllm":
                del result["peak_memory_mib"]  # of what asks the server, not of the server
            results[side].append(result)
            found = ", ".join(f"{part} {s:.1f} s" for part, s in result["seconds"].items())
            print(f"{shape}, run {number} of {runs}, {side}: {found}", file=sys.stderr, flush=True)
    return results


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` if files of it were changed."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="short episodes, once; no file")
    parser.add_argument("--runs", type=int, default=3, help="of each side, in turn")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16 on all sides")
    parser.add_argument("--trl-venv", type=Path, default=ROOT / ".venv-trl")
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--vllm-venv", type=Path, help="an environment with vLLM for the CPU")
    arguments = parser.parse_args()
    committed = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"something else is at work here (load {load:.1f})", file=sys.stderr)
    found = elsewhere(prepared)
    report: dict[str, Any] = {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": found["machine"],
        "threading": {k: v for k, v in sorted(os.environ.items()) if k.startswith(THREADING)},
        "load_before": load,
        "model": MODEL,
        "dtype": "bf16" if arguments.bf16 else "float32",
        "workloads": {},
    }
    print(machine_line("today", report), machine_line("committed", committed), sep="\n")
    trl = None if arguments.no_trl else arguments.trl_venv
    for shape in SHAPES[:1] if arguments.quick else arguments.shapes:
        sides = commands(found["model"], shape, trl, arguments.vllm_venv, bf16=arguments.bf16)
        results = in_turn(sides, shape, 1 if arguments.quick else arguments.runs)
        report["workloads"][shape] = summary(results)
        print(*lines(shape, report["workloads"][shape], committed), sep="\n", flush=True)
        if not arguments.quick:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
