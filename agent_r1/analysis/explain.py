"""``agent-r1 explain``: why a stored trajectory was learned from as it was, offline and without a
model: rewards by part, returns, advantage per step, and what each token weighed in the loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from agent_r1.algorithms import ALGORITHMS, CREDITS
from agent_r1.algorithms.base import Algorithm
from agent_r1.algorithms.credit import Credit
from agent_r1.analysis.explanation import Column, Explanation, Place
from agent_r1.config.section import explain as explain_error
from agent_r1.errors import ConfigError
from agent_r1.learner.credit_assignment import (
    assign_credit,
    batch_of,
    loss_weights,
    minibatches,
    trained_on,
)
from agent_r1.learner.mask_ablation import masks_of
from agent_r1.run.folder import RunFolder
from agent_r1.types import Group, Trajectory, derive_seed


@dataclass(frozen=True)
class _Settings:
    """What of a recipe is needed; the environment is not loaded.

    Attributes:
        own: Whether the algorithm is code of the run's own that is not to be run; then
            ``algorithm`` is the base of all.
    """

    name: str
    algorithm: Algorithm
    credit: Credit
    credit_name: str
    seed: int
    minibatches: int
    own: bool


def _settings_of(run: RunFolder, *, trust: bool) -> _Settings:
    data = run.recipe_data()
    try:
        sections: dict[str, Any] = {
            kind: {"name": data[kind]} if isinstance(data[kind], str) else dict(data[kind])
            for kind in ("algorithm", "credit")
        }
        names = {kind: str(section["name"]) for kind, section in sections.items()}
        seed, minibatches = int(data["seed"]), int(data["learner"]["minibatches"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{run.path / 'recipe.json'} is no whole recipe: {error!r}") from error
    if ":" in names["credit"] and not trust:
        raise ConfigError(
            f"{run.path}: credit = {names['credit']!r} is code that the run names; look at it, "
            "then add --trust to have it run"
        )
    own = ":" in names["algorithm"] and not trust
    try:
        section = None if own else ALGORITHMS.section(sections["algorithm"])
        of_credit = CREDITS.section(sections["credit"])
    except ValidationError as error:
        file = str(run.path / "recipe.json")
        raise explain_error(error, file, lambda location: []) from error
    algorithm = (
        Algorithm(Algorithm.Settings(name=names["algorithm"]))
        if section is None
        else ALGORITHMS.resolve(section.name)(section)
    )
    credit = CREDITS.resolve(of_credit.name)(of_credit)
    return _Settings(names["algorithm"], algorithm, credit, names["credit"], seed, minibatches, own)


def explain(run: RunFolder, where: str | None = None, *, trust: bool = False) -> Explanation:
    """Explains a trajectory of a run. No code that the run names is loaded, unless ``trust`` is
    given: an algorithm of its own is then shown by the numbers that are stored.

    Args:
        run: Its folder.
        where: ``ITERATION/GROUP/ATTEMPT``, the last one or two left out or all of it: then the last
            iteration, its first group with a signal, its first attempt that counts.
        trust: Run the algorithm and the credit that the run names, if they are its own.

    Raises:
        ConfigError: There is no such trajectory, or it was excluded.
    """
    iteration, number, attempt = _parse(run, where)
    settings = _settings_of(run, trust=trust)
    groups = list(run.trajectories(iteration))
    if number is None:
        has_signal = _was_told if settings.own else settings.algorithm.has_signal
        number = next((n for n, g in enumerate(groups, 1) if has_signal(g)), 1)
    group = _pick(groups, number, f"iteration {iteration} has groups")
    if attempt is None:
        attempt = next((n for n, t in enumerate(group.trajectories, 1) if t in group.scored), 1)
    trajectory = _pick(group.trajectories, attempt, f"group {number} has attempts")
    if trajectory.outcome is None or not trajectory.steps:
        raise ConfigError(
            f"attempt {attempt} of group {number} was excluded: {trajectory.fault or 'no action'}"
        )
    return _explain(settings, groups, (iteration, number, attempt), trajectory)


def _was_told(group: Group) -> bool:
    """Whether some stored advantage of a group is not 0."""
    return any(any(step.advantages or ()) for t in group.scored for step in t.steps)


def _explain(
    settings: _Settings, groups: list[Group], place: Place, trajectory: Trajectory
) -> Explanation:
    algorithm, credit = settings.algorithm, settings.credit
    group = groups[place[1] - 1]
    index = next(i for i, t in enumerate(group.scored) if t is trajectory)
    stored = [[step.advantages for step in t.steps] for g in groups for t in g.scored]
    advantages = [step.advantages or () for step in trajectory.steps]
    of_group = algorithm.rewards(group, credit)
    rewards = of_group[index]
    counted = iter(sum(map(sum, per_step)) for per_step in of_group)
    totals = [
        next(counted) if any(t is s for s in group.scored) else None for t in group.trajectories
    ]
    earned = [sum(values) for values in rewards]
    returns = [values[0] for values in credit.returns(trajectory, rewards)]
    seed = derive_seed(settings.seed, "iteration", place[0])
    again = stored
    if not settings.own and all(masks_of(algorithm)):
        assign_credit(groups, algorithm, credit)
        again = [[step.advantages for step in t.steps] for g in groups for t in g.scored]
    own_weights: list[float] = []
    if not settings.own:
        own_weights = _weights(settings, algorithm, groups, trajectory, seed)
    if is_warm_up := place[0] <= getattr(algorithm.settings, "critic_warmup", 0):
        own_weights = [0.0] * len(own_weights)
    notes = [*_notes(settings, advantages, own_weights, is_warm_up=is_warm_up)]
    if not _close(stored, again):
        notes.insert(
            0,
            "the advantages computed now differ from those stored, which are shown: an "
            "environment or an algorithm has changed since",
        )
    others = _others(settings, groups, trajectory, seed)
    return Explanation(
        place,
        group,
        trajectory,
        settings.credit_name,
        earned,
        returns,
        totals,
        Column(f"{settings.name} (this run)", advantages, own_weights),
        _together(others),
        notes,
    )


def _notes(
    settings: _Settings,
    advantages: list[tuple[float, ...]],
    own_weights: list[float],
    *,
    is_warm_up: bool,
) -> Iterator[str]:
    """What a reader of the numbers must know."""
    if settings.own:
        yield (
            f"{settings.name!r} is code that the run names and was not run: its advantages are "
            "those stored, what is counted leaves it out; --trust runs it"
        )
    if not all(masks_of(settings.algorithm)):
        yield (
            "a mask was off: advantages are those stored; weights are those that the agent's own "
            "tokens would have had with the mask on"
        )
    if settings.own:
        return
    if is_warm_up:
        yield "the critic was warmed up: the policy was not trained in this iteration"
    elif not any(own_weights):
        yield "no update used this trajectory: masked, or its group had no signal"
    elif not any(any(values) for values in advantages):
        yield "all advantages are 0: only terms besides the algorithm's loss were felt"


def _others(
    settings: _Settings, groups: list[Group], trajectory: Trajectory, seed: int
) -> list[Column]:
    """What the other algorithms would have made of the same episodes."""
    others = []
    for name in ALGORITHMS.table:
        other_class = ALGORITHMS.resolve(name)
        if other_class.critic or other_class.demonstrated or name == settings.name:
            continue
        other: Algorithm = other_class(ALGORITHMS.section(name))
        assign_credit(groups, other, settings.credit)
        given = [step.advantages or () for step in trajectory.steps]
        others.append(Column(name, given, _weights(settings, other, groups, trajectory, seed)))
    return others


def _weights(
    settings: _Settings,
    algorithm: Algorithm,
    groups: list[Group],
    trajectory: Trajectory,
    seed: int,
) -> list[float]:
    """Per step, the weight of its tokens in the first epoch's mini-batch that has them; credit is
    assigned.
    """
    batch = batch_of(groups, algorithm)
    for part in minibatches(batch, settings.minibatches, derive_seed(seed, 0)):
        if any(t is trajectory for g in trained_on(part, algorithm) for t in g.scored):
            of = loss_weights(part, algorithm)
            return [of[id(step)].weight for step in trajectory.steps]
    return [0.0] * len(trajectory.steps)


def _together(columns: Sequence[Column]) -> list[Column]:
    """Columns with the same numbers as one."""
    result: list[Column] = []
    for column in columns:
        for index, other in enumerate(result):
            if (column.advantages, column.weights) == (other.advantages, other.weights):
                result[index] = dataclasses.replace(other, name=f"{other.name}, {column.name}")
                break
        else:
            result.append(column)
    return result


def _parse(run: RunFolder, where: str | None) -> tuple[int, int | None, int | None]:
    known = run.trajectory_iterations()
    if not known:
        raise ConfigError(f"{run.path} holds no trajectories yet")
    try:
        given: list[int | None] = [int(part) for part in where.split("/")] if where else []
        iteration, group, attempt = given + [None] * (3 - len(given))
    except ValueError as error:
        raise ConfigError(
            f"trajectory {where!r}: write ITERATION/GROUP/ATTEMPT, for example {known[-1]}/1/2"
        ) from error
    iteration = known[-1] if iteration is None else iteration
    if iteration not in known:
        raise ConfigError(
            f"{run.path} has trajectories of iterations {known[0]} to {known[-1]}, "
            f"not of {iteration}"
        )
    return iteration, group, attempt


def _pick(items: Sequence[Any], number: int, what: str) -> Any:
    if not 1 <= number <= len(items):
        raise ConfigError(f"{what} 1 to {len(items)}, not {number}")
    return items[number - 1]


def _close(one: list[Any], two: list[Any]) -> bool:
    flat_one, flat_two = (
        [x for steps in nested for values in steps for x in values or ()] for nested in (one, two)
    )
    return len(flat_one) == len(flat_two) and all(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
        for a, b in zip(flat_one, flat_two, strict=True)
    )
