"""The arguments of the command line."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from agent_r1.cli.beginning import run_completion, run_keys, run_new
from agent_r1.cli.engines import run_install, run_serve
from agent_r1.cli.evaluation import run_bench, run_eval, run_export, run_serve_agent
from agent_r1.cli.inspection import run_check, run_explain, run_index
from agent_r1.cli.training import run_train
from agent_r1.cli.viewing import run_diagnose, run_episodes, run_view

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_CODES = """exit codes: 0 done; 1 a run, or a part of it, came to nothing; 2 the input cannot be
used; 130 interrupted, 143 terminated (the run can be resumed); 141 nobody reads the output any
more. --debug shows where an error came from."""


OVERRIDES = """train, sft, eval, check, bench take any recipe key: --train.iterations 5;
`agent-r1 keys` lists them."""


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    from agent_r1 import __version__

    parser = argparse.ArgumentParser(
        prog="agent-r1",
        description="Train language-model agents on their own tools by reinforcement learning.",
        epilog=f"{OVERRIDES} {EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"agent-r1 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    makers = (*_add_training(commands), *_add_evaluation(commands))
    check = commands.add_parser(
        "check", help="dry-run a recipe in seconds, without training", allow_abbrev=False
    )
    check.add_argument("recipe", help="a TOML file, or the name of a recipe that ships")
    check.set_defaults(run_command=run_check, takes_overrides=True)
    readers = [*_add_comparisons(commands), *_add_viewing(commands)]
    for command in (*makers, commands.choices["explain"], commands.choices["serve"]):
        command.add_argument(
            "--trust",
            action="store_true",
            help="run the code that a run names which was not made here",
        )
    _add_engines(commands)
    helpers = _add_help(commands)
    commands.choices["completion"].set_defaults(parser=parser)
    for command in (*makers, check, _add_index(commands), *readers, *helpers):
        command.add_argument(
            "--json", action="store_true", help="print figures as JSON, nothing else"
        )
    return parser, commands.choices


def _add_evaluation(commands: _Commands) -> list[argparse.ArgumentParser]:
    """The commands that use the model of a run."""
    evaluate = commands.add_parser("eval", help="success on held-out tasks", allow_abbrev=False)
    evaluate.add_argument(
        "source", metavar="RUN|RECIPE", help="a run folder, or a recipe for its model as it comes"
    )
    evaluate.add_argument(
        "--checkpoint", default="best", help="best, last or an iteration (default: best)"
    )
    evaluate.add_argument("--split", default="test", choices=("train", "validation", "test"))
    evaluate.add_argument(
        "--tasks", type=_count, default=None, help="how many (default: the recipe's)"
    )
    evaluate.add_argument(
        "--temperature", type=_temperature, default=0.0, help="0 is greedy (default)"
    )
    evaluate.add_argument("--show", type=int, default=0, metavar="N", help="print N episodes")
    evaluate.set_defaults(run_command=run_eval, takes_overrides=True)

    export = commands.add_parser(
        "export",
        help="write a run's model as a plain folder, its adapter merged",
        allow_abbrev=False,
    )
    export.add_argument("run", metavar="RUN", help="a run folder")
    export.add_argument("out", metavar="FOLDER", help="a new folder")
    export.add_argument(
        "--checkpoint", default="best", help="best, last or an iteration (default: best)"
    )
    export.set_defaults(run_command=run_export)

    serve = commands.add_parser(
        "serve",
        help="a run's agent behind the interfaces of OpenAI and Anthropic, for an app",
        allow_abbrev=False,
    )
    serve.add_argument("run", metavar="RUN", help="a run folder")
    serve.add_argument(
        "--checkpoint", default="best", help="best, last or an iteration (default: best)"
    )
    serve.add_argument(
        "--port", type=int, default=8100, help="on this machine; default: 8100; 0: any"
    )
    serve.add_argument("--key", help="what clients must send (default: a new one, printed)")
    serve.add_argument(
        "--temperature", type=_temperature, default=0.0, help="0 is greedy (default)"
    )
    serve.set_defaults(run_command=run_serve_agent, json=False)
    return [evaluate, export]


def _add_training(commands: _Commands) -> list[argparse.ArgumentParser]:
    """The commands that make a run."""
    train = commands.add_parser(
        "train", help="train by a recipe, or go on with a run", allow_abbrev=False
    )
    sft = commands.add_parser(
        "sft",
        help="warm start: imitate the environment's gold actions, or successes of past runs",
        allow_abbrev=False,
    )
    for command in (train, sft):
        command.add_argument(
            "recipe", nargs="?", help="a TOML file, or the name of a recipe that ships"
        )
        command.add_argument(
            "--resume", metavar="RUN", help="go on with a run after its last checkpoint"
        )
        command.add_argument("--run", help="the run folder (default: runs/RECIPE-TIME)")
        command.set_defaults(run_command=run_train, takes_overrides=True)
        command.epilog = OVERRIDES
    sft.add_argument(
        "--from",
        dest="source",
        action="append",
        metavar="RUN",
        help="imitate this run's successful episodes (more than once: several runs')",
    )
    return [train, sft]


def _add_index(commands: _Commands) -> argparse.ArgumentParser:
    index = commands.add_parser(
        "index", help="make a search index of passages (BM25)", allow_abbrev=False
    )
    index.add_argument(
        "corpus", nargs="+", metavar="CORPUS", help="a .jsonl, .jsonl.gz or .parquet file"
    )
    index.add_argument(
        "--out", metavar="FOLDER", help="a new folder (default: the cache, where runs look for it)"
    )
    index.add_argument("--try", dest="query", metavar="QUERY", help="print what it finds")
    index.set_defaults(run_command=run_index)
    return index


def _add_comparisons(commands: _Commands) -> list[argparse.ArgumentParser]:
    """The commands that inspect runs and compare them."""
    explain = commands.add_parser(
        "explain",
        help="why a stored trajectory was learned from as it was",
        allow_abbrev=False,
    )
    explain.add_argument("run", metavar="RUN", help="a run folder")
    explain.add_argument(
        "trajectory",
        nargs="?",
        metavar="ITERATION/GROUP/ATTEMPT",
        help="by default the last iteration's first group with a signal",
    )
    explain.add_argument("--tokens", action="store_true", help="a line for each token, too")
    explain.set_defaults(run_command=run_explain)

    bench = commands.add_parser(
        "bench", help="compare algorithms and baselines over seeds", allow_abbrev=False
    )
    bench.add_argument("experiment", help="a TOML file")
    bench.add_argument("--quick", action="store_true", help="the short form that the file gives")
    bench.add_argument(
        "--out", metavar="FOLDER", help="tables and figures (default: runs/bench/NAME)"
    )
    bench.add_argument(
        "--runs", metavar="FOLDER", help="run folders, shared by experiments (default: runs/bench)"
    )
    bench.add_argument("--parallel", type=_count, help="runs at once (default: by the cores)")
    bench.set_defaults(run_command=run_bench, takes_overrides=True)
    return [explain, bench]


def _add_viewing(commands: _Commands) -> list[argparse.ArgumentParser]:
    """The commands that look at runs."""
    view = commands.add_parser(
        "view", help="look at runs in the browser, also while they go on", allow_abbrev=False
    )
    view.add_argument(
        "runs", nargs="*", metavar="RUNS", help="folders of runs, or that hold runs (default: runs)"
    )
    view.add_argument("--port", type=int, help="the port, on this machine alone")
    view.add_argument("--no-browser", action="store_true", help="print the address alone")
    view.set_defaults(run_command=run_view, json=False)

    episodes = commands.add_parser("episodes", help="list a run's episodes", allow_abbrev=False)
    episodes.add_argument("run", metavar="RUN", help="a run folder")
    episodes.add_argument(
        "filters",
        nargs="*",
        metavar="NAME=VALUE",
        help="which: stop=max_turns, success=0, iteration=3..5, part/format=..0.5, "
        "event=fault/timeout, task=ID, text='some words'",
    )
    episodes.add_argument("--sort", metavar="NAME", help="by a figure, e.g. reward, part/format")
    episodes.add_argument("--ascending", action="store_true", help="the smallest first")
    episodes.add_argument("--limit", type=_count, default=50, help="how many (default: 50)")
    episodes.set_defaults(run_command=run_episodes)

    diagnose = commands.add_parser(
        "diagnose",
        help="what goes wrong in a run without an error: evidence and cure",
        allow_abbrev=False,
    )
    diagnose.add_argument("run", metavar="RUN", help="a run folder")
    diagnose.set_defaults(run_command=run_diagnose)
    return [episodes, diagnose]


def _add_engines(commands: _Commands) -> None:
    """The commands for engines that are servers."""
    engine = commands.add_parser(
        "engine", help="engines that are servers: install one, be one", allow_abbrev=False
    )
    which = engine.add_subparsers(dest="what", required=True, metavar="WHAT")
    install = which.add_parser(
        "install", help="make the environment of a server (minutes)", allow_abbrev=False
    )
    install.add_argument("engine", choices=("vllm", "sglang"))
    install.add_argument("--cpu", action="store_true", help="the build for CPUs, also beside a GPU")
    install.set_defaults(run_command=run_install, json=False)
    serve = which.add_parser(
        "serve", help="the native engine as a server that speaks as vLLM does", allow_abbrev=False
    )
    serve.add_argument("model", metavar="MODEL", help="as model.path of a recipe")
    serve.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    serve.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000")
    serve.set_defaults(run_command=run_serve, json=False)


def _add_help(commands: _Commands) -> list[argparse.ArgumentParser]:
    """The commands that help to begin."""
    keys = commands.add_parser(
        "keys", help="every key of a recipe: type, default, meaning", allow_abbrev=False
    )
    keys.add_argument(
        "section", nargs="?", help="a section (train, env.memory), a name (grpo) or a key"
    )
    keys.add_argument(
        "--metrics", action="store_true", help="the figures of a run instead: unit, meaning, advice"
    )
    keys.set_defaults(run_command=run_keys)

    new = commands.add_parser(
        "new", help="write an environment of your own that runs, to begin with", allow_abbrev=False
    )
    new.add_argument("name", metavar="NAME", help="a new folder; its last part names the class")
    new.set_defaults(run_command=run_new, json=False)

    completion = commands.add_parser(
        "completion", help="print what makes a shell complete our commands", allow_abbrev=False
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    completion.set_defaults(run_command=run_completion, json=False)
    return [keys]


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def _temperature(text: str) -> float:
    if (number := float(text)) != 0.0 and not 1e-3 <= number <= 1e3:
        raise argparse.ArgumentTypeError(f"must be 0 (greedy), or from 0.001 to 1000, not {text}")
    return number
