"""Chooses the tokens to train on: the agent's own; or, in ablations only, to show the effect of the
loss mask and the advantage mask, also the environment's, as part of the action before them.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from agent_r1.algorithms.base import Algorithm
from agent_r1.algorithms.credit import Credit
from agent_r1.learner.credit_assignment import assign_credit, steps_of
from agent_r1.types import Action, Estimates, Group, Step, StepKey


class Prepares(Protocol):
    """The learner's part before credit is assigned."""

    def prepare(self, groups: list[Group], *, old: bool = False) -> Estimates: ...


class Masked:
    """The normal case: only the agent's own tokens count."""

    def credited(
        self, groups: list[Group], learner: Prepares, algorithm: Algorithm, credit: Credit
    ) -> tuple[list[Group], Estimates]:
        """The groups to train on, and the estimates of their steps, credit assigned."""
        known = learner.prepare(groups)
        assign_credit(groups, known, algorithm, credit)
        return groups, known

    def own(self, groups: list[Group], known: Estimates) -> Estimates:
        """The estimates of the agent's own tokens."""
        return known


class Unmasked(Masked):
    """The advantage mask is off: estimators walk over the environment's tokens, too. With
    ``in_loss``, so is the loss mask, and those tokens are trained on.
    """

    def __init__(self, *, in_loss: bool) -> None:
        self._in_loss = in_loss

    def credited(
        self, groups: list[Group], learner: Prepares, algorithm: Algorithm, credit: Credit
    ) -> tuple[list[Group], Estimates]:
        view = [_changed(group, {k: _merged(s) for k, s in group.steps()}) for group in groups]
        known = learner.prepare(view, old=True)
        # The environment's tokens were never sampled: the learner's log-probabilities stand in.
        for key, step in steps_of(groups).items():
            found = known.old_logprobs[key][len(step.action.token_ids) :]
            known.old_logprobs[key] = step.action.logprobs + found
        view = [_changed(g, {k: _settled(s, k, known) for k, s in g.steps()}) for g in view]
        assign_credit(view, known, algorithm, credit)
        return (view, known) if self._in_loss else (groups, self.own(groups, known))

    def own(self, groups: list[Group], known: Estimates) -> Estimates:
        counts = {key: len(step.action.token_ids) for key, step in steps_of(groups).items()}
        own = Estimates()
        for name, table in known.tables().items():
            after = name == "values"  # one number more: that of the state after the last token
            setattr(own, name, {k: row[: counts[k] + after] for k, row in table.items()})
        return own


def masks_of(algorithm: Algorithm) -> Masked:
    """The tokens that count by an algorithm's settings."""
    if algorithm.loss_mask and algorithm.advantage_mask:
        return Masked()
    return Unmasked(in_loss=not algorithm.loss_mask)


def _changed(group: Group, steps: dict[StepKey, Step]) -> Group:
    """A group with other steps in the attempts that count."""
    trajectories = list(group.trajectories)
    for attempt, trajectory in group.attempts():
        new = [step for key, step in steps.items() if key.attempt == attempt]
        trajectories[attempt] = dataclasses.replace(trajectory, steps=new)
    return Group(group.task, trajectories, group.number)


def _merged(step: Step) -> Step:
    """A step whose observation is part of its action; its log-probabilities are not known yet."""
    action, zeros = step.action, (0.0,) * len(step.observation_ids)
    merged = Action(
        action.token_ids + step.observation_ids,
        action.logprobs + zeros,
        action.entropies and action.entropies + zeros,
        action.versions,
        action.stop,
    )
    return dataclasses.replace(step, action=merged, observation_ids=())


def _settled(step: Step, key: StepKey, known: Estimates) -> Step:
    action = dataclasses.replace(step.action, logprobs=known.old_logprobs[key])
    return dataclasses.replace(step, action=action)
