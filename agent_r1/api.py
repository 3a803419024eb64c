"""The Python interface: all that the command line does."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from agent_r1.analysis.report import write_result
from agent_r1.errors import ConfigError, RunError
from agent_r1.model.adapter import start_folder
from agent_r1.model.checkpoint_folder import model_folder
from agent_r1.model.load import contents_of, load_policy
from agent_r1.model.portable import file_print
from agent_r1.run.folder import Contents, RunFolder, must_be_sayable
from agent_r1.run.recipe import Recipe, load_recipe
from agent_r1.training.build import evaluator, make_rollout, set_up_process, tasks_of
from agent_r1.training.evaluate import Evaluation, evaluate
from agent_r1.training.preflight import preflight
from agent_r1.training.trainer import Trainer
from agent_r1.types import Task, Trajectory, derive_seed
from agent_r1.utils.log import LOG
from agent_r1.utils.run_files import BEST, CONTENTS, RECIPE
from agent_r1.utils.scope import Scope, current_scope, run_async, scope
from agent_r1.utils.text import describe, is_library, texts_in


@dataclass(repr=False)
class Result:
    """A finished run.

    Attributes:
        run: Its folder.
        recipe: The recipe it was trained by.
        metrics: The rows of ``metrics.jsonl``.
        report: The content of ``result.json``, or ``None`` when the recipe asks for no test.
        before: The test evaluations ``"sampled"`` and ``"greedy"`` of the model as it came.
        after: The same of the best checkpoint.
    """

    run: RunFolder
    recipe: Recipe
    metrics: list[dict[str, Any]]
    report: dict[str, Any] | None = None
    before: dict[str, Evaluation] = field(default_factory=dict)
    after: dict[str, Evaluation] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Result({str(self.run.path)!r}, {len(self.metrics)} rows of metrics)"


@scope()
def train(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    run: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
) -> Result:
    """Trains by a recipe (a file, the name of a built-in one, or its content) into a new run
    folder.

    Args:
        recipe: See ``load_recipe``.
        run: The folder; by default ``runs/`` and the recipe's name and the time.
        overrides: Dotted keys, e.g. ``{"train.iterations": 5}``.
    """
    label = recipe if isinstance(recipe, str | Path) else "run"
    # From here on an absolute path: a tool may change the current directory.
    folder = RunFolder(Path(run or default_run(str(label))).absolute())
    must_be_sayable(folder.path)
    if not isinstance(recipe, Recipe):
        recipe, _ = load_recipe(recipe, list((overrides or {}).items()))
    elif overrides:
        raise ConfigError("overrides change a recipe that is yet to be loaded; this one is checked")
    preflight(recipe)
    contents = Contents(**contents_of(recipe.model), files=_files_of(recipe))
    _must_be_its_base(recipe, contents)
    recipe = _pinned(recipe)
    folder.must_be_free(folder.path)
    with folder.locked():
        folder.must_be_free(folder.path)
        try:
            folder = RunFolder.create(folder.path, recipe)
            folder.write_contents(contents)
            return _train(recipe, folder)
        except BaseException:
            folder.remove_unused()
            raise


@scope()
def resume(
    run: str | Path,
    *,
    iterations: int | None = None,
    trust: bool = False,
) -> Result:
    """Continues a run after its last checkpoint, with the same numbers as without the
    stop.

    Args:
        run: Its folder.
        iterations: The new total number of iterations, to train for longer; a falling learning rate
            follows the new total from here on.
        trust: Run the code that a run from elsewhere names.
    """
    folder = RunFolder.open(Path(run).absolute())
    with folder.locked():
        recipe = folder.recipe(trust=trust)
        if not trust:
            folder.must_hold_its_parts()
        if iterations is not None:
            recipe = folder.lengthen(recipe, iterations)
        if recipe.model.lora is not None or recipe.algorithm.model_dump().get("kl") is not None:
            _must_be_the_same(recipe, folder)
        _tell_changes(folder)
        return _train(recipe, folder)


def _tell_changes(folder: RunFolder) -> None:
    """Warns of settings and files that have changed since the run began."""
    end = "results will differ from an unchanged run's"
    if not folder.contents().recipe:
        LOG.warning(
            f"{folder.path / CONTENTS} is missing or old: whether settings, code, data and "
            "weights are what they were when the run began is not known"
        )
    for key, before, now in folder.changed_settings():
        LOG.warning(f"{folder.path / RECIPE}: {key} = {now!r} was {before!r}: {end}")
    for file, before in folder.contents().files.items():
        if (now := file_print(Path(file))) != before:
            what = "is gone" if now is None else "has changed since the run began"
            LOG.warning(f"{file} {what}: {end}")


def _files_of(recipe: Recipe) -> dict[str, str]:
    """Hashes of the user's own files that a run depends on: the code that its recipe names, modules
    imported from the same folders, and the data that its environment names.
    """
    texts = [text for text in texts_in(recipe.model_dump(mode="json")) if "\n" not in text]
    code = {_path(text.rpartition(":")[0]) for text in texts if ".py:" in text}
    named = recipe.env.model_dump(mode="json", exclude={"cassette"})  # the run itself writes that
    data = {_path(text) for text in texts_in(named)}
    folders = {path.resolve().parent for path in code}
    for module in [*sys.modules.values()]:
        file = getattr(module, "__file__", None)
        if file and not is_library(file) and folders & {*Path(file).parents}:
            code.add(Path(file))
    return {str(path): found for path in sorted(code | data) if (found := file_print(path))}


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # a text that begins with "~"
        return Path(text)


def _must_be_the_same(recipe: Recipe, run: RunFolder) -> None:
    """Raises ``ConfigError`` if the weights that a run builds on have changed."""
    before, now = run.contents(), contents_of(recipe.model)
    if before.model is None and before.adapter is None:
        return  # a run without this record
    places = {"model": f"model.path = {recipe.model.path!r}"}
    if recipe.model.lora is not None:
        places["adapter"] = f"model.lora.start = {recipe.model.lora.start!r}"
    for what, place in places.items():
        if getattr(before, what) != now.get(what):
            raise ConfigError(
                f"{run.path}: {place} does not hold the weights any more that this run began with; "
                "put them back, or begin another run (what they were is noted in contents.json)"
            )


def _must_be_its_base(recipe: Recipe, contents: Contents) -> None:
    """Raises ``ConfigError`` for an adapter of a run that was trained on another model."""
    start = recipe.model.lora.start if recipe.model.lora else None
    if start is None:
        return
    folder = Path(start).expanduser().resolve()  # of a run, or a checkpoint in one
    run = next((f for f in (folder, *folder.parents[:2]) if (f / CONTENTS).exists()), None)
    theirs = None if run is None else RunFolder(run).contents().model
    if theirs is not None and theirs != contents.model:
        raise ConfigError(
            f"model.lora.start = {start!r}: its adapter was trained on a model with other weights "
            f"than those of model.path = {recipe.model.path!r}"
        )


def _pinned(recipe: Recipe) -> Recipe:
    """The recipe with the exact checkpoint that it starts from: a resumed run uses the same one,
    from any folder, even if the other run's best has changed.
    """
    model = recipe.model
    changed: dict[str, Any] = {}
    if (path := Path(model.path).expanduser()).is_dir():
        changed["path"] = str(path.resolve())  # "best" is a link, which moves
    if model.lora is not None and (folder := start_folder(model.lora)) is not None:
        changed["lora"] = model.lora.model_copy(update={"start": str(folder)})
    return recipe.model_copy(update={"model": model.model_copy(update=changed)})


def default_run(label: str) -> Path:
    """``runs/<recipe>-<time>``."""
    return Path("runs") / f"{Path(label).stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _train(recipe: Recipe, run: RunFolder) -> Result:
    trainer = Trainer(recipe, run)
    run.keep(recipe)
    state = trainer.train()
    run_async(trainer.rollout.engine.close())  # its servers' GPUs are needed by the tests
    result = Result(run, recipe, run.metrics())
    if recipe.evaluation.test_tasks:
        LOG.info(
            f"testing before and after on {recipe.evaluation.test_tasks} fresh tasks, sampled and "
            "greedy (evaluation.test_tasks = 0 leaves it out)"
        )
        result.before = _tested(Agent(recipe))
        result.after = _tested(Agent(recipe, model_folder(run.path, BEST)))
        result.report = write_result(
            run, result.before, result.after, train_seconds=state.train_seconds
        )
    return result


def _tested(agent: Agent) -> dict[str, Evaluation]:
    """An agent's test, after which its engine is closed."""
    try:
        return agent.test()
    finally:
        run_async(agent.rollout.engine.close())


