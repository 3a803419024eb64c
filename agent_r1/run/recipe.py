"""The recipe: every setting of a run, in sections. TOML in, checked object out; no torch.

``env``, ``algorithm``, ``credit``, ``renderer`` and ``engine`` are named sections: ``name``
chooses a class, and the other keys are that class's own. A bare string stands for a section with
that name alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from agent_r1.algorithms import ALGORITHMS, CREDITS
from agent_r1.config.overrides import load_toml, override
from agent_r1.config.registry import FOLDER, Registry
from agent_r1.config.section import NamedSection, Section, explain, keys_at, nearest
from agent_r1.envs.base import MEMORIES
from agent_r1.envs.user import USERS
from agent_r1.errors import ConfigError
from agent_r1.learner.settings import LearnerSettings
from agent_r1.model.settings import ModelSettings
from agent_r1.render import RENDERERS
from agent_r1.rollout import ENGINES
from agent_r1.rollout.conversation import Limits
from agent_r1.run.trackers import TRACKERS
from agent_r1.search import SEARCHES
from agent_r1.tasks import ENVS
from agent_r1.utils.run_files import is_run

REGISTRIES: dict[str, Registry[Any]] = {
    "env": ENVS,
    "algorithm": ALGORITHMS,
    "credit": CREDITS,
    "renderer": RENDERERS,
    "engine": ENGINES,
}
SECTIONS: dict[str, Registry[Any]] = {
    **REGISTRIES,
    "env.memory": MEMORIES,
    "env.user": USERS,
    "env.search": SEARCHES,
    "trackers": TRACKERS,
}
"""All sections whose ``name`` decides what keys they have."""

EnvSection = Annotated[SerializeAsAny[NamedSection], BeforeValidator(ENVS.section)]
RendererSection = Annotated[SerializeAsAny[NamedSection], BeforeValidator(RENDERERS.section)]
EngineSection = Annotated[SerializeAsAny[NamedSection], BeforeValidator(ENGINES.section)]
AlgorithmSection = Annotated[SerializeAsAny[NamedSection], BeforeValidator(ALGORITHMS.section)]
CreditSection = Annotated[SerializeAsAny[NamedSection], BeforeValidator(CREDITS.section)]
TrackerSection = Annotated[SerializeAsAny[NamedSection], BeforeValidator(TRACKERS.section)]


IMPORTANCE_CAP = 2.0
"""Where importance weights are on by default."""


class TrainSettings(Section):
    """The loop.

    Attributes:
        iterations: Rounds of rollout and update.
        tasks: Task instances per iteration.
        attempts: Episodes per task instance (the group's size).
        temperature: Sampling temperature of training and sampled evaluation.
        concurrency: Episodes at once.
        seconds: Stop after this much training time, evaluations not counted; none by default.
        staleness: How many updates sampling may be ahead: with 0 an iteration's episodes begin
            after the update before and end before the next. More keeps engine and learner at work
            together; such a run does not repeat bit for bit.
    """

    iterations: int = Field(100, ge=1)
    tasks: int = Field(8, ge=1)
    attempts: int = Field(8, ge=1)
    temperature: float = Field(1.0, ge=1e-3, le=1e3)
    concurrency: int = Field(64, ge=1)
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    staleness: int = Field(0, ge=0, le=64)


class EvaluationSettings(Section):
    """Evaluation on tasks that training never sees.

    Attributes:
        every: Iterations between validations, which choose the best checkpoint; 0 for none, and
            ``tasks`` is then unused.
        tasks: Validation tasks.
        test_tasks: Tasks of the test split for the report before and after training; 0 for none.
        concurrency: Episodes at once.
        top_p, top_k: Leave out improbable tokens where evaluation samples: keep the most probable
            that make up ``top_p``, and at most the ``top_k`` most probable (0: all). Training
            has no such keys: the learner could not reproduce the probabilities.
    """

    every: int = Field(5, ge=0)
    tasks: int = Field(64, ge=1)
    test_tasks: int = Field(0, ge=0)
    concurrency: int = Field(64, ge=1)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)


class CheckpointSettings(Section):
    """Which checkpoints there are.

    Attributes:
        every: Iterations between checkpoints.
        keep: How many of the last ones stay, besides the best.
        metric: Figure of the validation that decides which is the best: ``success``, ``reward``, or
            a metric of the environment's outcomes.
    """

    every: int = Field(1, ge=1)
    keep: int = Field(2, ge=1)
    metric: str = "success"


class Recipe(Section):
    """A whole run.

    Attributes:
        seed: One seed gives one run.
        threads: CPU threads of torch, on which results depend; 0 means all cores.
        trackers: Where figures go besides ``metrics.jsonl``: names or sections, several at once.
    """

    def __reduce__(self) -> Any:
        """Pickled as plain data: section classes of a user's file cannot be imported."""
        return _from_data, (self.model_dump(mode="json"),)

    seed: int = 0
    threads: int = Field(0, ge=0)
    model: ModelSettings = ModelSettings()
    env: EnvSection
    limits: Limits = Limits()
    renderer: RendererSection = Field({}, validate_default=True)
    engine: EngineSection = Field({}, validate_default=True)
    algorithm: AlgorithmSection = Field({}, validate_default=True)
    credit: CreditSection = Field({}, validate_default=True)
    train: TrainSettings = TrainSettings()
    learner: LearnerSettings = LearnerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    trackers: Annotated[
        tuple[TrackerSection, ...],
        BeforeValidator(lambda given: [given] if isinstance(given, str | dict) else given),
    ] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        parts: tuple[str, ...] = getattr(ENVS.resolve(self.env.name), "reward_parts", ())
        for part in getattr(self.credit, "weights", {}):
            if part not in parts:
                cure = nearest(part, list(parts))
                if not parts:
                    cure = f"; declare them in its class: reward_parts = ({part!r},)"
                raise ValueError(
                    f"credit.weights.{part}: env {self.env.name!r} gives no such reward{cure}"
                )
        if self.model.lora and self.model.lora.targets == ():
            raise ValueError("model.lora.targets = []: name layers, or 'all-linear'")
        for problem in self._without_effect():
            raise ValueError(problem)
        algorithm = ALGORITHMS.resolve(self.algorithm.name)
        if self.train.attempts < 2 and algorithm.compares_attempts:
            raise ValueError(
                f"train.attempts = 1: {self.algorithm.name!r} compares attempts at the same task; "
                "use 2 or more"
            )
        if self.train.attempts < 2 and getattr(self.credit, "gate", False):
            raise ValueError("train.attempts = 1: with credit.gate no process reward would count")
        for key in ("compare", "gamma"):
            field = type(self.credit).model_fields.get(key)
            unused = field is not None and getattr(self.credit, key) != field.default
            if unused and not algorithm.compares_units:
                raise ValueError(
                    f"credit.{key} has no effect with algorithm {self.algorithm.name!r}, which "
                    "does not compare the returns of steps or tokens by it"
                )
        return self

    def _without_effect(self) -> Iterator[str]:
        """Settings that would have no effect, each with the cure."""
        train, learner, evaluation = self.train, self.learner, self.evaluation
        algorithm, lora = self.algorithm, self.model.lora
        if not evaluation.every and self.checkpoint.metric != "success":
            yield (
                f"checkpoint.metric = {self.checkpoint.metric!r} has no effect with "
                "evaluation.every = 0: nothing is measured"
            )
        updates = learner.epochs * learner.minibatches
        if getattr(algorithm, "value_clip", None) is not None and updates == 1:
            yield (
                "algorithm.value_clip has no effect on a single update of a rollout; raise "
                "learner.epochs or learner.minibatches, or leave it out"
            )
        overlong = getattr(algorithm, "overlong", None)
        reach = min(self.limits.tokens, self.limits.turns * self.limits.tokens_per_turn)
        if overlong is not None and overlong.length - overlong.buffer >= reach:
            yield (
                f"algorithm.overlong.length = {overlong.length}: under [limits] an episode has at "
                f"most {reach} action tokens, so that none would be punished"
            )
        if lora is not None and lora.start is not None and lora.targets != "all-linear":
            yield "model.lora.targets has no effect with model.lora.start: the adapter has its own"
        unsampled = not evaluation.every and not evaluation.test_tasks
        demonstrated = ALGORITHMS.resolve(algorithm.name).demonstrated
        if demonstrated and train.staleness:
            yield (
                f"train.staleness = {train.staleness} has no effect on {algorithm.name!r}, which "
                "learns from demonstrations"
            )
        if demonstrated and unsampled and train.temperature != 1.0:
            yield (
                f"train.temperature = {train.temperature:g} has no effect on {algorithm.name!r}: "
                "nothing is sampled"
            )


def load_recipe(
    source: str | Path | dict[str, Any],
    overrides: list[tuple[str, Any]] | None = None,
    *,
    label: str = "recipe",
) -> tuple[Recipe, list[str]]:
    """A checked recipe, and notes on keys that overrides dropped.

    Args:
        source: A TOML file, the name of a built-in recipe, or the content as a dictionary.
        overrides: Dotted keys and values. One that changes a section's name drops the keys that
            the newly named class does not have; the notes say which.
        label: Name of a dictionary in messages.

    Raises:
        ConfigError: What is wrong, where, and how to mend it.
    """
    if isinstance(source, dict):
        data, folder = dict(source), Path()
    else:
        path = _recipe_path(source)
        data, label, folder = load_toml(path), str(path), path.parent
    token = FOLDER.set(folder)
    try:
        notes = _apply(data, overrides or [])
        return _with_importance_weights(Recipe.model_validate(data)), notes
    except ValidationError as error:
        wrong = [".".join(map(str, item["loc"])) for item in error.errors()]
        given = tuple(f"{_set_by(key, value)}." for key, value in overrides or [])
        if all(f"{where}.".startswith(given) for where in wrong):
            label = f"keys given beside {label}"
        raise explain(error, label, functools.partial(_keys_at, data)) from error
    finally:
        FOLDER.reset(token)


def _from_data(data: dict[str, Any]) -> Recipe:
    return load_recipe(data)[0]


def _keys_at(data: dict[str, Any], location: tuple[int | str, ...]) -> list[str]:
    for depth in (2, 1):
        key = ".".join(map(str, location[:depth]))
        if len(location) >= depth and key in SECTIONS:
            name = str(_at(data, f"{key}.name") or SECTIONS[key].default)
            return keys_at(SECTIONS[key].settings(name), location[depth:])
    return keys_at(Recipe, location)


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    names = [entry.name for entry in (files("agent_r1") / "recipes").iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def _recipe_path(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file() or path.suffix == ".toml":
        return path
    if str(source) in shipped_recipes():
        return Path(str(files("agent_r1") / "recipes" / f"{source}.toml"))
    if is_run(path):
        raise ConfigError(f"{source} is a run, not a recipe: --resume {source} goes on with it")
    raise ConfigError(
        f"there is no recipe file {str(source)!r}, no run folder and no recipe of that name"
        f"{nearest(str(source), shipped_recipes())}"
    )


def _apply(data: dict[str, Any], overrides: list[tuple[str, Any]]) -> list[str]:
    """Applies overrides in order, names first, because names decide which keys exist."""
    notes = []
    for key, value in sorted(overrides, key=lambda pair: not _is_name(pair[0])):
        section = key.removesuffix(".name")
        old = _at(data, section)
        renames = _is_name(key) and isinstance(value, str)
        if renames and isinstance(old, dict) and old.get("name") != value:
            known = SECTIONS[section].settings(str(value)).model_fields
            dropped = {k: v for k, v in old.items() if k != "name" and k not in known}
            override(data, section, {k: v for k, v in old.items() if k in known})
            notes += [
                f"dropped {section}.{k} = {v!r}: {value!r} has no such key"
                for k, v in dropped.items()
            ]
        override(data, f"{section}.name" if renames else key, value)
    return notes


def _with_importance_weights(recipe: Recipe) -> Recipe:
    """Where the policy that samples is not quite the one that is trained, by rounding or by its
    age, importance weights are on by default.
    """
    algorithm = recipe.algorithm
    exact = recipe.model.matmul is None and ENGINES.resolve(recipe.engine.name).traits.exact
    if (exact and not recipe.train.staleness) or "importance_cap" in algorithm.model_fields_set:
        return recipe
    if getattr(algorithm, "importance_band", None) or getattr(algorithm, "sequence_band", None):
        return recipe  # another correction was chosen
    unmasked = not all(getattr(algorithm, key, True) for key in ("loss_mask", "advantage_mask"))
    if unmasked or getattr(algorithm, "importance_cap", 0.0) is not None:  # 0: it has no such key
        return recipe
    update = {"importance_cap": IMPORTANCE_CAP}
    return recipe.model_copy(update={"algorithm": algorithm.model_copy(update=update)})


def _set_by(key: str, value: Any) -> str:
    """What an override sets: a section's new name leaves its other keys to the file."""
    return f"{key.removesuffix('.name')}.name" if _is_name(key) and type(value) is str else key


def _at(data: dict[str, Any], key: str) -> Any:
    """The value at a dotted key, or ``None``."""
    value: Any = data
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _is_name(key: str) -> bool:
    return key.removesuffix(".name") in SECTIONS and key != "trackers"  # a list of sections
