r"""The benchmark for a CUDA card: is everything exact there, and how fast is it?

    python benchmarks/gpu.py --out benchmarks/results/gpu_CARD.json
    python benchmarks/gpu.py --part decode --part learner --minutes 3 --out FILE
    python benchmarks/gpu.py --part multihop --data FOLDER --minutes 4 --out FILE
    python benchmarks/gpu.py --device cpu --small --out FILE            # tries this script itself

The core, about six minutes on an H200:

machine     the card, versions, its matrix-product peak in float32 and bfloat16
tests       ``pytest -m gpu``, in a process of its own
exactness   for each family of models: packed trees against plain forward passes, the engine's
            log-probabilities against the learner's
gradients   of packed trees against those of padded rows
quickstart  a few iterations of the quick start in float32, bfloat16, bfloat16 with an adapter
decode      milliseconds of a pass of the native engine at 1, 16, 64 and 256 sequences
learner     the update's share of the card's matrix-product peak, with and without the tree
memory      the plan of memory against the peak that PyTorch saw
shortage    the card is filled up, so that an update must begin again with smaller micro-batches

Apart, only if named:

trl         one step of GRPO on the workload of ``benchmarks/peers``, by TRL 1.16 and by us (its
            model: ``--model``; both libraries in one environment)
multihop    SmolLM2-135M on HotpotQA: warm start, then GRPO (``--data``: a folder with the data)

Nothing is asserted: the report says what was seen. It is written after every figure. An error is
recorded (type, message, end of the trace) and the next part begins; the exit status is then 1.
A part has its share of ``--minutes``, and what does not fit is recorded as left out. All models but
those of the two parts apart have random weights, so nothing is fetched.

The card's machine may be offline. What it lacks travels as wheels, for its own version of Python.
Where there is a network, for Python 3.12 on Linux (NAME: what ``pip check`` or the first error
there says is missing; with torch and the usual libraries there, that is transformers, pydantic,
pydantic_core, annotated-types, typing-inspection, docstring-parser):

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 -d wheels NAME==VERSION ...

and on the card's machine, in a checkout of the project:

    pip install --no-index --no-deps --find-links wheels --target site wheels/*.whl
    PYTHONPATH=site python benchmarks/gpu.py --out FILE
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """Where a part is written, and its seconds in a run of the whole core, in which all parts have
    six minutes.
    """

    module: str
    seconds: float
    core: bool = True


PARTS = {
    "machine": Part("speed", 5),
    "tests": Part("checks", 55),
    "exactness": Part("checks", 40),
    "gradients": Part("checks", 15),
    "quickstart": Part("speed", 45),
    "decode": Part("speed", 80),
    "learner": Part("speed", 80),
    "memory": Part("memory", 20),
    "shortage": Part("memory", 20),
    "trl": Part("apart", 240, core=False),
    "multihop": Part("apart", 240, core=False),
}
LEAST = 0.2
"""A part is left out if it would have less than this share of its seconds."""


class OutOfTimeError(KeyboardInterrupt):
    """A part took much more than its time. Nobody catches it by accident, as ``KeyboardInterrupt``
    ends an event loop, too.
    """


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Interrupts the block after so many seconds, as soon as Python runs again."""

    def expire(*_: Any) -> None:
        raise OutOfTimeError(f"stopped after {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Report:
    """The file that the figures go to, written whole whenever one is added."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path = path
        self.content: dict[str, Any] = dict(head)
        path.parent.mkdir(parents=True, exist_ok=True)

    def note(self, part: str, key: str, figures: Any) -> None:
        """Adds a part's figure; also prints it."""
        self.content.setdefault(part, {})[key] = figures
        self.write()
        print(f"{part} | {key}: {json.dumps(figures):.700}", flush=True)

    def write(self) -> None:
        new = self._path.with_name(self._path.name + ".new")
        new.write_text(json.dumps(self.content, indent=1) + "\n")
        new.replace(self._path)


def run(name: str, bench: Any, report: Report, *, end: float) -> None:
    """One part, to its end or to its first error outside a single measurement.

    Args:
        bench: See ``gpu_parts.common.Bench``; its deadline is this part's.
        end: When the whole ends, by ``time.monotonic``.
    """
    from gpu_parts.common import described, free

    start = time.monotonic()
    hard = min(1.5 * (bench.deadline - start), end - start)
    report.content[name] = {}
    try:
        with limited(hard):
            function = getattr(importlib.import_module(f"gpu_parts.{PARTS[name].module}"), name)
            for key, figures in function(bench):
                report.note(name, key, figures)
    except (Exception, SystemExit, OutOfTimeError) as error:
        report.note(name, "error", described(error))
    free()
    report.note(name, "part_seconds", round(time.monotonic() - start, 1))


def everything(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Runs the named parts one after another; each has its share of the time that is left."""
    from gpu_parts.common import Bench

    started = time.monotonic()
    end = started + 60 * arguments.minutes
    head = {
        "what": (__doc__ or "").split("\n")[0],
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
    }
    report = Report(arguments.out, head)
    while names:
        name, *rest = names
        left = end - time.monotonic()
        share = left * PARTS[name].seconds / sum(PARTS[n].seconds for n in names)
        names = rest
        if share < LEAST * PARTS[name].seconds and not arguments.small:
            report.note(name, "left out", f"{share:.0f} seconds were left for it")
            continue
        bench = Bench(
            device=arguments.device,
            small=arguments.small,
            data=arguments.data,
            model=arguments.model,
            deadline=time.monotonic() + share,
        )
        run(name, bench, report, end=end)
    report.content["seconds"] = round(time.monotonic() - started, 1)
    report.write()
    return report.content


def has_error(figures: Any) -> bool:
    """Whether an error is recorded anywhere in it."""
    if not isinstance(figures, dict):
        return False
    return "error" in figures or any(has_error(value) for value in figures.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part",
        action="append",
        choices=PARTS,
        help="repeatable, in this order; default: the core",
    )
    parser.add_argument("--out", type=Path, required=True, help="the report, a JSON file")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all parts together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes: tries the script itself")
    parser.add_argument("--data", type=Path, help="a folder with HotpotQA, for multihop")
    parser.add_argument("--model", default="smollm2-135m", help="for multihop and trl")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(ROOT))  # this checkout is measured, whatever is installed
    importlib.import_module("gpu_parts.common")
    gc.freeze()  # the libraries: collecting the rest is then quick
    named = arguments.part or [name for name, part in PARTS.items() if part.core]
    content = everything(arguments, list(dict.fromkeys(named)))
    return int(has_error(content))


if __name__ == "__main__":
    sys.exit(main())
