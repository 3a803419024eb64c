"""The command line: parse and check first, import torch second."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import select
import shutil
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from agent_r1.api import Result
    from agent_r1.recipe import Recipe


MAX_MESSAGE = 3000
"""Characters of a message that fit a screen."""
EXIT_CODES = """exit codes: 0 done; 1 a run, or a part of it, came to nothing; 2 the input cannot be
used; 130 interrupted, 143 terminated (the run can be resumed); 141 nobody reads the output any
more. --debug shows where an error came from."""


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM: the same as an interruption, by another name."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; see ``EXIT_CODES``. Whatever goes wrong is one message."""
    given = sys.argv[1:] if argv is None else argv
    words = [word for word in given if word != "--debug"]
    parser, commands = _parser()
    words, rest = _parted(words, commands)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(
            f"unexpected argument {unknown[0]!r}; overrides look like --section.key value"
            if getattr(arguments, "takes_overrides", False)
            else f"unexpected arguments: {' '.join(unknown)}"
        )
    before = None
    threading.excepthook = _tell_of_thread
    try:
        with _terminable(), _printing(arguments):
            code: int = arguments.run_command(arguments, rest)
        sys.stdout.flush()
        return code
    except BaseException as error:  # an exit in code of the user's is one, too
        with contextlib.suppress(ValueError):  # not in the main thread
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        if "--debug" in given:
            traceback.print_exc()
        return _told(error, arguments)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _tell_of_thread(what: threading.ExceptHookArgs) -> None:
    """An error in a thread that code of others started: a line."""
    from agent_r1.text import describe, place_of

    if what.exc_value is not None and not isinstance(what.exc_value, SystemExit):
        said = f"{describe(what.exc_value)}{place_of(what.exc_value)}"
        print(f"warning: an error in a thread: {said}", file=sys.stderr)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Signals wait while libraries in C are loaded, in which nothing can be raised."""
    signals = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _printing(arguments: argparse.Namespace) -> Iterator[None]:
    """Where JSON goes, ``arguments.stdout``: with ``--json`` nothing else may stand there, whatever
    a tool or what it starts prints.
    """
    arguments.stdout = sys.stdout
    if not arguments.json:
        yield
        return
    arguments.stdout.flush()
    if arguments.stdout is not sys.__stdout__:  # somebody's who called ``main``
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(saved), "w") as arguments.stdout:
            yield
    finally:
        print(end="", flush=True)
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, as schedulers send it, ends a run in the same way as Ctrl-C; code that nothing can
    interrupt ends it, too.
    """
    from agent_r1 import blocked

    def terminate(number: int, frame: object) -> None:
        raise _TerminatedError

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not in the main thread
        yield
        return
    blocked.MAY_END = True
    try:
        yield
    finally:
        blocked.MAY_END = False
        signal.signal(signal.SIGTERM, before)


