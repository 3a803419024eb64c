"""Chooses the trajectories to train on and their weight in the loss: credit, groups with a
signal, mini-batches, weights. No torch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from agent_r1.algorithms.base import Algorithm
from agent_r1.algorithms.credit import Credit, attempts_of
from agent_r1.types import Estimates, Group, PerToken, Step, StepKey


def steps_of(groups: Sequence[Group]) -> dict[StepKey, Step]:
    """The steps of all attempts that count, by key.

    Raises:
        ValueError: Two groups have the same number, so keys are not unique.
    """
    if len({group.number for group in groups}) < len(groups):
        raise ValueError(f"groups of one rollout need numbers of their own: {groups!r:.200}")
    return {key: step for group in groups for key, step in group.steps()}


def assign_credit(
    groups: Sequence[Group], known: Estimates, algorithm: Algorithm, credit: Credit
) -> None:
    """Fills in the advantages of all steps that count, and the value targets if there is a
    critic.
    """
    attempts = [attempts_of(group, known) for group in groups]
    known.advantages |= _by_step(groups, algorithm.advantages(attempts, credit), algorithm)
    if algorithm.critic:
        targets = algorithm.value_targets(attempts, credit)
        known.value_targets |= _by_step(groups, targets, algorithm)


def _by_step(
    groups: Sequence[Group], per_token: Sequence[float], algorithm: Algorithm
) -> dict[StepKey, PerToken]:
    """What an algorithm gave, by step.

    Raises:
        ValueError: It is not one number for each action token.
    """
    steps = steps_of(groups)
    count = sum(len(step.action.token_ids) for step in steps.values())
    if len(per_token) != count or not all(isinstance(x, int | float) for x in per_token):
        raise ValueError(
            f"{type(algorithm).__name__} must give a number for each of {count} action tokens, one "
            f"attempt's after another's, not {len(per_token)} values: {per_token!r:.100}"
        )
    rest = iter(per_token)
    return {key: tuple(islice(rest, len(step.action.token_ids))) for key, step in steps.items()}


def informative(groups: list[Group], known: Estimates, algorithm: Algorithm) -> list[Group]:
    """The groups that have a learning signal; credit must be assigned."""
    return [group for group in groups if algorithm.has_signal(group, known)]


def batch_of(groups: list[Group], known: Estimates, algorithm: Algorithm) -> list[Group]:
    """The groups of an iteration's batch, over whose tokens the loss is a mean: all scored groups,
    or only those with a signal if the algorithm replaces the others.
    """
    scored = [group for group in groups if group.scored]
    return informative(scored, known, algorithm) if algorithm.replaces_groups else scored


def minibatches(groups: list[Group], count: int, seed: int) -> list[list[Group]]:
    """The groups, shuffled, in ``count`` similar parts; fewer where there are fewer groups."""
    shuffled = list(groups)
    random.Random(seed).shuffle(shuffled)
    count = min(count, len(shuffled))
    return [shuffled[part::count] for part in range(count)]


def trained_on(batch: list[Group], known: Estimates, algorithm: Algorithm) -> list[Group]:
    """The groups of a batch that need a forward pass: those with a signal; all of them with a
    critic, a KL term in the loss or an entropy term. The other groups still count in the mean.
    """
    return batch if algorithm.trains_on_all else informative(batch, known, algorithm)


@dataclass(slots=True, frozen=True)
class LossWeight:
    """The weight of a step's tokens in the loss of a mini-batch, and the number of the step's
    trajectory there.
    """

    weight: float
    sequence: int


LossWeights = Mapping[StepKey, LossWeight]


def loss_weights(groups: list[Group], algorithm: Algorithm) -> LossWeights:
    """The weights of tokens in the loss of a mini-batch, independent of its micro-batches and of
    which groups have a signal; 0 where a truncated trajectory is masked.
    """
    attempts = [(g.number, attempt, t) for g in groups for attempt, t in g.attempts()]
    kept = [not algorithm.masks(t) for _, _, t in attempts]
    counts = [t.num_action_tokens for (*_, t), keep in zip(attempts, kept, strict=True) if keep]
    weights = iter(algorithm.token_weights(counts) if counts else ())
    return {
        StepKey(group, attempt, index): weight
        for number, ((group, attempt, t), keep) in enumerate(zip(attempts, kept, strict=True))
        for weight in [LossWeight(next(weights) if keep else 0.0, number)]
        for index in range(len(t.steps))
    }
