"""Stored trajectories: one group per line, a step's estimates beside its sampled data."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from agent_r1.errors import ConfigError
from agent_r1.types import Estimates, Group, PerToken
from agent_r1.utils.durable import make_folder, must_be_file, write_atomically

_GROUP = TypeAdapter(Group)
_PER_TOKEN: TypeAdapter[PerToken] = TypeAdapter(PerToken)
MAX_GROUP_BYTES = 1 << 29
"""Most bytes of one group."""
NO_GROUP = (LookupError, TypeError, AttributeError, RecursionError)
"""What a line raises that holds something else."""


def write_groups(path: Path, groups: list[Group], known: Estimates) -> None:
    """Writes the file whole or not at all."""
    make_folder(path.parent)
    lines = []
    for group in groups:
        row = _GROUP.dump_python(group, mode="json", exclude={"number"})  # that of the line
        for trajectory in row["trajectories"]:
            for step in trajectory["steps"]:
                step |= dict.fromkeys(known.tables())
        for key, _ in group.steps():
            step = row["trajectories"][key.attempt]["steps"][key.step]
            step |= {name: table.get(key) for name, table in known.tables().items()}
        lines.append(json.dumps(row) + "\n")
    write_atomically(path, gzip.compress("".join(lines).encode(), compresslevel=5, mtime=0))


def read_groups(path: Path) -> Iterator[tuple[Group, Estimates]]:
    """The groups of a file, each with its estimates.

    Raises:
        ConfigError: The file is missing or damaged.
    """
    must_be_file(path)
    try:
        with gzip.open(path) as file:
            for number in itertools.count():
                if not (line := file.readline(MAX_GROUP_BYTES)):
                    break
                row = _as_today(json.loads(line))
                group = _GROUP.validate_python(row)
                group.number, known = number, Estimates()
                for key, _ in group.steps():
                    step = row["trajectories"][key.attempt]["steps"][key.step]
                    for name, table in known.tables().items():
                        if step.get(name) is not None:
                            table[key] = _PER_TOKEN.validate_python(step[name])
                yield group, known
    except (OSError, EOFError, zlib.error, ValueError, *NO_GROUP) as error:
        raise ConfigError(f"{path} cannot be read: {error!r:.300}") from error


def _as_today(row: dict[str, Any]) -> dict[str, Any]:
    """A group's row as it is written now: each action had one version before."""
    for trajectory in row["trajectories"]:
        for step in trajectory["steps"]:
            if (version := step["action"].pop("policy_version", None)) is not None:
                step["action"]["versions"] = [(version, 0, len(step["action"]["token_ids"]))]
    return row
