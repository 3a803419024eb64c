"""Runs that are killed, or whose machine loses its power, and go on."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torture.common import Tally, cli, forked, numbers, project, scratch

OPERATIONS = ("replace", "rename", "fsync", "unlink", "symlink", "mkdir", "rmdir")
"""Of ``os``: what changes a disk."""


def _before(name: str, hook: Callable[..., None]) -> None:
    """Has ``os.<name>`` call ``hook`` with its own arguments first."""
    real = getattr(os, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        hook(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(os, name, wrapped)


def _before_operations(hook: Callable[[], None]) -> None:
    """Calls ``hook`` before each operation."""
    for name in OPERATIONS:
        _before(name, lambda *args, **kwargs: hook())


def _train(arguments: list[Any], hook: Callable[[], None] | None = None) -> Callable[[], int]:
    def work() -> int:
        from agent_r1.cli import main

        if hook is not None:
            _before_operations(hook)
        return main([str(a) for a in arguments])

    return work


def _killing(number: int) -> Callable[[], None]:
    left = [number]

    def hook() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def _undisturbed(folder: Path) -> tuple[Path, Any]:
    """A small recipe, and the numbers of a run of it that nothing happens to."""
    recipe = project(folder / "p")
    ended = cli("train", recipe, "--run", folder / "whole")
    assert ended.code == 0, ended.text
    return recipe, numbers(folder / "whole")


def kills(tally: Tally, count: int, seed: int) -> None:
    """Chains of up to six kills, each before a random file operation or at a random moment; the
    end must be that of the run that nobody killed.
    """
    rng = random.Random(seed)
    with scratch() as folder:
        recipe, expected = _undisturbed(folder)
        done = 0
        while done < count:
            run = folder / "run"
            shutil.rmtree(run, ignore_errors=True)
            chain: list[Any] = []
            for _ in range(min(rng.randint(1, 6), count - done)):
                begun = (run / "recipe.json").exists()
                arguments = ["train", "--resume", run] if begun else ["train", recipe, "--run", run]
                if rng.random() < 0.75:
                    number = rng.randrange(160)
                    chain.append(f"before operation {number}")
                    ended = forked(_train(arguments, _killing(number)))
                else:
                    seconds = rng.uniform(0.05, 1.5)
                    chain.append(f"after {seconds:.2f} s")
                    ended = forked(_train(arguments), seconds)
                done += 1
                if ended.code not in (None, 0, -9):
                    tally.note("kills", "traceback", chain, ended.text)
                    break
            else:
                begun = (run / "recipe.json").exists()
                arguments = ["train", "--resume", run] if begun else ["train", recipe, "--run", run]
                ended = cli(*arguments)
                same = ended.code == 0 and numbers(run) == expected
                verdict = "accepted" if same else "silent" if ended.code == 0 else ended.verdict
                for _ in chain[:-1]:
                    tally.note("kills", "accepted", chain)
                tally.note("kills", verdict, chain, ended.text)


class Disk:
    """What of a folder would be there after a power cut: contents as of their last fsync, names as
    of the last fsync of their folder, or anything later of either. By inode, since files and
    folders are renamed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, tuple[str, int]]] = {}
        self._retired = 0

    def synced(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.startswith(str(self.root)):
            return
        inode = os.fstat(descriptor).st_ino
        if os.path.isdir(path):
            self.names[inode] = _listing(path)
        else:
            with open(path, "rb") as file:
                self.contents[inode] = file.read()

    def gone(self, path: Any, dir_fd: int | None = None) -> None:
        """An inode's number may be given to another file."""
        try:
            inode = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino
        except OSError:
            return
        self._retired -= 1
        for table in (self.contents, self.names):
            if inode in table:
                table[self._retired] = table.pop(inode)  # type: ignore[index, assignment]
        for listing in self.names.values():
            for name, (kind, number) in listing.items():
                if number == inode:
                    listing[name] = (kind, self._retired)

    def write_to(self, target: Path, rng: random.Random) -> None:
        """The folder as it may be found."""
        if not self.root.is_dir():
            return
        there = {path.stat().st_ino: path for path in (self.root, *self.root.rglob("*"))
                 if path.is_dir() and not path.is_symlink()}  # fmt: skip
        self._write(self.root.stat().st_ino, there, target, rng)

    def _write(self, inode: int, there: dict[int, Path], target: Path, rng: random.Random) -> None:
        target.mkdir(parents=True, exist_ok=True)
        listing = self.names.get(inode, {})
        if inode in there and rng.random() < 0.4:
            listing = _listing(str(there[inode]))
        for name, (kind, number) in listing.items():
            if kind == "dir":
                self._write(number, there, target / name, rng)
            elif kind == "file":
                kept = self.contents.get(number)
                lost = b"" if rng.random() < 0.5 else bytes(rng.randrange(4096))
                (target / name).write_bytes(lost if kept is None else kept)
            else:
                (target / name).symlink_to(kind)


def _listing(path: str) -> dict[str, tuple[str, int]]:
    """Names in a folder: what each is (of a link, where it points) and its inode."""
    listing = {}
    for entry in os.scandir(path):
        kind = "dir" if entry.is_dir(follow_symlinks=False) else "file"
        if entry.is_symlink():
            kind = os.readlink(entry.path)
        listing[entry.name] = (kind, entry.inode())
    return listing


def _cut(
    arguments: list[Any], root: Path, found: Path, number: int, seed: int
) -> Callable[[], int]:
    """A run that loses its power before the operation of that number; what is then on the disk is
    written to ``found``.
    """

    def work() -> int:
        from agent_r1.cli import main

        disk = Disk(root)
        left = [number]
        real_fsync = os.fsync

        def fsync(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            real_fsync(descriptor)
            disk.synced(descriptor)

        def moved(source: Any, target: Any, **kwargs: Any) -> None:
            disk.gone(target)

        def removed(path: Any, *, dir_fd: int | None = None) -> None:
            disk.gone(path, dir_fd)

        os.fsync = fsync
        for name in ("unlink", "remove", "rmdir"):
            _before(name, removed)
        for name in ("replace", "rename"):
            _before(name, moved)

        def hook() -> None:
            left[0] -= 1
            if left[0] == -1:  # what follows are operations of this machine's own
                disk.write_to(found, random.Random(seed))
                os.kill(os.getpid(), signal.SIGKILL)

        _before_operations(hook)
        return main([str(a) for a in arguments])

    return work


def power_cuts(tally: Tally, count: int, seed: int) -> None:
    """What was not on the disk is lost; the run goes on from there to the end of the other one.
    Before anything of it is on the disk, there may be no run.
    """
    rng = random.Random(seed)
    with scratch() as folder:
        recipe, expected = _undisturbed(folder)
        for case in range(count):
            run, found = folder / f"run{case}", folder / f"found{case}"
            number, chance = rng.randrange(5, 160), rng.randrange(2**31)
            ended = forked(_cut(["train", recipe, "--run", run], run, found, number, chance))
            note = {"operation": number, "chance": chance}
            if ended.code != -9:  # it was at its end before, or this machine has a fault
                ended.code = 0 if ended.code == 0 else 70
                tally.note("power cuts", ended.verdict, note, ended.text)
                continue
            shutil.rmtree(run, ignore_errors=True)
            if found.exists():
                found.rename(run)
            if not (run / "recipe.json").exists():
                ended = cli("train", recipe, "--run", run)
            else:
                ended = cli("train", "--resume", run)
            same = ended.code == 0 and numbers(run) == expected
            verdict = "accepted" if same else "silent" if ended.code == 0 else ended.verdict
            if verdict == "clear" and number > 40:
                verdict = "silent"  # by then there is a whole checkpoint
            tally.note("power cuts", verdict, note, ended.text)
            shutil.rmtree(run, ignore_errors=True)
