"""What the loss mask and the advantage mask are for, by switching them off: trajectories in which
every token that the environment wrote counts as part of the action before it. For ablations alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from agent_r1.algorithms.base import Algorithm
from agent_r1.types import Action, Group, Step


def masks_of(algorithm: Algorithm) -> tuple[bool, bool]:
    """Whether the loss mask and the advantage mask are on."""
    return algorithm.settings.loss_mask, getattr(algorithm.settings, "advantage_mask", True)


def unmasked(groups: list[Group]) -> list[Group]:
    """The same groups with observations as actions. Their log-probabilities are not known yet: the
    learner must prepare them with ``old=True``, then ``settle``.
    """
    return [
        Group(
            group.task,
            [
                dataclasses.replace(trajectory, steps=[_merged(step) for step in trajectory.steps])
                for trajectory in group.trajectories
            ],
        )
        for group in groups
    ]


def _merged(step: Step) -> Step:
    action, zeros = step.action, (0.0,) * len(step.observation_ids)
    merged = Action(
        action.token_ids + step.observation_ids,
        action.logprobs + zeros,
        action.entropies + zeros,
        action.policy_version,
        action.stop,
    )
    return dataclasses.replace(step, action=merged, observation_ids=())


def settle(view: list[Group], groups: list[Group]) -> None:
    """Gives the environment's tokens of ``view`` the log-probabilities that the learner found, and
    the agent's own those they were sampled with.
    """
    for merged, step in _pairs(view, groups):
        assert merged.old_logprobs is not None, "the learner prepares first"
        count = len(step.action.token_ids)
        logprobs = step.action.logprobs + merged.old_logprobs[count:]
        merged.action = dataclasses.replace(merged.action, logprobs=logprobs)
        merged.old_logprobs = logprobs


def copy_back(view: list[Group], groups: list[Group]) -> None:
    """What was found out in ``view`` about the agent's own tokens, written into ``groups``."""
    for merged, step in _pairs(view, groups):
        count = len(step.action.token_ids)
        for name in ("reference_logprobs", "old_logprobs", "advantages", "value_targets", "ratios"):
            values = getattr(merged, name)
            setattr(step, name, None if values is None else values[:count])
        step.values = None if merged.values is None else merged.values[: count + 1]


def _pairs(view: list[Group], groups: list[Group]) -> Iterator[tuple[Step, Step]]:
    for seen, group in zip(view, groups, strict=True):
        for one, other in zip(seen.scored, group.scored, strict=True):
            yield from zip(one.steps, other.steps, strict=True)
