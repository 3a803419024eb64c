"""The run folder: all files of a run, written and read here and nowhere else.

recipe.json                  the resolved recipe
contents.json                hashes of the model, adapter, code and data that it began with
metrics.jsonl                one line per iteration; line 0 is the start
trajectories/000001.jsonl.gz one group per line
checkpoints/                 see ``checkpoint``
result.json, curve.png       the report at the end, see ``report``
trackers/                    what trackers keep of the run
set-aside-N/                 damaged checkpoints and later files, moved here when the run went on
                             after iteration N
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, Json, ValidationError

from agent_r1.errors import ConfigError
from agent_r1.run.recipe import Recipe, load_recipe
from agent_r1.run.trajectories import read_groups, write_groups
from agent_r1.run.trust import allow, must_be_allowed
from agent_r1.types import Estimates, Group
from agent_r1.utils.durable import append, make_folder, must_be_file, write_atomically
from agent_r1.utils.run_files import (
    CHECKPOINTS,
    CONTENTS,
    LOCK,
    METRICS,
    RECIPE,
    TRACKERS,
    TRAJECTORIES,
)

if TYPE_CHECKING:
    from agent_r1.run.checkpoint import Checkpoints, State

MAX_JSON_BYTES = 1 << 26
"""Most bytes of a recipe or ``contents.json``."""


class Contents(BaseModel):
    """What a run started from.

    Attributes:
        model, adapter: Fingerprints of the weights; ``None`` where there are none, or unknown.
        files: Path to fingerprint of the user's own code and data.
        recipe: A copy of ``recipe.json``.
    """

    model: str | None = None
    adapter: str | None = None
    files: dict[str, str] = {}
    recipe: dict[str, Any] | Json[dict[str, Any]] = {}


class RunFolder:
    """A run on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path | str, recipe: Recipe) -> RunFolder:
        """Creates a run; a folder that already holds one is never overwritten."""
        cls.must_be_free(path)
        run = cls(path)
        make_folder(run.path)
        run._write_recipe(recipe)
        return run

    @staticmethod
    def must_be_free(path: Path | str) -> None:
        """Raises ``ConfigError`` if the folder holds a run."""
        if Path(path).is_file():
            raise ConfigError(f"{path} is a file; name a folder with --run")
        parts = (RECIPE, CONTENTS, METRICS, CHECKPOINTS, TRAJECTORIES)
        if any((Path(path) / part).exists() for part in parts):
            raise ConfigError(
                f"{path} holds a run already; continue it with --resume {path}, "
                "or name another folder with --run"
            )

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        run = cls(path)
        if not (run.path / RECIPE).exists():
            raise ConfigError(f"{run.path} holds no run: there is no recipe.json")
        return run

    def must_hold_its_parts(self) -> None:
        """Raises ``ConfigError`` if files would be written outside of the run."""
        for part in (self.path / name for name in (CHECKPOINTS, TRAJECTORIES, TRACKERS)):
            if part.is_symlink():
                raise ConfigError(
                    f"{part} is a link: the run would go on in {part.resolve()}; if that is what "
                    "you want, repeat with --trust (in Python: trust=True)"
                )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the run against other processes.

        Raises:
            ConfigError: Another process works on it.
        """
        make_folder(self.path)
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0.3)  # somebody may just be asking whether it is locked
        except Timeout as error:
            raise ConfigError(f"another process is at work in {self.path}") from error
        except NotImplementedError:  # a file system without locks
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def is_running(self) -> bool:
        """Whether a process works on the run."""
        try:
            import fcntl  # not on Windows

            with (self.path / LOCK).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except (ImportError, OSError):
            return False
        return False

    def recipe_data(self) -> dict[str, Any]:
        """The resolved recipe as plain data; nothing that it names is loaded."""
        data = _read_json(self.path / RECIPE)
        if not isinstance(data, dict):
            raise ConfigError(f"{self.path / 'recipe.json'} holds no recipe but {data!r:.100}")
        return data

    def recipe(self, *, trust: bool = False) -> Recipe:
        """The recipe, checked, which loads the code that it names.

        Args:
            trust: Load code that a run from elsewhere names, and remember this permission.

        Raises:
            ConfigError: The run is from elsewhere, or the recipe cannot be used.
        """
        data, file = self.recipe_data(), self.path / RECIPE
        if trust:
            allow(data)
        else:
            must_be_allowed(data, file)
        return load_recipe(data, label=str(file))[0]

    def write_contents(self, contents: Contents) -> None:
        """Records what the run starts from, and a copy of its recipe."""
        contents = contents.model_copy(update={"recipe": self.recipe_data()})
        write_atomically(self.path / CONTENTS, contents.model_dump_json(indent=2) + "\n")

    def changed_settings(self) -> Iterator[tuple[str, Any, Any]]:
        """Keys of the recipe that were changed by hand, each with its old and its new value."""
        before = dict(flat_settings(self.contents().recipe))
        now = dict(flat_settings(self.recipe_data()))
        if not self.contents().recipe:
            return
        for key in sorted(before.keys() | now.keys()):
            old, new = before.get(key), now.get(key)
            if old != new and key not in ("train.iterations", "trackers"):
                yield key, old, new

    def contents(self) -> Contents:
        """Model, code and data at the start; empty for a run without a record."""
        file = self.path / CONTENTS
        try:
            return Contents.model_validate(_read_json(file) if file.exists() else {})
        except ValidationError as error:
            raise ConfigError(
                f"{file} holds something else than what the run began with: {error!s:.300}"
            ) from error

    def remove_unused(self) -> None:
        """Deletes the files of a new run that failed before its first checkpoint and metrics."""
        if any((self.path / name).exists() for name in (CHECKPOINTS, TRAJECTORIES)):
            return
        if self.metrics():
            return
        for name in (RECIPE, CONTENTS, METRICS):
            (self.path / name).unlink(missing_ok=True)
            (self.path / f".{name}.partial").unlink(missing_ok=True)
        (self.path / LOCK).unlink(missing_ok=True)
        shutil.rmtree(self.path / TRACKERS, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else's files are in it
            self.path.rmdir()

    def lengthen(self, recipe: Recipe, iterations: int) -> Recipe:
        """The recipe with another number of iterations."""
        if iterations <= (done := self._done()):
            raise ConfigError(
                f"train.iterations = {iterations}: {self.path} has done {done} already; name more"
            )
        train = recipe.train.model_copy(update={"iterations": iterations})
        return recipe.model_copy(update={"train": train})

    def keep(self, recipe: Recipe) -> None:
        """Writes a recipe that was lengthened."""
        if json.loads(recipe.model_dump_json()) != self.recipe_data():
            self._write_recipe(recipe)

    def append_metrics(self, row: dict[str, Any]) -> None:
        append(self.path / METRICS, json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All rows so far; a last line cut off by a kill is left out."""
        return [row for _, row in self._rows()]

    def metrics_sum(self, iteration: int) -> int:
        """A checksum of the rows up to an iteration, as they stand in the file."""
        return zlib.crc32(
            b"".join(line for line, row in self._rows() if row["iteration"] <= iteration)
        )

    def _rows(self) -> list[tuple[bytes, dict[str, Any]]]:
        path = self.path / METRICS
        must_be_file(path)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                figures = row.get("figures", {})
                if type(row["iteration"]) is not int or not isinstance(figures, dict):
                    raise TypeError("iteration must be a number and figures a table")
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    continue
                raise ConfigError(
                    f"{path}, line {number}: no row of metrics ({error!r:.200}); take the line out "
                    "if the file was damaged"
                ) from error
            rows.append((line.removesuffix(b"\n") + b"\n", row))  # an editor may have cut it
        return rows

    def write_trajectories(self, iteration: int, groups: list[Group], known: Estimates) -> None:
        """Stores the groups of an iteration and what is known of their steps."""
        write_groups(self.trajectories_file(iteration), groups, known)

    def trajectories(self, iteration: int) -> Iterator[Group]:
        """The groups of an iteration, as they were trained on."""
        return (group for group, _ in self.estimated(iteration))

    def estimated(self, iteration: int) -> Iterator[tuple[Group, Estimates]]:
        """The groups of an iteration, each with what was known of its steps."""
        return read_groups(self.trajectories_file(iteration))

    def trajectory_iterations(self) -> list[int]:
        """The iterations whose trajectories are stored, in order."""
        names = (path.name for path in (self.path / TRAJECTORIES).glob("*.jsonl.gz"))
        return sorted(
            int(name.split(".")[0])
            for name in names
            if re.fullmatch(r"[0-9]{6,15}\.jsonl\.gz", name)
        )

    def must_go_on(self, checkpoints: Checkpoints) -> None:
        """Raises ``ConfigError`` if iterations were done but no whole checkpoint is left: starting
        again would overwrite their files.
        """
        if checkpoints.last is not None:
            return
        done = self._done()
        if done or checkpoints.damaged:
            reasons = [f"{path.name}: {why}" for path, why in checkpoints.damaged.items()]
            raise ConfigError(
                f"{self.path} has done {done} iterations, and there is no whole checkpoint to go "
                f"on from ({'; '.join(reasons) or 'checkpoints/ has none'}). Nothing was changed: "
                "put a checkpoint back, or begin another run"
            )

    def rewind(self, checkpoints: Checkpoints, state: State, *, every: int) -> list[str]:
        """Goes back to the last checkpoint. Files of later iterations are dropped; if a checkpoint
        is damaged or missing, they are set aside.

        Args:
            checkpoints: Those of this run.
            state: State of the last whole one.
            every: Iterations between checkpoints, by the recipe.

        Returns:
            Warnings for the user.
        """
        iteration, done = state.iteration, self._done()
        lines = [
            f"checkpoint {path.name} is damaged ({why}): going on from that of iteration "
            f"{iteration}"
            for path, why in checkpoints.damaged.items()
        ]
        if not lines and done - iteration > every:
            lines = [f"checkpoints after iteration {iteration} are missing: going on from there"]
        aside = self._unused(f"set-aside-{iteration}") if lines else None
        self.forget_after(iteration, aside)
        if aside is not None:  # last: after a kill before it, all of this begins anew
            checkpoints.put_aside(aside)
            lines[-1] += f"; what came after it is kept in {aside}"
        if self.metrics_sum(iteration) != state.metrics:
            lines.append(
                f"{self.path / 'metrics.jsonl'} is not as it was written: rows are missing, or "
                "changed, or there more than once"
            )
        if missing := {*range(1, iteration + 1)} - {*self.trajectory_iterations()}:
            lines.append(f"trajectories of {len(missing)} iterations are missing")
        return lines

    def forget_after(self, iteration: int, aside: Path | None = None) -> None:
        """Drops metrics and trajectories after ``iteration``, which will be made again; with
        ``aside``, they are kept there.
        """
        rows, file = self.metrics(), self.path / METRICS
        later = [n for n in self.trajectory_iterations() if n > iteration]
        if aside is not None and (later or any(row["iteration"] > iteration for row in rows)):
            make_folder(aside)
            write_atomically(aside / file.name, file.read_bytes() if file.exists() else b"")
        for path in map(self.trajectories_file, later):
            if aside is not None:
                shutil.move(path, aside / path.name)
            else:
                path.unlink()
        kept = [row for row in rows if row["iteration"] <= iteration]
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in kept))

    def _done(self) -> int:
        """The last iteration that left any file."""
        rows = [int(row["iteration"]) for row in self.metrics()]
        return max([0, *rows, *self.trajectory_iterations()])

    def _unused(self, name: str) -> Path:
        """A folder in the run that is not there yet."""
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(path for n in names if not (path := self.path / n).exists())

    def _write_recipe(self, recipe: Recipe) -> None:
        text = recipe.model_dump_json(indent=2) + "\n"
        allow(json.loads(text))
        write_atomically(self.path / RECIPE, text)

    def trajectories_file(self, iteration: int) -> Path:
        """The file of an iteration's trajectories."""
        return self.path / TRAJECTORIES / f"{iteration:06d}.jsonl.gz"


def flat_settings(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested tables, by their dotted keys."""
    if not isinstance(data, dict) or not data:
        yield key, data
        return
    for name, value in data.items():
        yield from flat_settings(value, f"{key}.{name}".lstrip("."))


def must_be_sayable(path: Path) -> None:
    """Raises ``ConfigError`` for a name that is no text: it could be neither stored nor printed."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{str(path)!a}: the name is no UTF-8; choose another folder") from error


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _read_json(file: Path) -> Any:
    must_be_file(file)
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
        return json.loads(text, parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error!r:.300}") from error
