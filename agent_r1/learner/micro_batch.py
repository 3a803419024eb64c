"""Input of the learner: the action tokens of a micro-batch, and the protocol of its two forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from agent_r1.learner.credit_assignment import LossWeights
from agent_r1.model.policy import Policy
from agent_r1.types import Estimates, Group, PerToken, Step, StepKey


@dataclass(slots=True, frozen=True)
class Actions:
    """Inputs of the loss for the action tokens of a micro-batch, A in all, step after step.

    Attributes:
        sampling_logprobs: (A,), as sampled.
        old_logprobs: (A,), those that ratios are relative to.
        reference_logprobs: (A,), or ``None`` without a KL term in the loss.
        advantages: (A,).
        old_values, value_targets: (A,), or ``None`` without a critic.
        weights: (A,), what each token weighs in the loss of the whole mini-batch.
        sequences: (A,), the number of each token's trajectory.
        importance: (A,), see ``Algorithm.importance``, or ``None`` where all weigh alike.
    """

    sampling_logprobs: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor | None
    advantages: Tensor
    old_values: Tensor | None
    value_targets: Tensor | None
    weights: Tensor
    sequences: Tensor
    importance: Tensor | None = None

    @classmethod
    def of(cls, keys: Sequence[StepKey], batch: Batch, device: torch.device) -> Actions:
        """Credit must be assigned."""
        known, actions = batch.known, [batch.steps[key].action for key in keys]

        def flat(values: Callable[[StepKey], PerToken]) -> Tensor:
            listed = [value for key in keys for value in values(key)]
            return torch.tensor(listed, dtype=torch.float32, device=device)

        def of_table(table: Mapping[StepKey, PerToken]) -> Tensor | None:
            return flat(table.__getitem__) if all(key in table for key in keys) else None

        values = {key: row[:-1] for key in keys if (row := known.values.get(key))}
        sampled = {key: action.logprobs for key, action in zip(keys, actions, strict=True)}
        of = [batch.weights[key] for key in keys]
        counts = [len(action.token_ids) for action in actions]
        numbers = [s.sequence for s, count in zip(of, counts, strict=True) for _ in range(count)]
        weights = [s.weight for s, count in zip(of, counts, strict=True) for _ in range(count)]
        return cls(
            sampling_logprobs=flat(sampled.__getitem__),
            old_logprobs=flat(lambda key: known.old_logprobs.get(key) or sampled[key]),
            reference_logprobs=of_table(known.reference_logprobs),
            advantages=flat(known.advantages.__getitem__),
            old_values=of_table(values),
            value_targets=of_table(known.value_targets),
            weights=torch.tensor(weights, dtype=torch.float32, device=device),
            sequences=torch.tensor(numbers, dtype=torch.long, device=device),
            importance=of_table(batch.importance),
        )


@dataclass(slots=True, frozen=True)
class Batch:
    """The steps of a mini-batch: the sampled data, the estimates, the weights of their tokens in
    its loss, and those of importance, if any.
    """

    steps: Mapping[StepKey, Step]
    known: Estimates
    weights: LossWeights
    importance: Mapping[StepKey, PerToken] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Forward:
    """Results of one forward pass for the A action tokens of S steps.

    Attributes:
        logprobs, entropies: (A,).
        before: (A, W), the last hidden state before each action token.
        after: (S, W), that of each step's last token; ``None`` unless the cut kept ``ends``.
    """

    logprobs: Tensor
    entropies: Tensor
    before: Tensor
    after: Tensor | None


class MicroBatch(Protocol):
    """The input of one forward and backward pass."""

    @property
    def keys(self) -> Sequence[StepKey]:
        """Steps whose actions are trained, each in one micro-batch only."""
        ...

    @property
    def lengths(self) -> Sequence[int]:
        """(S,), action tokens of each of these steps."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens run, padding not counted."""
        ...

    def forward(self, policy: Policy, temperature: float) -> Forward: ...


class MicroBatcher(Protocol):
    """Cuts trajectories into micro-batches of at most ``max_tokens`` tokens, or one branch.

    The cut does not change results: weights are relative to the mini-batch as a whole. With
    ``whole``, all branches of a trajectory (several, if its history was rewritten) are in one
    micro-batch. With ``ends``, states after the last tokens are computed, too.
    """

    def __call__(
        self,
        groups: list[Group],
        *,
        max_tokens: int,
        device: torch.device,
        whole: bool = False,
        ends: bool = False,
    ) -> Iterator[MicroBatch]: ...
