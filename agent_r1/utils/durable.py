"""Files that survive a kill and a power cut: written whole, synced to disk before they are renamed,
and checked for damage by their checksums.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from agent_r1.errors import ConfigError

SEAL = "checksums.json"
"""Written last into a folder: size and CRC-32 of every file in it."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Readers see the old file or the new one, never a part, even after a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    with _named(path):
        partial.unlink(missing_ok=True)  # left by a kill; or a link, which must not be followed
        with partial.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    sync_folder(path.parent)


def append(path: Path, line: str) -> None:
    """Adds a line and returns when it is on the disk."""
    new = not path.exists()
    with _named(path), open(path, "a", opener=_no_link) as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(path.parent)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds this file's name to a disk error that has none (disk full)."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents; their names are synced to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder to disk, where the file system can do so."""
    with contextlib.suppress(OSError):  # object stores and Windows shares cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def seal(folder: Path) -> None:
    """Records size and checksum of every file and syncs all to disk; the folder can be renamed
    then.
    """
    sums: dict[str, list[int]] = {}
    for path in _files(folder):
        sums[path.relative_to(folder).as_posix()] = _sum(path, sync=True)
    write_atomically(folder / SEAL, json.dumps(sums, indent=2) + "\n")
    for path in {path.parent for path in _files(folder)}:
        sync_folder(path)


def why_damaged(folder: Path, *, thorough: bool = True) -> str | None:
    """What is wrong with a folder that was sealed, or ``None``. ``thorough``: contents are
    compared, not only sizes.
    """
    try:
        sums = json.loads((folder / SEAL).read_text())
    except FileNotFoundError:
        return f"it has no {SEAL}: made by an older version, or not copied whole"
    except (OSError, RecursionError, ValueError) as error:
        return f"its {SEAL} cannot be read ({error})"
    if not sums or not isinstance(sums, dict):
        return f"its {SEAL} is no table"
    for name, expected in sums.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected[0]:
                return f"{name} has {size:,} bytes, not {expected[0]:,}"
            if thorough and _sum(path) != expected:
                return f"{name} is not as it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, LookupError, TypeError, ValueError) as error:
            return f"{name} cannot be read ({error})"
    return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL)


def _sum(path: Path, *, sync: bool = False) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
        if sync:
            os.fsync(file.fileno())
    return [size, crc]


def must_be_file(path: Path) -> None:
    """Raises ``ConfigError`` for a folder, or a pipe, whose reading may never end."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no file")
