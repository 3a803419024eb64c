"""Micro-batches as padded rows, one branch each, run by plain forward passes: the reference
that packed trees are tested against, and the fallback for models that cannot run packed trees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agent_r1.learner.micro_batch import Forward
from agent_r1.model.logprobs import token_logprobs
from agent_r1.model.policy import Policy
from agent_r1.tree import Branch, build_tree
from agent_r1.types import Group, StepKey


@dataclass(slots=True, frozen=True)
class Rows:
    """B branches, padded on the right to length L.

    Attributes:
        token_ids: (B, L).
        mask: (B, L), 1 for real tokens.
        row: (A,), and ``column``: (A,): where each action token stands.
        ends: (S,), the place of each step's last token in the flattened rows; ``None`` unless asked
            for.
        keys: (S,), the steps of the action tokens.
        lengths: (S,), action tokens of each step.
    """

    token_ids: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor
    ends: Tensor | None
    keys: Sequence[StepKey]
    lengths: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())

    def forward(self, policy: Policy, temperature: float) -> Forward:
        """Logits are made only in columns where some row needs them."""
        wanted = torch.unique(self.column) - 1  # the logits at t - 1 predict token t
        output = policy.model(
            input_ids=self.token_ids,
            attention_mask=self.mask,
            use_cache=False,
            logits_to_keep=wanted,
            output_hidden_states=True,
        )
        chosen = output.logits[self.row, torch.searchsorted(wanted, self.column - 1)]
        action_ids = self.token_ids[self.row, self.column]
        logprobs, entropies = token_logprobs(chosen, action_ids, temperature)
        hidden = output.hidden_states[-1]
        after = None if self.ends is None else hidden.flatten(0, 1)[self.ends]
        return Forward(logprobs, entropies, hidden[self.row, self.column - 1], after)


def rows(
    groups: list[Group],
    *,
    max_tokens: int,
    device: torch.device,
    whole: bool = False,
    ends: bool = False,
) -> Iterator[Rows]:
    """A ``MicroBatcher``; padding counts as tokens."""
    units: list[list[Branch]] = []
    for group in groups:
        branches = [branch for branch in build_tree(group).branches() if branch.actions]
        by_attempt: dict[int, list[Branch]] = {}
        for number, branch in enumerate(branches):
            (_, _, step) = branch.actions[0]
            by_attempt.setdefault(step.attempt if whole else number, []).append(branch)
        units += by_attempt.values()
    units.sort(key=_longest)  # like lengths together: little padding
    part: list[Branch] = []
    for unit in units:
        if part and (len(part) + len(unit)) * _longest(unit) > max_tokens:
            yield _pad(part, device, ends=ends)
            part = []
        part += unit
    if part:
        yield _pad(part, device, ends=ends)


def _longest(branches: list[Branch]) -> int:
    return max(len(branch.token_ids) for branch in branches)


def _pad(branches: list[Branch], device: torch.device, *, ends: bool) -> Rows:
    length = _longest(branches)
    token_ids = torch.zeros(len(branches), length, dtype=torch.long)
    mask = torch.zeros_like(token_ids)
    row: list[int] = []
    column: list[int] = []
    lasts: list[int] = []
    for index, branch in enumerate(branches):
        token_ids[index, : len(branch.token_ids)] = torch.tensor(branch.token_ids)
        mask[index, : len(branch.token_ids)] = 1
        for start, end, _ in branch.actions:
            row += [index] * (end - start)
            column += range(start, end)
            lasts.append(index * length + end - 1)
    return Rows(
        token_ids.to(device),
        mask.to(device),
        torch.tensor(row, device=device),
        torch.tensor(column, device=device),
        torch.tensor(lasts, device=device) if ends else None,
        [step for branch in branches for _, _, step in branch.actions],
        [end - start for branch in branches for start, end, _ in branch.actions],
    )
