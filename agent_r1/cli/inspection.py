"""``agent-r1 check``, ``explain`` and ``index``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]


from agent_r1.cli.common import load, named, print_json, undisturbed


def run_check(arguments: argparse.Namespace, rest: list[str]) -> int:
    recipe = load(arguments.recipe, rest, quiet=arguments.json)
    with undisturbed():
        from agent_r1.analysis.check_recipe import dry_run
    from agent_r1.run.console import counting
    from agent_r1.utils.text import printable

    with counting("tasks", quiet=arguments.json) as tell:
        report = dry_run(recipe, tell)
    if arguments.json:
        print_json(arguments, report.as_dict())
    else:
        print(printable(report.as_text()))
    return 0


def run_index(arguments: argparse.Namespace, rest: list[str]) -> int:
    import time
    from pathlib import Path

    from agent_r1.run.console import counting
    from agent_r1.search.bm25 import BM25, build_index
    from agent_r1.utils.scope import run_async

    start = time.perf_counter()
    corpus = [Path(file).expanduser() for file in arguments.corpus]
    out = None if arguments.out is None else Path(named(arguments.out, "--out")).expanduser()
    with counting("passages", quiet=arguments.json) as tell:
        folder = build_index(corpus, out, tell)
    seconds = time.perf_counter() - start
    searcher = BM25(BM25.Settings(index=str(folder)), ())
    figures: dict[str, Any] = {
        "index": str(folder),
        "passages": len(searcher.passages),
        "seconds": round(seconds, 2),
        "MiB": round(sum(file.stat().st_size for file in folder.iterdir()) / 2**20, 1),
    }
    if arguments.query is not None:
        found = run_async(searcher.search(arguments.query, 3))
        figures["found"] = [vars(passage) for passage in found]
    if arguments.json:
        print_json(arguments, figures)
        return 0
    print("{passages:,} passages in {seconds} s, {MiB} MiB: {index}".format(**figures))
    if arguments.query is not None and not figures["found"]:
        print(f"nothing is found for {arguments.query!r}")
    for passage in figures.get("found", ()):
        print("\n{id}  {title}\n{text}".format(**passage))
    return 0


def run_explain(arguments: argparse.Namespace, rest: list[str]) -> int:
    from agent_r1.analysis.explain import explain
    from agent_r1.run.folder import RunFolder
    from agent_r1.utils.text import printable

    run = RunFolder.open(arguments.run)
    found = explain(run, arguments.trajectory, trust=arguments.trust)
    if arguments.json:
        print_json(arguments, found.as_dict())
    else:
        print(printable(found.as_text(tokens=arguments.tokens)))
    return 0
