"""The commands that help to begin: keys, new, completion."""

from __future__ import annotations

import argparse
import shutil
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from agent_r1.cli.common import print_json

if TYPE_CHECKING:
    from agent_r1.analysis.keys import Key


def run_keys(arguments: argparse.Namespace, rest: list[str]) -> int:
    import dataclasses

    from agent_r1.analysis.keys import all_keys, keys_of, known_metrics

    if arguments.metrics:
        metrics = known_metrics(arguments.section)
        if arguments.json:
            print_json(arguments, metrics)
            return 0
        for metric in metrics:
            print(f"{metric['name']}  ({metric['unit']})")
            print(_wrapped(f"{metric['meaning']} {metric['watch']}".strip()))
        return 0
    keys = keys_of(arguments.section) if arguments.section else all_keys()
    if arguments.json:
        print_json(arguments, [dataclasses.asdict(key) for key in keys])
        return 0
    for section, members in groupby(keys, key=lambda key: key.name.partition(".")[0]):
        print(f"[{section}]")
        for key in members:
            owners = "" if arguments.section in key.of else _owners(key)
            print(f"{key.name} = {key.default or '(needed)'}   # {key.type}{owners}")
            print(_wrapped(key.meaning))
        print()
    return 0


def _owners(key: Key) -> str:
    return f"; of {', '.join(key.of)}" if key.of else ""


def _wrapped(text: str) -> str:
    import textwrap

    width = max(40, min(100, shutil.get_terminal_size().columns))
    return textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ")


def run_new(arguments: argparse.Namespace, rest: list[str]) -> int:
    from importlib.resources import files

    from agent_r1.cli.common import named
    from agent_r1.errors import ConfigError

    folder = Path(named(arguments.name, "NAME")).expanduser()
    name = "".join(word[:1].upper() + word[1:] for word in _words(folder.name))
    if not name.isidentifier():
        raise ConfigError(f"{folder.name!r} cannot name a class; for example: agent-r1 new shop")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for template in sorted((files("agent_r1") / "assets" / "new").iterdir(), key=lambda f: f.name):
        text = template.read_text(encoding="utf-8").replace("CLASS", name)
        (folder / template.name.removesuffix(".txt")).write_text(text, encoding="utf-8")
    print(
        f"{folder}: env.py with the environment {name}, recipe.toml, test_env.py\n\n"
        f"  cd {folder}\n"
        "  agent-r1 check recipe.toml   whether it holds: prompt, rewards, limits, in seconds\n"
        "  agent-r1 train recipe.toml --train.iterations 2   the whole loop, with the tiny model\n"
        "  agent-r1 view   look at what happened"
    )
    return 0


def _words(name: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in name).split()


def run_completion(arguments: argparse.Namespace, rest: list[str]) -> int:
    import shtab

    print(shtab.complete(arguments.parser, shell=arguments.shell))
    return 0