def _told(error: BaseException, arguments: argparse.Namespace) -> int:
    """Prints what went wrong in a screen at most; the exit code."""
    from agent_r1.config import ConfigError, RunError
    from agent_r1.env_check import EnvCheckError
    from agent_r1.text import describe, place_of, printable

    if isinstance(error, BrokenPipeError) and not _is_read():
        return 141
    if isinstance(error, KeyboardInterrupt):
        is_term = isinstance(error, _TerminatedError)
        print(
            f"\n{'terminated' if is_term else 'interrupted'}; {_goes_on(arguments)}",
            file=sys.stderr,
        )
        return 143 if is_term else 130
    if isinstance(error, ConfigError | EnvCheckError | RunError):
        text = str(error)
    elif isinstance(error, SystemExit):
        text = f"your code ended the program: {error!r}{place_of(error)}"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or describe(error)}: {error.strerror}{place_of(error)}"
        if arguments.command in ("train", "sft", "bench") and error.errno == errno.ENOSPC:
            text += f"; {_goes_on(arguments)}"
    else:
        text = f"{describe(error)}{place_of(error)} (--debug shows more)"
    text = printable(text)
    if len(text) > MAX_MESSAGE:
        cut = len(text) - MAX_MESSAGE
        text = f"{text[:MAX_MESSAGE]} ... ({cut:,} more characters)"
    print(f"agent-r1: {text}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError | EnvCheckError) else 1


def _is_read() -> bool:
    """Whether somebody still reads what is printed; if not, nothing more goes there."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return False
    return True


def _goes_on(arguments: argparse.Namespace) -> str:
    from pathlib import Path

    if arguments.command == "bench":
        return "the same command goes on"
    run = getattr(arguments, "run", None) if arguments.command in ("train", "sft") else None
    run = run or getattr(arguments, "resume", None)
    try:
        is_begun = run is not None and (Path(run) / "checkpoints").exists()
    except OSError:  # no name that a file can have
        is_begun = False
    if not is_begun:
        return "nothing was begun that could go on"
    return f"`agent-r1 train --resume {run}` goes on from the last checkpoint"


def _parted(
    words: list[str], commands: dict[str, argparse.ArgumentParser]
) -> tuple[list[str], list[str]]:
    """Arguments of a command, and overrides of the recipe (``--section.key value``), in whatever
    order they came.
    """
    command = commands.get(next((w for w in words if not w.startswith("-")), ""))
    if command is None or not command.get_default("takes_overrides"):
        return words, []
    own: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, separator, _ = word.partition("=")
        if not word.startswith("--") or len(word) == 2 or name in command._option_string_actions:
            own.append(word)
            continue
        overrides.append(word)
        if not separator and rest:
            overrides.append(rest.pop(0))
    return own, overrides


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    from agent_r1 import __version__

    parser = argparse.ArgumentParser(
        prog="agent-r1",
        description="Train language-model agents on their own tools by reinforcement learning.",
        epilog="train, sft, eval, check, bench take any recipe key: --train.iterations 5. "
        + EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"agent-r1 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    training = _add_training(commands)
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
    evaluate.set_defaults(run_command=_eval, takes_overrides=True)

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
    export.set_defaults(run_command=_export)

    check = commands.add_parser(
        "check", help="dry-run a recipe in seconds, without training", allow_abbrev=False
    )
    check.add_argument("recipe", help="a TOML file, or the name of a recipe that ships")
    check.set_defaults(run_command=_check, takes_overrides=True)

    more = (*training, _add_index(commands), *_add_comparisons(commands))
    explain = commands.choices["explain"]
    for command in (*training, evaluate, export, explain):
        command.add_argument(
            "--trust",
            action="store_true",
            help="run the code that a run names which was not made here",
        )
    for command in (evaluate, export, check, *more):
        command.add_argument(
            "--json", action="store_true", help="print figures as JSON, nothing else"
        )
    return parser, commands.choices


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
        command.set_defaults(run_command=_train, takes_overrides=True)
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
    index.set_defaults(run_command=_index)
    return index


def _add_comparisons(commands: _Commands) -> list[argparse.ArgumentParser]:
    """The commands that look at runs and put them side by side."""
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
    explain.set_defaults(run_command=_explain)

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
    bench.set_defaults(run_command=_bench, takes_overrides=True)
    return [explain, bench]


def _print_json(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    print(json.dumps(figures), file=arguments.stdout)


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def _temperature(text: str) -> float:
    if (number := float(text)) != 0.0 and not 1e-3 <= number <= 1e3:
        raise argparse.ArgumentTypeError(f"must be 0 (greedy), or from 0.001 to 1000, not {text}")
    return number


def _named(folder: str, option: str) -> str:
    """Not an empty text, as of a variable of the shell's that is not set."""
    from agent_r1.config import ConfigError

    if not folder.strip():
        raise ConfigError(f"{option} needs the name of a folder; it was given none")
    return folder


def _load(source: str, rest: list[str], *, quiet: bool, implied: Sequence[str] = ()) -> Recipe:
    """``implied``: overrides that a command stands for; nobody needs to be told what they drop."""
    from agent_r1.config import parse_overrides
    from agent_r1.recipe import load_recipe

    recipe, notes = load_recipe(source, parse_overrides([*implied, *rest]))
    for note in notes if not implied else ():
        print(note, file=sys.stderr if quiet else sys.stdout)
    return recipe


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    from pathlib import Path

    from agent_r1.config import ConfigError
    from agent_r1.recipe import shipped_recipes
    from agent_r1.run import RunFolder

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
        recipe = _load(arguments.recipe, rest, quiet=arguments.json, implied=implied)
        if arguments.run is not None:
            RunFolder.must_be_free(_named(arguments.run, "--run"))
    with undisturbed():
        from agent_r1 import api
    from agent_r1.progress import Reporter

    reporter = Reporter(quiet=arguments.json)
    if arguments.resume:
        result = api.resume(
            arguments.resume, iterations=iterations, trust=arguments.trust, reporter=reporter
        )
    else:
        folder = arguments.run = arguments.run or api.default_run(arguments.recipe)
        reporter.say(f"run folder: {folder}")
        result = api.train(recipe, run=folder, reporter=reporter)
    if arguments.json:
        figures = {"last": result.metrics[-1], "report": result.report}
        _print_json(arguments, {"run": str(result.run.path), **figures})
    else:
        path = Path(arguments.run or arguments.resume)  # as it was given
        _print_result(result, arguments.recipe, path)
    return 0


def _only_iterations(rest: list[str]) -> int | None:
    """The one setting of a run that may change when it goes on."""
    from agent_r1.config import ConfigError, parse_overrides

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
    """The overrides that make ``sft`` of a recipe for reinforcement learning."""
    if arguments.command != "sft":
        return []
    source = [f"--algorithm.source={json.dumps(arguments.source)}"] if arguments.source else []
    return ["--algorithm=sft", "--credit=outcome", "--train.attempts=1", *source]


def _print_result(result: Result, source: str | None, path: Path) -> None:
    from agent_r1.report import contrast, draw_curve, table, transcript
    from agent_r1.text import printable

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
        f"  {command} {_next_run(result.recipe, source, path)}"
    )


