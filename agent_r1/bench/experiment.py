"""An experiment: which arms are compared, on which sets, with which seeds. One TOML file, no torch.
A ``file.py:Class`` in it is looked up from its folder.

recipe = "hopworld"                 # shared by all runs: a built-in recipe, or a file
seeds = [0, 1, 2]

[override]                          # of the recipe, for all runs
train.iterations = 20

[[arm]]                             # what is compared
name = "Base Tool Call"
train = false

[[arm]]
name = "RLOO"
override = { algorithm = "rloo" }

[[set]]                             # what the trained agents are tested on
name = "3 hops"
tasks = 300
override = { env.test_hops = [3] }
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from agent_r1.config.overrides import load_toml
from agent_r1.config.overrides import override as put
from agent_r1.config.section import Section, explain, keys_at, nearest
from agent_r1.errors import ConfigError
from agent_r1.run.recipe import REGISTRIES, Recipe, load_recipe

Override = dict[str, Any]
"""Nested sections and keys, as in a recipe."""


class Start(Section):
    """Where training starts from: a model, a kind of task, or both.

    Attributes:
        arm: Overrides by the name of an arm, for this start only.
    """

    name: str = ""
    override: Override = Field(default_factory=dict)
    arm: dict[str, Override] = Field(default_factory=dict)


class Arm(Section):
    """One way to train, or with ``train = false`` a baseline, tested without training.

    Attributes:
        against: Another arm, whose speed of learning is compared with this one's.
    """

    name: str
    train: bool = True
    against: str | None = None
    override: Override = Field(default_factory=dict)


TESTED_BY = ("env", "limits", "renderer", "engine", "evaluation")
"""Sections of a recipe that a test depends on."""


class TaskSet(Section):
    """Tasks of the test split. Overrides reach the test, not the training.

    Attributes:
        tasks: Number of tasks.
        temperature: For sampling; by default that of training, 0 is greedy.
        metric: ``success``, or a metric of the outcome.
    """

    name: str
    tasks: int = Field(300, ge=1)
    temperature: float | None = Field(None, ge=0)
    metric: str = "success"
    override: Override = Field(default_factory=dict)

    @model_validator(mode="after")
    def _tests_alone(self) -> Self:
        for section in self.override:
            if section not in TESTED_BY:
                raise ValueError(
                    f"override.{section} has no effect on a test; what has: {', '.join(TESTED_BY)}"
                )
        return self


class Pair(Section):
    """Two arms compared question by question, on all the sets named together.

    Attributes:
        metrics: The environment's metrics to show, one per row; by default the sets' own.
    """

    arm: str
    against: str
    sets: tuple[str, ...] = Field(min_length=1)
    metrics: tuple[str, ...] = ()


class Quick(Section):
    """Changes by ``--quick``: a short form that only shows that the experiment works. Its
    overrides come last, over those of starts and arms.
    """

    seeds: tuple[int, ...] = (0,)
    tasks: int = Field(8, ge=1)
    override: Override = Field(default_factory=dict)


class Speed(Section):
    """How the speed of learning is measured, for arms that set ``against``.

    Attributes:
        share: Share of the better arm's final success that is to be reached.
        window: Iterations that a curve is averaged over, the present and those before.
    """

    share: float = Field(0.9, gt=0, le=1)
    window: int = Field(5, ge=1)


class Experiment(Section):
    """See the module's docstring.

    Attributes:
        columns: Metrics of the outcome that the table shows, the first with its interval; by
            default that of each set alone.
        pair: Arms whose difference is shown with an interval.
    """

    recipe: str
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    override: Override = Field(default_factory=dict)
    start: tuple[Start, ...] = (Start(),)
    arm: tuple[Arm, ...] = Field(min_length=1)
    set: tuple[TaskSet, ...] = ()
    columns: tuple[str, ...] = ()
    pair: tuple[Pair, ...] = ()
    speed: Speed = Speed()
    quick: Quick | None = None

    @model_validator(mode="after")
    def _names(self) -> Self:
        for what in ("start", "arm", "set"):
            names = [item.name for item in getattr(self, what)]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{what}: the name {sorted(twice)[0]!r} is given twice")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}: one stands there twice")
        for start in self.start:
            if unknown := start.arm.keys() - {arm.name for arm in self.arm}:
                raise ValueError(f"start {start.name!r}: there is no arm {sorted(unknown)[0]!r}")
        for pair in self.pair:
            for what, name in (
                ("arm", pair.arm),
                ("arm", pair.against),
                *(("set", s) for s in pair.sets),
            ):
                known = [item.name for item in getattr(self, what)]
                if name not in known:
                    raise ValueError(f"pair: there is no {what} {name!r}{nearest(name, known)}")
            metrics = {s.metric for s in self.set if s.name in pair.sets}
            if len(metrics) > 1 and not pair.metrics:
                raise ValueError(f"pair: its sets have different metrics: {sorted(metrics)}")
        if self.columns and not self.set:
            raise ValueError(f"columns = {list(self.columns)}: there is no set to show them of")
        trained = [arm.name for arm in self.arm if arm.train]
        for arm in self.arm:
            if arm.against is not None and not (arm.train and arm.against in trained):
                raise ValueError(
                    f"arm {arm.name!r}: against = {arm.against!r}, but the trained arms are "
                    f"{', '.join(trained)}"
                )
        return self

    def quicker(self) -> Experiment:
        """The form that ``--quick`` runs."""
        form = self.quick
        if form is None:
            raise ConfigError("there is no section [quick] that would say what --quick changes")

        def quick(item: Any) -> Any:
            override = _merged(item.override, form.override)
            return item.model_copy(update={"override": override})

        update = {
            "seeds": form.seeds,
            "set": tuple(s.model_copy(update={"tasks": form.tasks}) for s in self.set),
            "arm": tuple(map(quick, self.arm)),
            "start": tuple(start.model_copy(update={"arm": {}}) for start in self.start),
        }
        return self.model_copy(update=update)


@dataclass(frozen=True)
class Job:
    """One run: an arm from a start with a seed. ``sets`` are the recipes that it is tested by."""

    start: str
    arm: str
    seed: int
    train: bool
    recipe: Recipe
    sets: tuple[tuple[TaskSet, Recipe], ...]

    @property
    def folder(self) -> str:
        """Name of the run folder: the same in every experiment that gives start and arm the same
        names and settings.
        """
        words = re.sub(r"[^a-z0-9+]+", "-", f"{self.start} {self.arm}".lower()).strip("-")
        return f"{words}-s{self.seed}-{digest(self.recipe, self.train)}"


def digest(recipe: Recipe, *more: object) -> str:
    """Hash (8 characters) of the settings, and of the content of the user's own files:
    weights, and code that the recipe names as ``file.py:Class``.
    """
    text = recipe.model_dump_json() + repr(more)
    files = _weights(recipe.model.path)
    if recipe.model.lora and recipe.model.lora.start:
        files += _weights(recipe.model.lora.start)
    names = [getattr(recipe, section).name for section in REGISTRIES]
    files += [Path(name.partition(":")[0]) for name in names if ".py:" in name]
    for file in files:
        text += _fingerprint(file, file.stat().st_mtime_ns)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _weights(folder: str) -> list[Path]:
    """The files with the weights of a model, an adapter, or what a run trained."""
    path = Path(folder).expanduser()
    return sorted([*path.glob("*.safetensors"), *path.glob("checkpoints/best/*.safetensors")])


@functools.lru_cache(maxsize=64)
def _fingerprint(file: Path, changed: int) -> str:
    """Hash of a file's content. ``changed``: time of the last change, part of the cache key."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def load_experiment(
    path: Path, *, quick: bool = False, overrides: Sequence[tuple[str, Any]] = ()
) -> tuple[Experiment, list[Job]]:
    """A checked experiment and its jobs, every recipe checked, too.

    Args:
        path: The TOML file.
        quick: Take the short form in the file.
        overrides: Dotted keys and values of the recipe, for all runs; those of starts, arms and
            sets go over them.

    Raises:
        ConfigError: What is wrong, where, and how to mend it.
    """
    data = load_toml(path)
    for key, value in overrides:
        put(data.setdefault("override", {}), key, value)
    try:
        experiment = Experiment.model_validate(data)
    except ValidationError as error:
        raise explain(error, str(path), lambda at: keys_at(Experiment, _sections(at))) from error
    if quick:
        try:
            experiment = experiment.quicker()
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return experiment, _jobs(experiment, path)


