"""``agent-r1 train`` and ``sft``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

    from pathlib import Path

    from agent_r1.api import Result
    from agent_r1.run.recipe import Recipe

from agent_r1.cli.common import load, named, print_json, undisturbed


def run_train(arguments: argparse.Namespace, rest: list[str]) -> int:
    from pathlib import Path

    from agent_r1.errors import ConfigError
    from agent_r1.run.folder import RunFolder
    from agent_r1.run.recipe import shipped_recipes

    iterations = None
    if (arguments.resume is None) == (arguments.recipe is None):
        raise ConfigError(
            f"{arguments.command} needs a recipe (of ours: {', '.join(shipped_recipes())}) or "
            "--resume RUN"
        )
    if arguments.resume:
        iterations = _only_iterations(rest)
        if getattr(arguments, "source", None):
            raise ConfigError("--resume goes on with what the run imitates: no --from")
        if arguments.run is not None:
            raise ConfigError("--resume goes on in the run's own folder: no --run")
        RunFolder.open(arguments.resume)
    else:
        implied = _imitating(arguments)
        recipe = load(arguments.recipe, rest, quiet=arguments.json, implied=implied)
        if arguments.run is not None:
            RunFolder.must_be_free(named(arguments.run, "--run"))
    with undisturbed():
        from agent_r1 import api
    from agent_r1.run.console import console
    from agent_r1.utils.log import LOG

    with console(quiet=arguments.json):
        if arguments.resume:
            result = api.resume(arguments.resume, iterations=iterations, trust=arguments.trust)
        else:
            folder = arguments.run = arguments.run or api.default_run(arguments.recipe)
            LOG.info(f"run folder: {folder}")
            result = api.train(recipe, run=folder)
    if arguments.json:
        figures = {"last": result.metrics[-1], "report": result.report}
        print_json(arguments, {"run": str(result.run.path), **figures})
    else:
        path = Path(arguments.run or arguments.resume)  # as it was given
        _print_result(result, arguments.recipe, path, rest)
    return 0


def _only_iterations(rest: list[str]) -> int | None:
    """The one setting of a run that may change when it is resumed."""
    from agent_r1.config.overrides import parse_overrides
    from agent_r1.errors import ConfigError

    changes = dict(parse_overrides(rest))
    iterations = changes.pop("train.iterations", None)
    if changes:
        raise ConfigError(
            "--resume takes the run's own recipe; only --train.iterations may be raised, not "
            f"{', '.join(changes)}"
        )
    if iterations is not None and not isinstance(iterations, int):
        raise ConfigError(f"train.iterations = {iterations!r}: needs a whole number")
    return iterations


def _imitating(arguments: argparse.Namespace) -> list[str]:
    """Overrides that turn a recipe for reinforcement learning into ``sft``."""
    if arguments.command != "sft":
        return []
    source = [f"--algorithm.source={json.dumps(arguments.source)}"] if arguments.source else []
    return ["--algorithm=sft", "--credit=outcome", "--train.attempts=1", *source]


def _print_result(result: Result, source: str | None, path: Path, given: list[str]) -> None:
    from agent_r1.analysis.report import contrast, draw_curve, table
    from agent_r1.run.transcript import transcript
    from agent_r1.utils.text import printable

    curve = draw_curve(result.run)
    if result.report is not None:
        before, after = contrast(result.before["sampled"].groups, result.after["sampled"].groups)
        shown = printable(f"{transcript(before)}\n\nAfter training\n{transcript(after)}")
        print(f"\nBefore training\n{shown}\n")
        print(f"Success on tasks never seen in training, before -> after\n{table(result.report)}\n")
    command = "agent-r1" if shutil.which("agent-r1") else os.path.relpath(sys.argv[0])
    missing = "not drawn: pip install agent-r1[plot]"
    print(f"curve:        {path / curve.name if curve else missing}")
    print(f"best model:   {path / 'checkpoints' / 'best'}")
    print(f"run folder:   {path}")
    print(
        "\nWhat next\n"
        f"  {command} explain {path}   why it learned what it did, step by step\n"
        f"  {command} eval {path} --show 3   more episodes of the trained agent\n"
        f"  {command} {_next_run(result.recipe, source, path, given)}"
    )


def _next_run(recipe: Recipe, source: str | None, run: Path, given: list[str]) -> str:
    """The command to suggest as the next one; ``given`` stood beside the recipe."""
    if source is None:
        more = 2 * recipe.train.iterations
        return f"train --resume {run} --train.iterations {more}   the same for longer"
    if recipe.algorithm.name != "sft":
        rest = _kept(given, lambda key: key != "seed")
        words = shlex.join([source, *rest, "--seed", str(recipe.seed + 1)])
        return f"train {words}   the same with another seed"
    task = ("env", "limits", "renderer", *(("model",) if recipe.model.lora else ()))
    rest = _kept(given, lambda key: key.partition(".")[0] in task)
    start = ("--model.lora.start", str(run))
    if not recipe.model.lora:
        start = ("--model.path", f"{run}/checkpoints/best")
    return f"train {shlex.join([source, *rest, *start])}   reinforcement learning from here"


def _kept(given: list[str], keep: Callable[[str], bool]) -> list[str]:
    """Those of the words ``--key value`` and ``--key=value`` whose key is to be kept."""
    kept, words = [], list(given)
    while words:
        pair = [words.pop(0)]
        if "=" not in pair[0] and words:
            pair.append(words.pop(0))
        if keep(pair[0].removeprefix("--").partition("=")[0]):
            kept += pair
    return kept
