"""The token tree: everything the agent did for one task, each token once.

The root is the task's prompt, shared by all attempts; prompts of several tasks share their
common prefix. A step adds an action node and, below it, the observation. A rewritten history opens
a branch, with a context node, after the last unchanged node. Loss and advantage masks
are not stored anywhere: they follow from the node's kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from agent_r1.types import Group, Kind, StepKey

MIN_SHARED = 16
"""Fewest shared tokens that are worth a node; prompts sharing fewer stay apart."""


@dataclass(slots=True, frozen=True)
class Node:
    """A run of tokens by one author. ``step``: for action nodes, the key of their step."""

    parent: int | None
    kind: Kind
    token_ids: tuple[int, ...]
    step: StepKey | None = None


@dataclass(slots=True, frozen=True)
class Branch:
    """A root-to-leaf path as one sequence.

    Attributes:
        token_ids: T ids.
        kinds: T kinds.
        actions: ``(start, end, step)`` for each action that this branch trains. An action shared
            by several branches is in one of them only.
    """

    token_ids: list[int]
    kinds: list[Kind]
    actions: list[tuple[int, int, StepKey]]


@dataclass(slots=True)
class TokenTree:
    """Nodes, in no particular order."""

    nodes: list[Node] = field(default_factory=list)

    def add(
        self,
        parent: int | None,
        kind: Kind,
        token_ids: tuple[int, ...],
        step: StepKey | None = None,
    ) -> int:
        self.nodes.append(Node(parent, kind, token_ids, step))
        return len(self.nodes) - 1

    def split(self, node: int, length: int) -> int:
        """Splits a node in two and returns the new upper one; the lower one keeps the index."""
        old = self.nodes[node]
        upper = self.add(old.parent, old.kind, old.token_ids[:length])
        self.nodes[node] = Node(upper, old.kind, old.token_ids[length:], old.step)
        return upper

    def path(self, node: int) -> list[int]:
        """The nodes from the root to this one."""
        path = [node]
        while (parent := self.nodes[path[-1]].parent) is not None:
            path.append(parent)
        return path[::-1]

    @property
    def num_tokens(self) -> int:
        """Number of unique tokens: the cost of a forward pass that shares prefixes."""
        return sum(len(node.token_ids) for node in self.nodes)

    def branches(self) -> Iterator[Branch]:
        """All root-to-leaf paths; each action is listed by the first branch that runs through
        it.
        """
        parents = {node.parent for node in self.nodes}
        trained: set[int] = set()
        for leaf in range(len(self.nodes)):
            if leaf in parents:
                continue
            branch = Branch([], [], [])
            for index in self.path(leaf):
                node = self.nodes[index]
                if node.step is not None and index not in trained:
                    trained.add(index)
                    start = len(branch.token_ids)
                    branch.actions.append((start, start + len(node.token_ids), node.step))
                branch.token_ids.extend(node.token_ids)
                branch.kinds.extend([node.kind] * len(node.token_ids))
            yield branch


def build_tree(*groups: Group) -> TokenTree:
    """The token tree of the groups' scored trajectories.

    Attempts with the same prompt share its node, and prompts that begin alike share a node for
    their beginning. Example: a prompt of 3 tokens and two attempts with one action of 2 tokens
    each make three nodes and 7 tokens, where separate sequences would have 10.
    """
    tree = TokenTree()
    prompts: dict[tuple[int, ...], int] = {}
    openings = {trajectory.prompt_ids for group in groups for trajectory in group.scored}
    _add_prompts(tree, sorted(openings), None, 0, prompts)
    tip = 0
    for group in groups:
        for key, step in group.steps():
            if key.step == 0:
                tip = prompts[group.trajectories[key.attempt].prompt_ids]
            if step.context_ids is not None:
                tip = _rewrite(tree, tip, step.context_ids)
            tip = tree.add(tip, Kind.ACTION, step.action.token_ids, key)
            if step.observation_ids:
                tip = tree.add(tip, Kind.OBSERVATION, step.observation_ids)
    return tree


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two sequences, in ids."""
    a, b = list(a), list(b)
    low, high = 0, min(len(a), len(b))
    while low < high:  # comparing slices is what Python does fast
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _add_prompts(
    tree: TokenTree,
    prompts: Sequence[tuple[int, ...]],
    parent: int | None,
    depth: int,
    nodes: dict[tuple[int, ...], int],
) -> None:
    """Adds sorted prompts that are alike up to ``depth``, where ``parent`` ends; fills in
    ``nodes``.
    """
    for _, alike in itertools.groupby(prompts, key=lambda ids: ids[depth : depth + MIN_SHARED]):
        members = list(alike)
        shared = common_prefix(members[0], members[-1])  # sorted: those between share it, too
        node = tree.add(parent, Kind.OBSERVATION, members[0][depth:shared])
        if len(members[0]) == shared:
            nodes[members.pop(0)] = node
        _add_prompts(tree, members, node, shared, nodes)


def _rewrite(tree: TokenTree, tip: int, context_ids: tuple[int, ...]) -> int:
    """The node after which a rewritten history continues: the prefix shared with the old history
    is reused, the rest becomes a new context node.
    """
    kept: int | None = None
    rest = context_ids
    for node in tree.path(tip):
        ids = tree.nodes[node].token_ids
        shared = common_prefix(ids, rest)
        if shared < len(ids):
            if shared >= MIN_SHARED and tree.nodes[node].step is None:
                kept, rest = tree.split(node, shared), rest[shared:]
            break
        kept, rest = node, rest[shared:]
    return kept if kept is not None and not rest else tree.add(kept, Kind.CONTEXT, rest)
