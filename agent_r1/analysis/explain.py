"""``agent-r1 explain``: how a stored trajectory was trained on, offline and without a model:
rewards by part, returns, advantage per step, and the weight of each token in the loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from agent_r1.algorithms import ALGORITHMS, CREDITS
from agent_r1.algorithms.base import Algorithm, PolicyGradient
from agent_r1.algorithms.credit import Credit, attempts_of
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
from agent_r1.run.folder import RunFolder
from agent_r1.types import Estimates, Group, PerToken, StepKey, derive_seed
from agent_r1.utils.run_files import RECIPE


@dataclass(frozen=True)
class _Settings:
    """The needed part of a recipe; the environment is not loaded.

    Attributes:
        own: Whether the algorithm is the run's own code, which is not run; ``algorithm`` is then
            the base class.
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
        raise ConfigError(f"{run.path / RECIPE} is no whole recipe: {error!r}") from error
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
        file = str(run.path / RECIPE)
        raise explain_error(error, file, lambda location: []) from error
    algorithm = (
        PolicyGradient(PolicyGradient.Settings(name=names["algorithm"]))
        if section is None
        else ALGORITHMS.make(section)
    )
    credit = CREDITS.make(of_credit)
    return _Settings(names["algorithm"], algorithm, credit, names["credit"], seed, minibatches, own)


def explain(run: RunFolder, where: str | None = None, *, trust: bool = False) -> Explanation:
    """Explains a trajectory of a run. Code that the run names is loaded only with ``trust``;
    without, the run's own algorithm is shown by its stored numbers.

    Args:
        run: Its folder.
        where: ``ITERATION/GROUP/ATTEMPT``, or only its first parts, or nothing. Defaults: the last
            iteration, its first group with a signal, that group's first scored attempt.
        trust: Run the algorithm and the credit that the run names, if they are its own.

    Raises:
        ConfigError: There is no such trajectory, or it was excluded.
    """
    iteration, number, attempt = _parse(run, where)
    settings = _settings_of(run, trust=trust)
    groups, known = _stored(run, iteration)
    if number is None:
        has_signal = settings.algorithm.has_signal
        number = next((n for n, g in enumerate(groups, 1) if has_signal(g, known)), 1)
    group = _pick(groups, number, f"iteration {iteration} has groups")
    if attempt is None:
        attempt = next((n for n, t in enumerate(group.trajectories, 1) if t in group.scored), 1)
    trajectory = _pick(group.trajectories, attempt, f"group {number} has attempts")
    if trajectory.outcome is None or not trajectory.steps:
        raise ConfigError(
            f"attempt {attempt} of group {number} was excluded: {trajectory.fault or 'no action'}"
        )
    return _explain(settings, groups, known, (iteration, number, attempt))


def _stored(run: RunFolder, iteration: int) -> tuple[list[Group], Estimates]:
    groups, known = [], Estimates()
    for group, of_group in run.estimated(iteration):
        groups.append(group)
        known.add(of_group)
    return groups, known


def _explain(
    settings: _Settings, groups: list[Group], known: Estimates, place: Place
) -> Explanation:
    algorithm, credit = settings.algorithm, settings.credit
    group = groups[place[1] - 1]
    trajectory = group.trajectories[place[2] - 1]
    keys = [key for key, _ in group.steps() if key.attempt == place[2] - 1]
    attempts = attempts_of(group, known)
    rows = algorithm.rewards(attempts, credit)
    earned = {
        attempt.number: attempt.step_sums(row) for attempt, row in zip(attempts, rows, strict=True)
    }
    totals = {number: sum(of_steps) for number, of_steps in earned.items()}
    attempt, row = next(p for p in zip(attempts, rows, strict=True) if p[0].number == place[2] - 1)
    returns = attempt.by_step(credit.returns(attempt, row))
    seed = derive_seed(settings.seed, "iteration", place[0])
    again = known.advantages
    if not settings.own and _all_masks(algorithm):
        again = _advantages(groups, known, algorithm, credit)
    own_weights: list[float] = []
    if not settings.own:
        own_weights = _weights(settings, algorithm, groups, known, keys, seed)
    if is_warm_up := place[0] <= algorithm.critic_warmup:
        own_weights = [0.0] * len(own_weights)
    advantages = [known.advantages.get(key, ()) for key in keys]
    notes = [*_notes(settings, advantages, own_weights, is_warm_up=is_warm_up)]
    if not _close(known.advantages, again):
        notes.insert(
            0,
            "the advantages computed now differ from those stored, which are shown: an "
            "environment or an algorithm has changed since",
        )
    others = _others(settings, groups, known, keys, seed)
    return Explanation(
        place,
        group,
        trajectory,
        known,
        settings.credit_name,
        earned[attempt.number],
        [values[0] for values in returns],
        [totals.get(number) for number in range(len(group.trajectories))],
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
    """Notes for the reader of the numbers."""
    if settings.own:
        yield (
            f"{settings.name!r} is code that the run names and was not run: its advantages are "
            "those stored, counted rewards lack its terms; --trust runs it"
        )
    if not _all_masks(settings.algorithm):
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
        yield "all advantages are 0: only other terms of the loss had an effect"


def _all_masks(algorithm: Algorithm) -> bool:
    return algorithm.loss_mask and algorithm.advantage_mask


def _advantages(
    groups: list[Group], known: Estimates, algorithm: Algorithm, credit: Credit
) -> dict[StepKey, PerToken]:
    """The advantages that an algorithm computes for the groups."""
    fresh = dataclasses.replace(known, advantages={}, value_targets={})
    assign_credit(groups, fresh, algorithm, credit)
    return fresh.advantages


def _others(
    settings: _Settings,
    groups: list[Group],
    known: Estimates,
    keys: Sequence[StepKey],
    seed: int,
) -> list[Column]:
    """Advantages and weights of other algorithms for the same episodes."""
    others = []
    for name in ALGORITHMS.table:
        other_class = ALGORITHMS.resolve(name)
        if other_class.critic or other_class.demonstrated or name == settings.name:
            continue
        other = ALGORITHMS.make(ALGORITHMS.section(name))
        given = _advantages(groups, known, other, settings.credit)
        theirs = dataclasses.replace(known, advantages=given)
        weights = _weights(settings, other, groups, theirs, keys, seed)
        others.append(Column(name, [given[key] for key in keys], weights))
    return others


def _weights(
    settings: _Settings,
    algorithm: Algorithm,
    groups: list[Group],
    known: Estimates,
    keys: Sequence[StepKey],
    seed: int,
) -> list[float]:
    """Per step of a trajectory, the weight of a token in the first epoch's mini-batch that has the
    steps.
    """
    batch = batch_of(groups, known, algorithm)
    for part in minibatches(batch, settings.minibatches, derive_seed(seed, 0)):
        if any(group.number == keys[0].group for group in trained_on(part, known, algorithm)):
            weights = loss_weights(part, algorithm)
            return [weights[key].weight for key in keys]
    return [0.0] * len(keys)


def _together(columns: Sequence[Column]) -> list[Column]:
    """Merges columns with the same numbers."""
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


def _close(one: dict[StepKey, PerToken], two: dict[StepKey, PerToken]) -> bool:
    flat_one, flat_two = ([x for values in table.values() for x in values] for table in (one, two))
    return len(flat_one) == len(flat_two) and all(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
        for a, b in zip(flat_one, flat_two, strict=True)
    )
