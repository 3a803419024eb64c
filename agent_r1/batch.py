"""From scored trajectories to what the learner runs: credit, groups with a signal, mini-batches,
padded rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from agent_r1.algorithms.base import Algorithm, Credit
from agent_r1.tree import Branch, build_tree
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
class Rows:
    """A micro-batch: branches as rows, padded on the right. B rows of length L, A action tokens in
    all.

    Attributes:
        token_ids: (B, L).
        mask: (B, L), 1 for real tokens.
        row: (A,), and ``column``: (A,): where each action token stands.
        sampling_logprobs: (A,).
        advantages: (A,).
        weights: (A,), what each token weighs in the loss of the whole mini-batch.
        steps: The steps in the order of their tokens.
    """

    token_ids: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor
    sampling_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    steps: list[Step]

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())


def microbatches(
    groups: list[Group], algorithm: Algorithm, *, max_tokens: int, device: torch.device
) -> Iterator[Rows]:
    """Cuts a mini-batch into rows of at most ``max_tokens`` positions, padding included, or one
    row.

    How it is cut changes nothing: weights are relative to the mini-batch as a whole.
    """
    trajectories = [trajectory for group in groups for trajectory in group.scored]
    token_weights = algorithm.token_weights([t.num_action_tokens for t in trajectories])
    weights = {
        id(step): weight
        for trajectory, weight in zip(trajectories, token_weights, strict=True)
        for step in trajectory.steps
    }
    branches = [
        branch for group in groups for branch in build_tree(group).branches() if branch.actions
    ]
    branches.sort(key=lambda branch: len(branch.token_ids))  # like lengths together: little padding
    part: list[Branch] = []
    for branch in branches:
        if part and (len(part) + 1) * len(branch.token_ids) > max_tokens:
            yield _rows(part, weights, device)
            part = []
        part.append(branch)
    if part:
        yield _rows(part, weights, device)


def _rows(branches: list[Branch], weights: dict[int, float], device: torch.device) -> Rows:
    length = max(len(branch.token_ids) for branch in branches)
    token_ids = torch.zeros(len(branches), length, dtype=torch.long)
    mask = torch.zeros_like(token_ids)
    row: list[int] = []
    column: list[int] = []
    logprobs: list[float] = []
    advantages: list[float] = []
    token_weights: list[float] = []
    steps: list[Step] = []
    for index, branch in enumerate(branches):
        token_ids[index, : len(branch.token_ids)] = torch.tensor(branch.token_ids)
        mask[index, : len(branch.token_ids)] = 1
        for start, step in branch.actions:
            assert step.advantages is not None, "credit comes before batches"
            count = len(step.action.token_ids)
            row += [index] * count
            column += range(start, start + count)
            logprobs += step.action.logprobs
            advantages += step.advantages
            token_weights += [weights[id(step)]] * count
            steps.append(step)
    return Rows(
        token_ids.to(device),
        mask.to(device),
        torch.tensor(row, device=device),
        torch.tensor(column, device=device),
        torch.tensor(logprobs, device=device),
        torch.tensor(advantages, device=device),
        torch.tensor(token_weights, device=device),
        steps,
    )