class Agent:
    """A policy in its environment, to be asked and evaluated. What its episodes share (indexes,
    servers) lives until ``close``, the end of a ``with`` block or of the object.
    """

    def __init__(self, recipe: Recipe, checkpoint: Path | None = None) -> None:
        """Loads the recipe's initial model, or a run's checkpoint folder."""
        set_up_process(recipe)
        self._lock = threading.Lock()  # the engine serves one rollout at a time
        self._finalizer: weakref.finalize[..., Agent] | None = None
        self._scope = current_scope() or self._own_scope()
        self.recipe = recipe
        self.policy = load_policy(recipe.model, checkpoint=checkpoint, adapter=False)
        concurrency = recipe.evaluation.concurrency
        self.rollout = evaluator(make_rollout(recipe, self.policy, concurrency=concurrency), recipe)

    def _own_scope(self) -> Scope:
        own = Scope()
        self._finalizer = weakref.finalize(self, own.close)
        return own

    def _entered(self) -> contextlib.AbstractContextManager[None]:
        """The scope of what the agent does: of the run that it was made in, as long as that lasts,
        or its own.
        """
        if self._finalizer is None and self._scope.closed:
            self._scope = self._own_scope()
        return self._scope.entered()

    def tasks(self, split: str = "test") -> Sequence[Task]:
        """The environment's tasks of a split."""
        with self._entered():
            return tasks_of(self.recipe, split)

    def play(self, task: Task | str, *, temperature: float = 0.0, seed: int = 0) -> Trajectory:
        """One episode, greedy by default. A string is the question of a task without further data,
        which not every environment accepts.

        Raises:
            RunError: The episode ended before the agent could say anything.
        """
        if isinstance(task, str):
            task = Task(id=task, question=task)
        work = self.rollout.run([task], attempts=1, temperature=temperature, seed=seed)
        with self._lock, self._entered():
            trajectory = run_async(work)[0].trajectories[0]
        if not trajectory.steps:
            raise RunError(
                f"the episode had no step ({trajectory.fault or trajectory.stop}); not every "
                "environment can do with a question alone: take a task of agent.tasks()"
            )
        return trajectory

    def evaluate(
        self, *, split: str = "test", num_tasks: int, temperature: float, seed: int | None = None
    ) -> Evaluation:
        """Success on the first tasks of a split."""
        seed = derive_seed(self.recipe.seed, split) if seed is None else seed
        tasks = self.tasks(split)[:num_tasks]
        with self._lock, self._entered():
            return evaluate(self.rollout, tasks, temperature=temperature, seed=seed)

    def close(self) -> None:
        """Closes what the episodes shared; what is asked of the agent later opens it again."""
        if self._finalizer is not None:
            with self._lock:
                self._scope.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def test(self) -> dict[str, Evaluation]:
        """The recipe's test tasks, sampled as in training and greedy."""
        num, temperature = self.recipe.evaluation.test_tasks, self.recipe.train.temperature
        return {
            "sampled": self.evaluate(num_tasks=num, temperature=temperature),
            "greedy": self.evaluate(num_tasks=num, temperature=0.0),
        }


