"""The token tree: everything the agent did for one task, each token once.

The root is the task's prompt, shared by all attempts. A step adds an action node and, below it, the
observation. A rewritten history opens a branch from the prompt with a context node. Loss and
advantage
masks are not stored anywhere: they follow from the node's kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from agent_r1.types import Group, Kind, Step


@dataclass(slots=True, frozen=True)
class Node:
    """A run of tokens by one author. ``step`` is set for action nodes."""

    parent: int | None
    kind: Kind
    token_ids: tuple[int, ...]
    step: Step | None = None


@dataclass(slots=True, frozen=True)
class Branch:
    """A root-to-leaf path as one sequence.

    Attributes:
        token_ids: T ids.
        kinds: T kinds.
        actions: ``(start, step)`` for each action that this branch trains. An action shared by
            several branches is in one of them only.
    """

    token_ids: list[int]
    kinds: list[Kind]
    actions: list[tuple[int, Step]]


@dataclass(slots=True)
class TokenTree:
    """Nodes in an order in which parents come first; node 0 is the first prompt."""

    nodes: list[Node] = field(default_factory=list)

    def add(
        self, parent: int | None, kind: Kind, token_ids: tuple[int, ...], step: Step | None = None
    ) -> int:
        self.nodes.append(Node(parent, kind, token_ids, step))
        return len(self.nodes) - 1

    @property
    def num_tokens(self) -> int:
        """Unique tokens, i.e. what a forward pass that shares prefixes has to run."""
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
            path = [leaf]
            while (parent := self.nodes[path[-1]].parent) is not None:
                path.append(parent)
            branch = Branch([], [], [])
            for index in reversed(path):
                node = self.nodes[index]
                if node.step is not None and index not in trained:
                    trained.add(index)
                    branch.actions.append((len(branch.token_ids), node.step))
                branch.token_ids.extend(node.token_ids)
                branch.kinds.extend([node.kind] * len(node.token_ids))
            yield branch


def build_tree(group: Group) -> TokenTree:
    """The token tree of a group's scored trajectories.

    Two attempts with the same prompt share its node. Example: a prompt of 3 tokens and two
    attempts with one action of 2 tokens each make three nodes and 7 tokens, where separate
    sequences would have 10.
    """
    tree = TokenTree()
    prompts: dict[tuple[int, ...], int] = {}
    for trajectory in group.scored:
        if trajectory.prompt_ids not in prompts:
            prompts[trajectory.prompt_ids] = tree.add(None, Kind.OBSERVATION, trajectory.prompt_ids)
        tip = prompts[trajectory.prompt_ids]
        for step in trajectory.steps:
            if step.context_ids is not None:
                tip = tree.add(prompts[trajectory.prompt_ids], Kind.CONTEXT, step.context_ids)
            tip = tree.add(tip, Kind.ACTION, step.action.token_ids, step)
            if step.observation_ids:
                tip = tree.add(tip, Kind.OBSERVATION, step.observation_ids)
    return tree
