"""Finds the models of a run in its folder ``checkpoints``, also where the links are lost."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from agent_r1.errors import ConfigError
from agent_r1.utils.durable import SEAL, why_damaged
from agent_r1.utils.run_files import CHECKPOINTS, LAST, LINKS, STATE


def newest_first(folder: Path) -> list[tuple[int, Path]]:
    """Iteration and folder of everything named as a checkpoint, the newest first. A copy that
    followed links has folders in their place, which come after the numbered one of the same
    iteration. A numbered name may itself be a link to another disk.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir():
            continue
        if is_number(path.name):
            found.append((int(path.name), path))
        elif path.name in LINKS and not path.is_symlink():
            with contextlib.suppress(ConfigError):
                found.append((read_state(path)["iteration"], path))
    return sorted(found, key=lambda pair: (pair[0], pair[1].name.isdecimal()), reverse=True)


def is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 19


def read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text())
        int(state["iteration"]), int(state["best_iteration"])
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        raise ConfigError(f"{folder / 'state.json'} cannot be read: {error!r}") from error
    return dict(state)


def model_folder(run: Path, which: str) -> Path:
    """The model of a run: ``best``, ``last``, or an iteration's number.

    Raises:
        ConfigError: There is no such checkpoint, or its files are damaged.
    """
    found = newest_first(run / CHECKPOINTS)
    there = {number: path for number, path in reversed(found) if is_whole(number, path)}
    there = dict(found) | there
    number = int(which) if is_number(which) else None
    if which in LINKS and there:
        newest = next((path for n, path in found if is_whole(n, path)), None)
        if newest is None:
            reasons = "; ".join(f"{path.name}: {why_unusable(n, path)}" for n, path in found)
            raise ConfigError(f"{run} has no whole checkpoint ({reasons})")
        number = read_state(newest)["iteration" if which == LAST else "best_iteration"]
    folder = None if number is None else there.get(number)
    if folder is None:
        known = ", ".join(map(str, sorted(there))) or "none"
        raise ConfigError(
            f"{run} has no checkpoint {which!r}; it has those of iterations {known}: name best, "
            "last or a number"
        )
    if (folder / SEAL).exists() and (reason := why_damaged(folder)) is not None:
        raise ConfigError(f"{folder} is damaged: {reason}; name another checkpoint")
    return folder.resolve()


def is_whole(number: int, folder: Path) -> bool:
    """Whether its files' sizes are right; one without checksums (older version) passes."""
    reason = why_unusable(number, folder, thorough=False)
    return reason is None or not (folder / SEAL).exists()


def why_unusable(number: int, folder: Path, *, thorough: bool = True) -> str | None:
    """What is wrong with the checkpoint of an iteration, or ``None``."""
    if (reason := why_damaged(folder, thorough=thorough)) is not None:
        return reason
    with contextlib.suppress(ConfigError):
        if (other := read_state(folder)["iteration"]) != number:
            return f"it is a copy of that of iteration {other}"
    return None