def load(run: str | Path, checkpoint: str = BEST, *, trust: bool = False) -> Agent:
    """The agent that a run trained: its ``best`` checkpoint, the ``last``, or an iteration's
    number. ``trust`` as in ``resume``.

    Raises:
        ConfigError: There is no such run or checkpoint, its recipe was not made here, or its
            adapter belongs to weights that are not at ``model.path`` any more.
    """
    folder = RunFolder.open(run)
    recipe = folder.recipe(trust=trust)
    if recipe.model.lora is not None:
        _must_be_the_same(recipe, folder)
    for tries_left in (2, 1, 0):
        found = None
        try:
            found = model_folder(folder.path, checkpoint)
            return Agent(recipe, found)
        except (ConfigError, OSError):
            if tries_left == 0 or (found is not None and found.exists()):
                raise
            time.sleep(0.1)  # training goes on there and has put a newer one in its place
    raise AssertionError("the last try returns or raises")


def export(
    run: str | Path, out: str | Path, checkpoint: str = BEST, *, trust: bool = False
) -> Path:
    """Writes a run's model as a plain Hugging Face model folder that other programs can read:
    an adapter merged into its model, the stop tokens in ``generation_config``, and where the
    tokenizer has no chat template for tools, that of the renderer.
    """
    if not str(out).strip():
        raise ConfigError("export needs the name of a new folder")
    folder = Path(out).absolute()
    must_be_sayable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; name a new folder")
    agent = load(run, checkpoint, trust=trust)
    policy = agent.policy.merged() if agent.policy.has_adapter else agent.policy
    template = getattr(agent.rollout.renderer, "chat_template", None)
    if template and "tools" not in (policy.tokenizer.chat_template or ""):
        policy.tokenizer.chat_template = template  # the prompt that it was trained with
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        policy.save(partial)
        if folder.exists():
            folder.rmdir()  # an empty one
        partial.rename(folder)
    except Exception as error:  # of any writer; tokenizers and safetensors have their own errors
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"{folder} cannot be written: {describe(error)}") from error
    return Path(out)