def _next_run(recipe: Recipe, source: str | None, run: Path) -> str:
    """The command that most would go on with."""
    if source is None:
        more = 2 * recipe.train.iterations
        return f"train --resume {run} --train.iterations {more}   the same for longer"
    if recipe.algorithm.name != "sft":
        return f"train {source} --seed {recipe.seed + 1}   the same with another seed"
    if recipe.model.lora:
        return f"train {source} --model.lora.start {run}   reinforcement learning from here"
    return f"train {source} --model.path {run}/checkpoints/best   reinforcement learning from here"


def _eval(arguments: argparse.Namespace, rest: list[str]) -> int:
    from pathlib import Path

    is_run = (Path(arguments.source) / "recipe.json").exists()
    recipe = None if is_run else _load(arguments.source, rest, quiet=arguments.json)
    if is_run and rest:
        from agent_r1.config import ConfigError

        raise ConfigError(f"a run is evaluated by its own recipe; unexpected: {' '.join(rest)}")
    with undisturbed():
        from agent_r1 import api
    from agent_r1.report import transcript
    from agent_r1.text import printable

    agent = (
        api.Agent(recipe)
        if recipe
        else api.load(arguments.source, arguments.checkpoint, trust=arguments.trust)
    )
    settings = agent.recipe.evaluation
    num = arguments.tasks or settings.test_tasks or settings.tasks
    if (size := len(agent.tasks(arguments.split))) < num:
        print(f"note: {arguments.split} has {size} tasks of {num} asked for", file=sys.stderr)
    result = agent.evaluate(split=arguments.split, num_tasks=num, temperature=arguments.temperature)
    figures = result.figures()
    if arguments.json:
        _print_json(arguments, figures)
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


def _export(arguments: argparse.Namespace, rest: list[str]) -> int:
    with undisturbed():
        from agent_r1 import api

    folder = api.export(arguments.run, arguments.out, arguments.checkpoint, trust=arguments.trust)
    if arguments.json:
        _print_json(arguments, {"model": str(folder)})
    else:
        print(f"model: {folder}")
    return 0


def _check(arguments: argparse.Namespace, rest: list[str]) -> int:
    recipe = _load(arguments.recipe, rest, quiet=arguments.json)
    with undisturbed():
        from agent_r1.dry_run import dry_run
    from agent_r1.progress import counting
    from agent_r1.text import printable

    with counting("tasks", quiet=arguments.json) as tell:
        report = dry_run(recipe, tell)
    if arguments.json:
        _print_json(arguments, report.as_dict())
    else:
        print(printable(report.as_text()))
    return 0


def _index(arguments: argparse.Namespace, rest: list[str]) -> int:
    import time
    from pathlib import Path

    from agent_r1.progress import counting
    from agent_r1.run_async import run_async
    from agent_r1.search.bm25 import BM25, build_index

    start = time.perf_counter()
    corpus = [Path(file).expanduser() for file in arguments.corpus]
    out = None if arguments.out is None else Path(_named(arguments.out, "--out")).expanduser()
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
        _print_json(arguments, figures)
        return 0
    print("{passages:,} passages in {seconds} s, {MiB} MiB: {index}".format(**figures))
    if arguments.query is not None and not figures["found"]:
        print(f"nothing is found for {arguments.query!r}")
    for passage in figures.get("found", ()):
        print("\n{id}  {title}\n{text}".format(**passage))
    return 0


def _explain(arguments: argparse.Namespace, rest: list[str]) -> int:
    from agent_r1.explain import explain
    from agent_r1.run import RunFolder
    from agent_r1.text import printable

    run = RunFolder.open(arguments.run)
    found = explain(run, arguments.trajectory, trust=arguments.trust)
    if arguments.json:
        _print_json(arguments, found.as_dict())
    else:
        print(printable(found.as_text(tokens=arguments.tokens)))
    return 0


def _bench(arguments: argparse.Namespace, rest: list[str]) -> int:
    from pathlib import Path

    from agent_r1.bench.experiment import load_experiment
    from agent_r1.bench.schedule import run_experiment
    from agent_r1.config import parse_overrides

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
        _print_json(arguments, {"files": files, "failures": outcome.failures})
    elif outcome.files:
        print("\n" + (out / "table.md").read_text())
        print("\n".join(map(str, outcome.files)))
    for failure in outcome.failures:
        print(f"agent-r1: {failure}", file=sys.stderr)
    if outcome.failures:
        print("agent-r1: the same command tries again what failed", file=sys.stderr)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
