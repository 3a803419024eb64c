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


def informative(groups: list[Group]) -> list[Group]:
    """The groups that would change the policy: some advantage is not zero."""
    return [
        group
        for group in groups
        if any(any(step.advantages or ()) for t in group.scored for step in t.steps)
    ]


def minibatches(groups: list[Group], count: int, seed: int) -> list[list[Group]]:
    """The groups, shuffled, in ``count`` parts of like size; fewer where there are fewer groups."""
    shuffled = list(groups)
    random.Random(seed).shuffle(shuffled)
    count = min(count, len(shuffled))
    return [shuffled[part::count] for part in range(count)]


@dataclass(slots=True, frozen=True)
class Share:
    """What a step's tokens weigh in the loss of a mini-batch, and the number of its trajectory."""

    weight: float
    sequence: int


Shares = dict[int, Share]
"""By ``id`` of a step; a step that is not there weighs nothing."""


def shares(groups: list[Group], algorithm: Algorithm) -> Shares:
    """What tokens weigh in the loss of a mini-batch, however it is cut into micro-batches."""
    masked = algorithm.settings.truncated == "mask"
    trajectories = [t for g in groups for t in g.scored if not (masked and t.stop.truncated)]
    if not trajectories:
        return {}
    per_token = algorithm.token_weights([t.num_action_tokens for t in trajectories])
    return {
        id(step): Share(weight, number)
        for number, (trajectory, weight) in enumerate(zip(trajectories, per_token, strict=True))
        for step in trajectory.steps
    }
