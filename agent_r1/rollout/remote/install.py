"""Environments of servers: each of its own, in the user's cache, since none fits beside us."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent_r1.errors import RunError
from agent_r1.utils.cache_folder import cache_folder

DONE = "installed"
"""File that is written last."""


@dataclass(frozen=True)
class Packages:
    """What a server is installed from, at exact versions.

    Attributes:
        name: Of the engine.
        gpu, cpu: What pip is told to install for a GPU and for CPUs; none: there is no such build.
        remove_on_cpu: What that brings along and does not work with.
    """

    name: str
    gpu: tuple[str, ...]
    cpu: tuple[str, ...] = ()
    remove_on_cpu: tuple[str, ...] = ()


def installed(packages: Packages) -> Path | None:
    """The Python of the environment, that for a GPU first; ``None`` if there is none."""
    for wanted in (packages.gpu, packages.cpu):
        folder = _folder(packages, wanted)
        if wanted and (folder / DONE).exists():
            return folder / "bin" / "python"
    return None


def install(packages: Packages, *, cpu: bool = False) -> Path:
    """Makes the environment; returns its Python. What pip says goes to the terminal.

    Raises:
        RunError: A step failed; the next call begins anew.
    """
    on_cpu = bool(packages.cpu) and (cpu or shutil.which("nvidia-smi") is None)
    wanted = packages.cpu if on_cpu else packages.gpu
    folder = _folder(packages, wanted)
    python = folder / "bin" / "python"
    if (folder / DONE).exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([str(python), "-m", "pip", "install", *wanted])
    if on_cpu and packages.remove_on_cpu:
        _run([str(python), "-m", "pip", "uninstall", "-y", *packages.remove_on_cpu])
    (folder / DONE).touch()
    return python


def _folder(packages: Packages, wanted: Sequence[str]) -> Path:
    """Its path: another version is another environment."""
    return cache_folder("engines", (), packages.name, *wanted)


def _run(command: list[str]) -> None:
    if subprocess.run(command).returncode:
        raise RunError(f"{' '.join(command)} failed; what it said stands above")
