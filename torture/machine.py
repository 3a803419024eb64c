"""``python -m torture``: everything, as long as it is told to; see the package."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from torture.common import FAULTS, VERDICTS, Tally

OUT = Path("runs") / "torture"
COUNTS = {
    "kills": 200, "environments": 120, "servers": 60, "power_cuts": 50, "recipes": 300,
    "run_folders": 150, "data": 200, "models": 60, "control": 250, "texts": 400,
}  # fmt: skip
"""Cases of a round; ``control`` counts for each renderer."""


def one(kind: str, count: int, seed: int, out: Path) -> Tally:
    """All cases of a kind in this process, each in a child of it."""
    import torch

    torch.set_num_threads(1)
    import peft  # noqa: F401  # loaded once, for all children
    import transformers  # noqa: F401

    from torture import control, inputs, kills, servers

    os.environ["XDG_STATE_HOME"] = str(out / "state")
    works: dict[str, Callable[[Tally, int, int], None]] = {
        "kills": kills.kills,
        "power_cuts": kills.power_cuts,
        "control": control.control,
        "servers": servers.servers,
        **{name: getattr(inputs, name) for name in COUNTS if hasattr(inputs, name)},
    }
    tally = Tally(out / "faults" / f"{kind}-{seed}")
    works[kind](tally, count, seed)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="torture")
    parser.add_argument("--hours", type=float, default=0.0, help="go on for so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*COUNTS], action="append", help="these kinds")
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of cases")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 2)
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    if out.exists() and any(out.iterdir()) and not (out / ".torture").exists():
        parser.error(f"--out {out} holds something else")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / ".torture").touch()
    start, seed = time.monotonic(), arguments.seed
    whole = Tally(out / "faults")
    while True:
        kinds = [kind for kind in COUNTS if kind in (arguments.only or COUNTS)]
        with ProcessPoolExecutor(arguments.parallel, get_context("spawn")) as pool:
            jobs = {
                kind: pool.submit(one, kind, max(1, int(COUNTS[kind] * arguments.share)), seed, out)
                for kind in kinds
            }
            for kind, job in jobs.items():
                tally = job.result()
                for name, counts in tally.counts.items():
                    whole.counts.setdefault(name, type(counts)()).update(counts)
                whole.faults += tally.faults
                print(f"{time.monotonic() - start:6.0f} s  {kind}: {len(tally.faults)} faults")
        seed += 1
        if time.monotonic() - start > 3600 * arguments.hours:
            break
    table = whole.table()
    print(f"\n{'':16}" + "".join(f"{name:>10}" for name in (*VERDICTS, "all")))
    for name, row in table.items():
        print(f"{name:16}" + "".join(f"{row[verdict]:10,}" for verdict in (*VERDICTS, "all")))
    result = {
        "command": "make torture" + (f" HOURS={arguments.hours:g}" if arguments.hours else ""),
        "seeds": [arguments.seed, seed - 1],
        "seconds": round(time.monotonic() - start),
        "processor": platform.processor() or platform.machine(),
        "counts": table,
        "faults": [{k: f[k] for k in ("kind", "verdict", "case")} for f in whole.faults],
    }
    (out / "counts.json").write_text(json.dumps(result, indent=1, default=repr) + "\n")
    bad = sum(row[verdict] for row in table.values() for verdict in FAULTS)
    print(f"\n{bad} faults; written to {out}")
    return 1 if bad else 0
