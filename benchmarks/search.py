"""How long a BM25 index takes to build and to load, how fast it answers, what memory it takes.

    python benchmarks/search.py CORPUS... --questions FILE... --out benchmarks/results/search.json

Each figure is of a process of its own. ``alone``: one query after another; ``64 at once``: rounds
of 64 concurrent queries, the latency being each query's own. Memory: ``own`` is what a further
process on the same index costs, ``mapped`` are pages of files, which all processes share.
"""

import argparse
import asyncio
import gzip
import json
import multiprocessing
import platform
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from agent_r1.search.bm25 import BM25, build_index

Figures = dict[str, float]


def memory() -> Figures:
    process = psutil.Process()
    own = sum(part.anonymous for part in process.memory_maps())
    mapped = process.memory_info().rss - own
    return {"own": round(own / 2**20, 1), "mapped": round(mapped / 2**20, 1)}


def build(corpus: list[Path], folder: Path) -> Figures:
    start = time.perf_counter()
    build_index(corpus, folder)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in folder.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "seconds": round(seconds, 2),
        "MiB on disk": round(size / 2**20, 1),
        "MiB at most": round(peak, 1),
    }


def answer(folder: Path, questions: list[str], at_once: int) -> dict[str, Any]:
    before, start = memory(), time.perf_counter()
    searcher = BM25(BM25.Settings(index=str(folder)), ())
    load = time.perf_counter() - start

    async def ask() -> float:
        await searcher.search(questions[0], 3)
        searcher.report()
        start = time.perf_counter()
        for first in range(0, len(questions), at_once):
            batch = questions[first : first + at_once]
            await asyncio.gather(*(searcher.search(question, 3) for question in batch))
        return time.perf_counter() - start

    seconds = asyncio.run(ask())
    report = {key: round(value, 2) for key, value in searcher.report().items()}
    return {
        "load seconds": round(load, 2),
        **report,
        "queries per second": round(len(questions) / seconds),
        "MiB before": before,
        "MiB after": memory(),
    }


def alone(function: Any, *arguments: Any) -> Any:
    """The function's result, from a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("corpus", nargs="+", type=Path)
    parser.add_argument("--questions", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    questions = []
    for file in arguments.questions:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            questions += [json.loads(line)["question"] for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        built = alone(build, arguments.corpus, index)
        figures = {
            "corpus": [file.name for file in arguments.corpus],
            "passages": json.loads((index / "index.json").read_text())["passages"],
            "build": built,
            "alone": alone(answer, index, questions, 1),
            "64 at once": alone(answer, index, questions, 64),
            "machine": f"{psutil.cpu_count()} cores, {platform.machine()}",
            "versions": {name: version(name) for name in ("bm25s", "PyStemmer", "numpy")},
        }
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
