"""Micro-batches as padded rows, one branch each, run by plain forward passes: the oracle that
packed trees are tested against, and the way of models whose trees cannot be packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from agent_r1.batch import Actions, StepWeights
from agent_r1.logprobs import token_logprobs
from agent_r1.policy import Policy
from agent_r1.tree import Branch, build_tree
from agent_r1.types import Group


@dataclass(slots=True, frozen=True)
class Rows:
    """B branches, padded on the right to length L.

    Attributes:
        token_ids: (B, L).
        mask: (B, L), 1 for real tokens.
        row: (A,), and ``column``: (A,): where each action token stands.
        actions: The A action tokens.
    """

    token_ids: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor
    actions: Actions

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())

    def logprobs(self, policy: Policy, temperature: float) -> tuple[Tensor, Tensor]:
        """Logits are made only in columns where some row needs them."""
        wanted = torch.unique(self.column) - 1  # the logits at t - 1 predict token t
        logits = policy.model(
            input_ids=self.token_ids,
            attention_mask=self.mask,
            use_cache=False,
            logits_to_keep=wanted,
        ).logits
        chosen = logits[self.row, torch.searchsorted(wanted, self.column - 1)]
        return token_logprobs(chosen, self.actions.token_ids, temperature)


def rows(
    groups: list[Group], weights: StepWeights, *, max_tokens: int, device: torch.device
) -> Iterator[Rows]:
    """A ``Cut``; padding counts as tokens."""
    branches = [
        branch for group in groups for branch in build_tree(group).branches() if branch.actions
    ]
    branches.sort(key=lambda branch: len(branch.token_ids))  # like lengths together: little padding
    part: list[Branch] = []
    for branch in branches:
        if part and (len(part) + 1) * len(branch.token_ids) > max_tokens:
            yield _pad(part, weights, device)
            part = []
        part.append(branch)
    if part:
        yield _pad(part, weights, device)


def _pad(branches: list[Branch], weights: StepWeights, device: torch.device) -> Rows:
    length = max(len(branch.token_ids) for branch in branches)
    token_ids = torch.zeros(len(branches), length, dtype=torch.long)
    mask = torch.zeros_like(token_ids)
    row: list[int] = []
    column: list[int] = []
    for index, branch in enumerate(branches):
        token_ids[index, : len(branch.token_ids)] = torch.tensor(branch.token_ids)
        mask[index, : len(branch.token_ids)] = 1
        for start, step in branch.actions:
            count = len(step.action.token_ids)
            row += [index] * count
            column += range(start, start + count)
    steps = [step for branch in branches for _, step in branch.actions]
    return Rows(
        token_ids.to(device),
        mask.to(device),
        torch.tensor(row, device=device),
        torch.tensor(column, device=device),
        Actions.of(steps, weights, device),
    )
