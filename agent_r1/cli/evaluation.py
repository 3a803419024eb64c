"""``agent-r1 eval``, ``export``, ``serve`` and ``bench``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from agent_r1.cli.common import load, print_json, undisturbed
from agent_r1.utils.run_files import is_run


def run_eval(arguments: argparse.Namespace, rest: list[str]) -> int:

    given_run = is_run(arguments.source)
    recipe = None if given_run else load(arguments.source, rest, quiet=arguments.json)
    if given_run and rest:
        from agent_r1.errors import ConfigError

        raise ConfigError(f"a run is evaluated by its own recipe; unexpected: {' '.join(rest)}")
    with undisturbed():
        from agent_r1 import api
    from agent_r1.run.transcript import transcript
    from agent_r1.utils.text import printable

    agent = (
        api.Agent(recipe)
        if recipe
        else api.load(arguments.source, arguments.checkpoint, trust=arguments.trust)
    )
    settings = agent.recipe.evaluation
    num = arguments.tasks or settings.test_tasks or settings.tasks
    split, temperature = arguments.split, arguments.temperature
    with agent:
        if (size := len(agent.tasks(split))) < num:
            print(f"note: {split} has {size} tasks of {num} asked for", file=sys.stderr)
        result = agent.evaluate(split=split, num_tasks=num, temperature=temperature)
    figures = result.figures()
    if arguments.json:
        print_json(arguments, figures)
        return 0
    for group in result.groups[: arguments.show]:
        print(printable(transcript(group.trajectories[0])) + "\n")
    print("  category  tasks  success     95 % interval  turns faults")
    for name, scores in [*figures["categories"].items(), ("all", figures["total"])]:
        print(_score_line(name or "-", scores))
    return 0


def _score_line(name: str, scores: dict[str, Any]) -> str:
    interval = f"[{scores['low']:.3f}, {scores['high']:.3f}]"
    if not scores["tasks"]:
        return f"{name:>10}      0  all {scores['faults']} episodes failed"
    metrics = "".join(f"  {key} {value:.3f}" for key, value in scores["metrics"].items())
    return (
        f"{name:>10} {scores['tasks']:>6} {scores['success']:>8.3f}  {interval:>16} "
        f"{scores['turns']:>6.2f} {scores['faults']:>6}{metrics}"
    )


def run_export(arguments: argparse.Namespace, rest: list[str]) -> int:
    with undisturbed():
        from agent_r1 import api

    folder = api.export(arguments.run, arguments.out, arguments.checkpoint, trust=arguments.trust)
    if arguments.json:
        print_json(arguments, {"model": str(folder)})
    else:
        print(f"model: {folder}")
    return 0


def run_bench(arguments: argparse.Namespace, rest: list[str]) -> int:
    from pathlib import Path

    from agent_r1.bench.experiment import load_experiment
    from agent_r1.bench.schedule import run_experiment
    from agent_r1.config.overrides import parse_overrides

    path = Path(arguments.experiment)
    overrides = parse_overrides(rest)
    experiment, jobs = load_experiment(path, quick=arguments.quick, overrides=overrides)
    name = path.stem + ("-quick" if arguments.quick else "")
    out = Path(arguments.out or Path("runs") / "bench" / name)
    outcome = run_experiment(
        experiment,
        jobs,
        runs=Path(arguments.runs or Path("runs") / "bench"),
        out=out,
        parallel=arguments.parallel,
        say=(lambda line: print(line, file=sys.stderr, flush=True))
        if arguments.json
        else (lambda line: print(line, flush=True)),
    )
    if arguments.json:
        files = [str(file) for file in outcome.files]
        print_json(arguments, {"files": files, "failures": outcome.failures})
    elif outcome.files:
        print("\n" + (out / "table.md").read_text())
        print("\n".join(map(str, outcome.files)))
    for failure in outcome.failures:
        print(f"agent-r1: {failure}", file=sys.stderr)
    if outcome.failures:
        print("agent-r1: the same command tries again what failed", file=sys.stderr)
    return 1 if outcome.failures else 0


def run_serve_agent(arguments: argparse.Namespace, rest: list[str]) -> int:
    import contextlib
    import secrets

    with undisturbed():
        from agent_r1.api import load as load_agent
    from agent_r1.gateway.serving import serve
    from agent_r1.utils.scope import run_async

    agent = load_agent(arguments.run, arguments.checkpoint, trust=arguments.trust)
    key = arguments.key or secrets.token_urlsafe(18)

    def tell(url: str) -> None:
        print(f"OPENAI_BASE_URL={url}\nOPENAI_API_KEY={key}", flush=True)
        print(f"ANTHROPIC_BASE_URL={url.removesuffix('/v1')}\nANTHROPIC_API_KEY={key}", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        run_async(
            serve(
                agent.rollout,
                temperature=arguments.temperature,
                port=arguments.port,
                key=key,
                tell=tell,
            )
        )
    return 0
