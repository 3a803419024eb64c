"""From scored trajectories to what the learner trains on: credit, groups with a signal,
mini-batches, and the action tokens of a micro-batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from agent_r1.algorithms.base import Algorithm, Credit
from agent_r1.policy import Policy
from agent_r1.types import Group, Step


def assign_credit(groups: list[Group], algorithm: Algorithm, credit: Credit) -> None:
    """Fills in ``Step.advantages`` of all scored trajectories."""
    for group in groups:
        advantages = algorithm.advantages(group, credit)
        for trajectory, per_step in zip(group.scored, advantages, strict=True):
            for step, values in zip(trajectory.steps, per_step, strict=True):
                step.advantages = tuple(values)


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
class Actions:
    """The action tokens of a micro-batch, A in all, step after step.

    Attributes:
        steps: Whose they are.
        token_ids: (A,).
        sampling_logprobs: (A,).
        advantages: (A,).
        weights: (A,), what each token weighs in the loss of the whole mini-batch.
    """

    steps: Sequence[Step]
    token_ids: Tensor
    sampling_logprobs: Tensor
    advantages: Tensor
    weights: Tensor

    @classmethod
    def of(cls, steps: Sequence[Step], weights: StepWeights, device: torch.device) -> Actions:
        """Credit must be assigned."""

        def flat(values: Callable[[Step], Sequence[float] | None]) -> Tensor:
            listed = [value for step in steps for value in values(step) or ()]
            return torch.tensor(listed, dtype=torch.float32, device=device)

        ids = [token_id for step in steps for token_id in step.action.token_ids]
        assert all(step.advantages is not None for step in steps), "credit comes before batches"
        return cls(
            steps,
            torch.tensor(ids, device=device),
            flat(lambda step: step.action.logprobs),
            flat(lambda step: step.advantages),
            flat(lambda step: [weights[id(step)]] * len(step.action.token_ids)),
        )


StepWeights = dict[int, float]
"""By ``id`` of a step, what each of its tokens weighs."""


def step_weights(groups: list[Group], algorithm: Algorithm) -> StepWeights:
    """What tokens weigh in the loss of a mini-batch, however it is cut into micro-batches."""
    trajectories = [trajectory for group in groups for trajectory in group.scored]
    per_token = algorithm.token_weights([t.num_action_tokens for t in trajectories])
    return {
        id(step): weight
        for trajectory, weight in zip(trajectories, per_token, strict=True)
        for step in trajectory.steps
    }


class MicroBatch(Protocol):
    """What one forward and backward pass runs."""

    @property
    def actions(self) -> Actions: ...

    @property
    def num_tokens(self) -> int:
        """Tokens run, padding not counted."""
        ...

    def logprobs(self, policy: Policy, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (A,) of the action tokens."""
        ...


class Cut(Protocol):
    """Cuts a mini-batch into micro-batches of at most ``max_tokens`` tokens, or one branch.

    How it is cut changes nothing: weights are relative to the mini-batch as a whole.
    """

    def __call__(
        self, groups: list[Group], weights: StepWeights, *, max_tokens: int, device: torch.device
    ) -> Iterator[MicroBatch]: ...
