"""Micro-batches as packed trees: every node once, no padding, logits only where an action token is
predicted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agent_r1.learner.micro_batch import Forward
from agent_r1.model.policy import Policy
from agent_r1.model.tree_attention import PackedTree, Span, Tree
from agent_r1.tree import TokenTree, build_tree
from agent_r1.types import Group, StepKey


@dataclass(slots=True, frozen=True)
class Pack:
    """T tokens of a tree, depth first, with A action tokens of S steps to predict.

    Attributes:
        token_ids: (T,).
        positions: (T,), of each token in its sequence.
        predictors: (A,), the index of the token before each action token.
        action_ids: (A,).
        ends: (S,), the index of each step's last token; ``None`` unless asked for.
        tree: Which tokens attend to which.
        keys: (S,), the steps of the action tokens.
        lengths: (S,), action tokens of each step.
    """

    token_ids: Tensor
    positions: Tensor
    predictors: Tensor
    action_ids: Tensor
    ends: Tensor | None
    tree: Tree
    keys: Sequence[StepKey]
    lengths: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def forward(self, policy: Policy, temperature: float) -> Forward:
        hidden = policy.hidden(self.token_ids, self.positions, self.tree)
        before = hidden[self.predictors]
        logprobs, entropies = policy.logprobs(before, self.action_ids, temperature)
        return Forward(
            logprobs, entropies, before, None if self.ends is None else hidden[self.ends]
        )


def packs(
    groups: list[Group],
    *,
    max_tokens: int,
    device: torch.device,
    whole: bool = False,
    ends: bool = False,
    attention: Literal["parts", "flex"] = "parts",
) -> Iterator[Pack]:
    """A ``MicroBatcher``: branches of at most ``max_tokens`` tokens together; tokens that
    branches share count once. ``attention``: see ``LearnerSettings``.
    """
    pack = functools.partial(_pack, device=device, ends=ends, attention=attention)
    tree = build_tree(*groups)
    trained: set[int] = set()
    part: set[int] = set()
    num_tokens = 0
    for path in _together(tree) if whole else _paths(tree):
        size = sum(len(tree.nodes[node].token_ids) for node in path if node not in part)
        if part and num_tokens + size > max_tokens:
            yield pack(tree, part, trained)
            part = set()
            size = sum(len(tree.nodes[node].token_ids) for node in path)
            num_tokens = 0
        part.update(path)
        num_tokens += size
    if part:
        yield pack(tree, part, trained)


def _tree(spans: Sequence[Span], device: torch.device, attention: str) -> Tree:
    if attention == "parts":
        return PackedTree(spans, device)
    from agent_r1.model.flex_tree import FlexTree  # half a second, and only GPUs have a use for it

    return FlexTree(spans, device)


def _together(tree: TokenTree) -> list[list[int]]:
    """The nodes of each trajectory's paths."""
    nodes: dict[tuple[int, int], dict[int, None]] = {}
    for path in _paths(tree):
        step = tree.nodes[path[-1]].step
        assert step is not None, "a path ends with an action"
        nodes.setdefault((step.group, step.attempt), {}).update(dict.fromkeys(path))
    return [list(of_trajectory) for of_trajectory in nodes.values()]


def _paths(tree: TokenTree) -> Iterator[list[int]]:
    """The root-to-node paths that end with an action with no further action below, depth first."""
    children = _children(tree, range(len(tree.nodes)))
    stack = [[root] for root in reversed(children.get(None, []))]
    while stack:
        path = stack.pop()
        below = children.get(path[-1], [])
        stack += [[*path, child] for child in reversed(below)]
        if not below and any(tree.nodes[node].step for node in path):
            while tree.nodes[path[-1]].step is None:
                path.pop()
            yield path


def _children(tree: TokenTree, nodes: Iterable[int]) -> dict[int | None, list[int]]:
    children: dict[int | None, list[int]] = {}
    for node in nodes:
        children.setdefault(tree.nodes[node].parent, []).append(node)
    return children


def _pack(
    tree: TokenTree,
    part: set[int],
    trained: set[int],
    *,
    device: torch.device,
    ends: bool,
    attention: str,
) -> Pack:
    """Lays out some nodes of a tree; an action already in ``trained`` is run but not trained."""
    layout = _Layout(tree, _children(tree, sorted(part)), trained, ends=ends)
    for root in layout.children[None]:
        layout.lay(root, position=0, last=-1)
    trained |= {node for node in part if tree.nodes[node].step is not None}
    return Pack(
        torch.tensor(layout.token_ids, device=device),
        torch.tensor(layout.positions, device=device),
        torch.tensor(layout.predictors, device=device),
        torch.tensor(layout.action_ids, device=device),
        torch.tensor(layout.lasts, device=device) if ends else None,
        _tree(layout.spans, device, attention),
        layout.keys,
        layout.lengths,
    )


class _Layout:
    """Nodes laid out one after another, a node before its children."""

    def __init__(
        self,
        tree: TokenTree,
        children: dict[int | None, list[int]],
        trained: set[int],
        *,
        ends: bool,
    ) -> None:
        self.tree, self.children, self.trained, self.ends = tree, children, trained, ends
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.predictors: list[int] = []
        self.spans: list[Span] = []
        self.lasts: list[int] = []
        self.action_ids: list[int] = []
        self.keys: list[StepKey] = []
        self.lengths: list[int] = []

    def lay(self, node: int, *, position: int, last: int) -> None:
        """Adds the unbranched chain of nodes from ``node`` on, then the branches below it.

        ``position``: the place of its first token in its sequence; ``last``: index of the token
        before.
        """
        start, begin = len(self.token_ids), position
        while True:
            ids, step = self.tree.nodes[node].token_ids, self.tree.nodes[node].step
            below = self.children.get(node, [])
            if step is not None and node not in self.trained:
                first = len(self.token_ids)
                self.predictors += [last, *range(first, first + len(ids) - 1)]
                self.lasts.append(first + len(ids) - 1)
                self.action_ids += ids
                self.keys.append(step)
                self.lengths.append(len(ids))
            # Usually no prediction is needed after the very last token.
            kept = ids if below or self.ends else ids[:-1]
            self.token_ids += kept
            self.positions += range(position, position + len(kept))
            position += len(kept)
            last = len(self.token_ids) - 1 if kept else last
            if len(below) != 1:
                break
            (node,) = below
        end, slot = len(self.token_ids), len(self.spans)
        if end > start:
            self.spans.append(Span(start, end, end, begin))
        for child in below:
            self.lay(child, position=position, last=last)
        if below and end > start:
            self.spans[slot] = Span(start, end, len(self.token_ids), begin)
