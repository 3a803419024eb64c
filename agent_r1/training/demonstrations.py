"""Episodes to imitate: those that an environment plays by itself with its gold actions, or the
successful ones of past runs. They take the place of the rollout in reinforcement learning, with
trajectories of the same form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from agent_r1.envs.tool_env import ToolEnv
from agent_r1.errors import ConfigError
from agent_r1.rollout.gold_episode import play_gold
from agent_r1.rollout.rollout import Rollout
from agent_r1.run.folder import RunFolder
from agent_r1.run.recipe import Recipe
from agent_r1.training.collector import Draw
from agent_r1.types import Action, Group, Step, Task, Trajectory, derive_seed

GOLD = "gold"
MAX_BAD = 200
"""Number of gold episodes in a row that are not good enough, at which the run fails."""


class Demonstrations(Protocol):
    """Source of groups, in place of the rollout."""

    @property
    def tasks(self) -> Sequence[Task]:
        """Tasks to draw from."""
        ...

    async def groups(self, draws: Sequence[Draw], *, attempts: int) -> list[Group]:
        """At most so many demonstrations of each; a group is empty where there is none."""
        ...


class GoldDemonstrations:
    """The environment plays its gold actions, each task when it is drawn."""

    def __init__(
        self, rollout: Rollout, tasks: Sequence[Task], require: Mapping[str, float]
    ) -> None:
        self.tasks = tasks
        self._rollout, self._require = rollout, require
        self._num_bad = 0

    async def groups(self, draws: Sequence[Draw], *, attempts: int) -> list[Group]:
        groups = []
        for draw in draws:
            task = draw.task
            trajectory, too_few = await self._play(task, draw.seed)
            flaw = "gold() ends before the episode does" if too_few else _flaw(trajectory)
            flaw = flaw or _shortfall(trajectory, self._require)
            # A fault stays, so that it is counted; nobody learns from it.
            kept = flaw is None or trajectory.outcome is None
            groups.append(Group(task, [trajectory] if kept else []))
            self._num_bad = self._num_bad + 1 if flaw else 0
            if self._num_bad == MAX_BAD:
                raise ConfigError(
                    f"algorithm.source = {GOLD!r}: {MAX_BAD} demonstrations in a row were not good "
                    f"enough; the last, of task {task.id!r}: {flaw}"
                )
        return groups

    async def _play(self, task: Task, seed: int) -> tuple[Trajectory, bool]:
        rollout = self._rollout
        try:
            trajectory, too_few = await play_gold(
                rollout.make_env, rollout.renderer, rollout.limits, task, seed
            )
        except ConfigError as error:
            raise ConfigError(
                f"algorithm.source = {GOLD!r}: {error}; `agent-r1 check` tells more"
            ) from error
        if too_few and not trajectory.steps:
            raise ConfigError(
                f"algorithm.source = {GOLD!r}: the environment has no gold() actions for this "
                "task; write gold(), or imitate runs with --from RUN"
            )
        return trajectory, too_few


class PastDemonstrations:
    """The successful episodes among those that runs have stored."""

    def __init__(self, runs: Sequence[RunFolder], require: Mapping[str, float]) -> None:
        self._of: dict[str, list[Trajectory]] = {}
        tasks: dict[str, Task] = {}
        stored = (run.trajectories(i) for run in runs for i in run.trajectory_iterations())
        for group in (group for groups in stored for group in groups):
            if good := [t for t in group.scored if _shortfall(t, require) is None]:
                tasks[group.task.id] = group.task
                self._of.setdefault(group.task.id, []).extend(good)
        self.tasks = list(tasks.values())
        if not self.tasks:
            raise ConfigError(
                f"algorithm.source = {[str(run.path) for run in runs]}: no episode there succeeds "
                f"and reaches what algorithm.require asks for ({dict(require)})"
            )

    async def groups(self, draws: Sequence[Draw], *, attempts: int) -> list[Group]:
        groups = []
        for draw in draws:
            known = self._of[draw.task.id]
            first = derive_seed(draw.seed, draw.index, draw.task.id) % len(known)
            chosen = (known[first:] + known[:first])[:attempts]
            groups.append(Group(draw.task, [_as_demonstration(t) for t in chosen]))
        return groups


def open_runs(recipe: Recipe) -> list[RunFolder]:
    """The runs that a recipe imitates. Model, chat format and the environment's own settings must
    be the same there: tokens and splits depend on them.
    """
    settings: Any = recipe.algorithm
    runs = []
    for folder in [settings.source] if isinstance(settings.source, str) else settings.source:
        run = RunFolder.open(Path(folder).expanduser())
        theirs = _what_counts(run.recipe_data())  # as it stands: its code is not run
        for key, ours in _what_counts(recipe.model_dump(mode="json")).items():
            if theirs.get(key) != ours:
                raise ConfigError(
                    f"algorithm.source = {folder!r}: that run has {key} = {theirs.get(key)!r}, "
                    f"this recipe {ours!r}; set it as it was there, or its tokens would mean "
                    "something else and its training tasks might be held out here"
                )
        runs.append(run)
    return runs


def _what_counts(data: Mapping[str, Any]) -> dict[str, Any]:
    of_any = ToolEnv.Settings.model_fields.keys() - {"name"}
    env, model = data.get("env"), data.get("model")
    if not (isinstance(env, Mapping) and isinstance(model, Mapping)):
        raise ConfigError("algorithm.source: the recipe.json there has no sections env and model")
    of_env = {f"env.{key}": value for key, value in env.items() if key not in of_any}
    return {"model.path": model.get("path"), "renderer": data.get("renderer"), **of_env}


def _shortfall(trajectory: Trajectory, require: Mapping[str, float]) -> str | None:
    """Why an episode is not to be imitated, or ``None``."""
    outcome = trajectory.outcome
    if outcome is None:
        return trajectory.fault or "it failed"
    if unknown := require.keys() - outcome.metrics.keys():
        raise ConfigError(
            f"algorithm.require.{sorted(unknown)[0]}: the environment gives no such metric; it "
            f"gives {', '.join(outcome.metrics) or 'none'}"
        )
    if not outcome.success:
        return f"no success ({trajectory.stop})"
    few = [name for name, least in require.items() if outcome.metrics[name] < least]
    return f"{few[0]} = {outcome.metrics[few[0]]:g}" if few else None


def _flaw(trajectory: Trajectory) -> str | None:
    """What is wrong with a gold episode, even if it is a success, or ``None``."""
    for step in trajectory.steps:
        if step.action.stop != "stop":
            return "an action is longer than limits.tokens_per_turn"
        if step.events:
            return step.events[0]
    return None


def _as_demonstration(trajectory: Trajectory) -> Trajectory:
    """A copy of messages and tokens, without the numbers of the policy that sampled them."""
    steps = [
        Step(
            Action(step.action.token_ids, (), (), (), step.action.stop),
            step.message,
            step.observation,
            step.observation_ids,
            step.rewards,
            step.state_key,
            step.events,
            step.context_ids,
            results=step.results,
        )
        for step in trajectory.steps
    ]
    return dataclasses.replace(trajectory, steps=steps)
