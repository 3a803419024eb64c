"""Folders in the user's cache, built once: named by a hash of their inputs; complete or absent."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from agent_r1.errors import ConfigError


def cache_folder(kind: str, files: Sequence[Path] = (), *more: str) -> Path:
    """Path of the cache folder for data built from these files and ``more``."""
    digest = hashlib.blake2b("\n".join(more).encode(), digest_size=16)
    for path in files:
        if not path.is_file():
            raise ConfigError(f"there is no file {path}")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, hashlib.blake2b).digest())
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "agent_r1" / kind / digest.hexdigest()


def make_folder(target: Path, build: Callable[[Path], None]) -> Path:
    """Creates ``target`` with the files that ``build`` writes. If processes race, one wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        build(unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target
