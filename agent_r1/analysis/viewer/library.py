"""The runs in some folders: where they are, how they stand, in what their recipes differ."""

from __future__ import annotations

import json
import os
import statistics
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agent_r1.analysis.episode_index import EpisodeIndex
from agent_r1.errors import ConfigError
from agent_r1.run.figures import flat_figures
from agent_r1.run.folder import RunFolder, flat_settings
from agent_r1.utils.run_files import METRICS, RECIPE, RESULT, is_run
from agent_r1.utils.text import clean

DEPTH = 4
"""Levels below a given folder where runs are looked for."""
POINTS = 60
"""Most points of a spark line."""
MAX_RESULT_BYTES = 1 << 24


class View:
    """One run as the window shows it. Files are read again once they have changed."""

    def __init__(self, name: str, run: RunFolder) -> None:
        self.name, self.run = name, run
        self._lock = threading.Lock()
        self._stamp: object = None
        self._rows: list[dict[str, Any]] = []
        self._flat: list[dict[str, float]] = []
        self._recipe: tuple[object, dict[str, Any], str] = (None, {}, "")
        self._problem = ""
        self._index: EpisodeIndex | None = None

    @property
    def index(self) -> EpisodeIndex:
        """The index of the run's episodes; ``read_on`` reads them."""
        with self._lock:
            if self._index is None:
                self._index = EpisodeIndex(self.run)
            return self._index

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, float]], str]:
        """The rows of metrics, their flat figures, and what is wrong with them."""
        with self._lock:
            if (stamp := _stamp_of(self.run.path / METRICS)) != self._stamp:
                try:
                    self._rows, self._problem = self.run.metrics(), ""
                except (ConfigError, OSError) as error:
                    self._rows, self._problem = [], str(error)
                self._flat = [flat_figures(row) for row in self._rows]
                self._stamp = stamp
            return self._rows, self._flat, self._problem

    def recipe(self) -> tuple[dict[str, Any], str]:
        """The recipe as flat keys, and what is wrong with it."""
        if (stamp := _stamp_of(self.run.path / RECIPE)) != self._recipe[0]:
            try:
                self._recipe = stamp, dict(flat_settings(self.run.recipe_data())), ""
            except (ConfigError, OSError) as error:
                self._recipe = stamp, {}, str(error)
        return self._recipe[1:]

    def result(self) -> Any:
        """``result.json``, or ``None``."""
        file = self.run.path / RESULT
        try:
            if file.is_file() and file.stat().st_size < MAX_RESULT_BYTES:
                return json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return None

    def curves(self) -> dict[str, Any]:
        """Figures by name, each with one value for each row (``None`` where it was not measured),
        and for each row its iteration and the seconds of training up to it.
        """
        rows, flat, _ = self.rows()
        names = sorted({name for figures in flat for name in figures})
        seconds, total = [], 0.0
        for figures in flat:
            total += figures.get("seconds/total", 0.0)
            seconds.append(total)
        return {
            "iteration": [row["iteration"] for row in rows],
            "seconds": seconds,
            "figures": {name: [figures.get(name) for figures in flat] for name in names},
        }

    def broken(self, problem: str) -> dict[str, Any]:
        """The summary of a run that cannot be summed up."""
        known = {"name": self.name, "path": str(self.run.path), "problem": problem}
        names = "iterations success validation best seconds_left updated algorithm env model"
        none = dict.fromkeys(names.split())
        return {**none, **known, "state": "broken", "iteration": 0, "seconds": 0.0, "spark": []}

    def summary(self) -> dict[str, Any]:
        """What the list of runs shows."""
        rows, flat, wrong = self.rows()
        recipe, wrong_recipe = self.recipe()
        planned = recipe.get("train.iterations")
        planned = planned if isinstance(planned, int) else None
        done = int(rows[-1]["iteration"]) if rows else 0
        success = [f["success"] for f in flat if "success" in f]
        validated = [f["validation/success"] for f in flat if "validation/success" in f]
        spent = [f["seconds/total"] for f in flat[-10:] if "seconds/total" in f]
        state = "stopped"
        if wrong or wrong_recipe:
            state = "broken"
        elif self.run.is_running():
            state = "running"
        elif planned is not None and done >= planned:
            state = "finished"
        elif not rows:
            state = "empty"
        left = None
        if state == "running" and planned is not None and spent:
            left = max(0, planned - done) * statistics.fmean(spent)
        return {
            "name": self.name,
            "path": str(self.run.path),
            "state": state,
            "problem": wrong or wrong_recipe,
            "iteration": done,
            "iterations": planned,
            "success": success[-1] if success else None,
            "validation": validated[-1] if validated else None,
            "best": max(validated, default=None),
            "spark": _thinned(success or [f["loss"] for f in flat if "loss" in f]),
            "seconds_left": left,
            "seconds": sum(f.get("seconds/total", 0.0) for f in flat),
            "updated": _time_of(self.run.path / METRICS) or _time_of(self.run.path / RECIPE),
            "algorithm": recipe.get("algorithm.name"),
            "env": recipe.get("env.name"),
            "model": recipe.get("model.path"),
        }


class Library:
    """All runs in the given folders, by names that hold no path: nothing else is ever opened."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        self._lock = threading.Lock()
        self._views: dict[str, View] = {}

    def views(self) -> list[View]:
        """The runs that are there now."""
        found: dict[str, Path] = {}
        for folder in self.folders:
            for path in _runs_in(folder, DEPTH):
                name = "/".join(path.relative_to(folder).parts) or path.resolve().name
                number, unique = 2, name
                while unique in found and found[unique].resolve() != path.resolve():
                    unique, number = f"{name} ({number})", number + 1
                found[unique] = path
        with self._lock:
            for name in self._views.keys() - found.keys():
                del self._views[name]
            for name, path in found.items():
                if name not in self._views or self._views[name].run.path != path:
                    self._views[name] = View(name, RunFolder(path))
            return [self._views[name] for name in sorted(self._views)]

    def view(self, name: str) -> View | None:
        """A run by its name."""
        with self._lock:
            found = self._views.get(name)
        if found is None:
            found = next((view for view in self.views() if view.name == name), None)
        return found

    def differences(self, views: Sequence[View]) -> dict[str, dict[str, Any]]:
        """The keys in which recipes differ: by key, the value of each run that has it."""
        recipes = {view.name: view.recipe()[0] for view in views}
        recipes = {name: recipe for name, recipe in recipes.items() if recipe}
        keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
        table = {key: {name: recipe.get(key) for name, recipe in recipes.items()} for key in keys}
        return {
            key: values
            for key, values in sorted(table.items(), key=lambda pair: not pair[0].endswith(".name"))
            if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1
        }


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    """The runs below a folder. Links to folders are not followed; folders that may not be read,
    and those whose name is no text, are left out.
    """
    try:
        if is_run(folder) or (folder / METRICS).exists():
            yield folder
            return
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        is_folder = entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        if depth and is_folder and clean(entry.name) == entry.name:
            yield from _runs_in(Path(entry.path), depth - 1)


def _stamp_of(file: Path) -> object:
    try:
        found = file.stat()
    except OSError:
        return "gone"
    return found.st_size, found.st_mtime_ns


def _time_of(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def _thinned(values: Sequence[float]) -> list[float]:
    """At most ``POINTS`` of the values, the last among them."""
    if len(values) <= POINTS:
        return list(values)
    last = len(values) - 1
    return [values[round(number * last / (POINTS - 1))] for number in range(POINTS)]
