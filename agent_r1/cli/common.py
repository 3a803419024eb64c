"""Helpers of several commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agent_r1.run.recipe import Recipe


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Delays signals while C libraries are loaded, where raising is not safe."""
    came: list[int] = []
    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if came:
        signal.raise_signal(came[0])


def print_json(arguments: argparse.Namespace, figures: Any) -> None:
    print(json.dumps(figures), file=arguments.stdout)


def named(folder: str, option: str) -> str:
    """The name, unless it is empty, e.g. from a shell variable that is not set."""
    from agent_r1.errors import ConfigError

    if not folder.strip():
        raise ConfigError(f"{option} needs the name of a folder; it was given none")
    return folder


def load(source: str, rest: list[str], *, quiet: bool, implied: Sequence[str] = ()) -> Recipe:
    """``implied``: overrides that a command stands for; keys that they drop are not reported."""
    from agent_r1.config.overrides import parse_overrides
    from agent_r1.run.recipe import load_recipe

    recipe, notes = load_recipe(source, parse_overrides([*implied, *rest]))
    for note in notes if not implied else ():
        print(note, file=sys.stderr if quiet else sys.stdout)
    return recipe