def _jobs(experiment: Experiment, path: Path) -> list[Job]:
    beside = path.parent / experiment.recipe
    source = str(beside) if beside.is_file() else experiment.recipe

    def recipe(where: str, seed: int, *overrides: Override) -> Recipe:
        merged: Override = {}
        for override in (experiment.override, *overrides, {"seed": seed}):
            merged = _merged(merged, override)
        try:
            pairs = [(key, _beside(path, value)) for key, value in _dotted(merged)]
            return load_recipe(source, pairs)[0]
        except ConfigError as error:
            raise ConfigError(f"{path}, {where}: {error}") from error

    jobs = []
    for seed in experiment.seeds:  # outermost, so that fewer seeds of all arms are done early
        for start in experiment.start:
            for arm in experiment.arm:
                where = f"arm {arm.name!r}" + (f" from {start.name!r}" if start.name else "")
                parts = (start.override, arm.override, start.arm.get(arm.name, {}))
                own = recipe(where, seed, *parts)
                sets = [
                    (s, recipe(f"{where}, set {s.name!r}", seed, *parts, s.override))
                    for s in experiment.set
                ]
                jobs.append(Job(start.name, arm.name, seed, arm.train, own, tuple(sets)))
    folders = [job.folder for job in jobs]
    for job in jobs:
        if folders.count(job.folder) > 1:
            raise ConfigError(f"{path}: two arms named like {job.arm!r} have the same settings")
    return jobs


def _merged(under: Override, over: Override) -> Override:
    """Nested dictionaries, ``over`` first; a name stands for a section with that name alone."""
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, str):
            old = {"name": old}
        both = isinstance(value, dict) and isinstance(old, dict)
        result[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def _beside(path: Path, value: Any) -> Any:
    """``"file.py:Class"``, where the file stands beside the experiment's, with its whole path."""
    file, colon, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    found = path.parent / file
    return f"{found.resolve()}:{name}" if colon and found.is_file() else value


def _dotted(nested: Override, prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in nested.items():
        inner = isinstance(value, dict)
        pairs += _dotted(value, f"{prefix}{key}.") if inner else [(f"{prefix}{key}", value)]
    return pairs


def _sections(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    return tuple(part for part in location if not isinstance(part, int))
