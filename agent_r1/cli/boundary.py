"""The command line: parse and check first, import torch second."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import select
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

    from collections.abc import Iterator


from agent_r1.cli.parser import make_parser
from agent_r1.utils.run_files import CHECKPOINTS

MAX_MESSAGE = 3000
"""Most characters of a message, to fit a screen."""


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM: handled as an interruption, reported by its own name."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; see ``EXIT_CODES``. Every error becomes one message."""
    given = sys.argv[1:] if argv is None else argv
    words = [word for word in given if word != "--debug"]
    parser, commands = make_parser()
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
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # ignore further Ctrl-C
        if "--debug" in given:
            traceback.print_exc()
        return _told(error, arguments)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _tell_of_thread(what: threading.ExceptHookArgs) -> None:
    """Prints an error in a thread of foreign code as one line."""
    from agent_r1.utils.text import describe, place_of

    if what.exc_value is not None and not isinstance(what.exc_value, SystemExit):
        said = f"{describe(what.exc_value)}{place_of(what.exc_value)}"
        print(f"warning: an error in a thread: {said}", file=sys.stderr)


@contextlib.contextmanager
def _printing(arguments: argparse.Namespace) -> Iterator[None]:
    """Sets ``arguments.stdout``, where JSON goes: with ``--json`` all other output, also of tools
    and their processes, goes to stderr.
    """
    arguments.stdout = sys.stdout
    if not arguments.json:
        yield
        return
    arguments.stdout.flush()
    if arguments.stdout is not sys.__stdout__:  # set by the caller of ``main``
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
    """SIGTERM, as schedulers send it, ends a run in the same way as Ctrl-C; code that cannot be
    interrupted ends it, too.
    """
    from agent_r1.utils import blocked

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
    """Prints the error, one screen at most; returns the exit code."""
    from agent_r1.errors import ConfigError, EnvCheckError, RunError
    from agent_r1.utils.text import describe, place_of, printable

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
    """Whether stdout still has a reader; if not, stdout goes to the null device."""
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
        is_begun = run is not None and (Path(run) / CHECKPOINTS).exists()
    except OSError:  # no name that a file can have
        is_begun = False
    if not is_begun:
        return "there is no run yet to resume"
    return f"`agent-r1 train --resume {run}` goes on from the last checkpoint"


def _parted(
    words: list[str], commands: dict[str, argparse.ArgumentParser]
) -> tuple[list[str], list[str]]:
    """Splits arguments of a command from overrides of the recipe (``--section.key value``), in any
    order.
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
