"""What tokens weigh because another policy sampled them than the one that is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from agent_r1.algorithms.base import Algorithm
from agent_r1.learner.sums import by_step
from agent_r1.types import Estimates, PerToken, Step, StepKey


def importance_of(
    steps: Mapping[StepKey, Step], known: Estimates, algorithm: Algorithm
) -> dict[StepKey, PerToken]:
    """``Algorithm.importance`` of a batch's steps; empty if it has no such weights."""
    if not algorithm.corrects or not steps:
        return {}
    lengths = [len(step.action.token_ids) for step in steps.values()]
    attempts = {pair: n for n, pair in enumerate(dict.fromkeys((k[0], k[1]) for k in steps))}
    numbers = [attempts[key.group, key.attempt] for key in steps]
    old = torch.tensor([x for key in steps for x in known.old_logprobs[key]])
    sampled = torch.tensor([x for step in steps.values() for x in step.action.logprobs])
    sequences = torch.repeat_interleave(torch.tensor(numbers), torch.tensor(lengths))
    return by_step([*steps], lengths, algorithm.importance(old, sampled, sequences))
