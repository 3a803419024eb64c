"""From scored trajectories to what is trained on and how much it counts: credit, groups with a
signal, mini-batches, weights. No torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from agent_r1.algorithms.base import Algorithm
from agent_r1.algorithms.credit import Credit
from agent_r1.types import Group


def assign_credit(groups: Sequence[Group], algorithm: Algorithm, credit: Credit) -> None:
    """Fills in ``Step.advantages`` of all scored trajectories, and ``value_targets`` if there is a
    critic.
    """
    for group, of_group in zip(groups, algorithm.advantages(groups, credit), strict=True):
        for trajectory, per_step in zip(group.scored, of_group, strict=True):
            for step, values in zip(trajectory.steps, per_step, strict=True):
                step.advantages = tuple(values)
    if not algorithm.critic:
        return
    for group, of_group in zip(groups, algorithm.value_targets(groups, credit), strict=True):
        for trajectory, per_step in zip(group.scored, of_group, strict=True):
            for step, values in zip(trajectory.steps, per_step, strict=True):
                step.value_targets = tuple(values)


def informative(groups: list[Group], algorithm: Algorithm) -> list[Group]:
    """The groups that have something to tell the policy; credit is assigned."""
    return [group for group in groups if algorithm.has_signal(group)]


def batch_of(groups: list[Group], algorithm: Algorithm) -> list[Group]:
    """The groups of an iteration's batch, whose tokens the loss is a mean over: all that were
    scored, but for an algorithm that replaces those without a signal.
    """
    scored = [group for group in groups if group.scored]
    return informative(scored, algorithm) if algorithm.replaces_groups else scored


def minibatches(groups: list[Group], count: int, seed: int) -> list[list[Group]]:
    """The groups, shuffled, in ``count`` parts of like size; fewer where there are fewer groups."""
    shuffled = list(groups)
    random.Random(seed).shuffle(shuffled)
    count = min(count, len(shuffled))
    return [shuffled[part::count] for part in range(count)]


def trained_on(batch: list[Group], algorithm: Algorithm) -> list[Group]:
    """The groups of a batch that have to be run: those with a signal; all of them for a critic, and
    where a KL or an entropy term pulls at every token. The others count in its mean all the same.
    """
    return batch if algorithm.trains_on_all else informative(batch, algorithm)


@dataclass(slots=True, frozen=True)
class LossWeight:
    """What a step's tokens weigh in the loss of a mini-batch, and the number of its trajectory
    there.
    """

    weight: float
    sequence: int


LossWeights = dict[int, LossWeight]
"""By ``id`` of a step."""


def loss_weights(groups: list[Group], algorithm: Algorithm) -> LossWeights:
    """What tokens weigh in the loss of a mini-batch, however it is cut into micro-batches, and
    whichever of its groups have a signal; nothing where a truncated trajectory is masked.
    """
    trajectories = [t for g in groups for t in g.scored]
    kept = [not algorithm.masks(t) for t in trajectories]
    counts = [t.num_action_tokens for t, keep in zip(trajectories, kept, strict=True) if keep]
    weights = iter(algorithm.token_weights(counts) if counts else ())
    per_trajectory = [next(weights) if keep else 0.0 for keep in kept]
    return {
        id(step): LossWeight(weight, number)
        for number, (trajectory, weight) in enumerate(
            zip(trajectories, per_trajectory, strict=True)
        )
        for step in trajectory.steps
    }
