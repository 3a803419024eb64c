"""The run folder: what a run leaves behind, written and read here and nowhere else.

recipe.json                  the resolved recipe
contents.json                model, adapter, code and data that it began with, by content
metrics.jsonl                one line an iteration; line 0 is the start
trajectories/000001.jsonl.gz one group a line
checkpoints/                 see ``checkpoint``
result.json, curve.png       the report at the end, see ``report``
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from agent_r1.config import ConfigError
from agent_r1.recipe import Recipe
from agent_r1.types import Group

_GROUP = TypeAdapter(Group)


class RunFolder:
    """A run on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path | str, recipe: Recipe) -> RunFolder:
        """A new run; a folder that holds one already is never written over."""
        cls.must_be_free(path)
        run = cls(path)
        run.path.mkdir(parents=True, exist_ok=True)
        write_atomically(run.path / "recipe.json", recipe.model_dump_json(indent=2) + "\n")
        return run

    @staticmethod
    def must_be_free(path: Path | str) -> None:
        """Raises ``ConfigError`` if the folder holds a run."""
        if Path(path).is_file():
            raise ConfigError(f"{path} is a file; name a folder with --run")
        if (Path(path) / "recipe.json").exists():
            raise ConfigError(
                f"{path} holds a run already; continue it with --resume {path}, "
                "or name another folder with --run"
            )

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        run = cls(path)
        if not (run.path / "recipe.json").exists():
            raise ConfigError(f"{run.path} holds no run: there is no recipe.json")
        return run

    def recipe_data(self) -> dict[str, Any]:
        """The resolved recipe as plain data."""
        data: dict[str, Any] = json.loads((self.path / "recipe.json").read_text())
        return data

    def write_contents(self, contents: dict[str, str]) -> None:
        """Notes what the run starts from, by content."""
        write_atomically(self.path / "contents.json", json.dumps(contents, indent=2) + "\n")

    def contents(self) -> dict[str, str]:
        """What the run started from; empty for a run that has not noted it."""
        file = self.path / "contents.json"
        contents: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        return contents

    def remove_unused(self) -> None:
        """Takes away a new run that came to nothing before its first checkpoint and metrics."""
        if any((self.path / name).exists() for name in ("checkpoints", "trajectories")):
            return
        if self.metrics():
            return
        for name in ("recipe.json", "contents.json", "metrics.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's files are in it
            self.path.rmdir()

    def lengthen(self, recipe: Recipe, iterations: int) -> Recipe:
        """The recipe with another number of iterations, written into the run."""
        done = max((row["iteration"] for row in self.metrics()), default=0)
        if iterations <= done:
            raise ConfigError(
                f"train.iterations = {iterations}: {self.path} has done {done} already; name more"
            )
        train = recipe.train.model_copy(update={"iterations": iterations})
        recipe = recipe.model_copy(update={"train": train})
        write_atomically(self.path / "recipe.json", recipe.model_dump_json(indent=2) + "\n")
        return recipe

    def append_metrics(self, row: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All rows so far; a last line cut off by a kill is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def write_trajectories(self, iteration: int, groups: list[Group]) -> None:
        path = self._trajectories(iteration)
        path.parent.mkdir(exist_ok=True)
        lines = "".join(
            json.dumps(_GROUP.dump_python(group, mode="json")) + "\n" for group in groups
        )
        write_atomically(path, gzip.compress(lines.encode(), compresslevel=5, mtime=0))

    def trajectories(self, iteration: int) -> Iterator[Group]:
        """The groups of an iteration, as they were trained on."""
        for line in gzip.decompress(self._trajectories(iteration).read_bytes()).splitlines():
            yield _GROUP.validate_python(json.loads(line))

    def trajectory_iterations(self) -> list[int]:
        """The iterations whose trajectories are stored, in order."""
        files = (self.path / "trajectories").glob("*.jsonl.gz")
        return sorted(int(path.name.split(".")[0]) for path in files)

    def forget_after(self, iteration: int) -> None:
        """Drops what came after the checkpoint that is resumed from."""
        rows = [row for row in self.metrics() if row["iteration"] <= iteration]
        write_atomically(
            self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
        )
        for path in (self.path / "trajectories").glob("*.jsonl.gz"):
            if int(path.name.split(".")[0]) > iteration:
                path.unlink()

    def _trajectories(self, iteration: int) -> Path:
        return self.path / "trajectories" / f"{iteration:06d}.jsonl.gz"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Readers see the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
