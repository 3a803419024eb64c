"""The metrics of an iteration: a row of ``metrics.jsonl``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from agent_r1.learner.learner import Update
from agent_r1.training.evaluate import score
from agent_r1.types import Estimates, Group


class Clock:
    """Wall seconds by part of an iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def figures_of(
    groups: list[Group],
    used: list[Group],
    known: Estimates,
    update: Update,
    shaped: float | None,
    lr: float,
    clock: Clock,
    sampling_seconds: float,
) -> dict[str, Any]:
    """The metrics of one iteration. Figures that depend on the machine's speed are kept
    apart, and so are the outcome and ``shaped``, the reward that was learned from. Means are over
    the scored episodes, those with an outcome; a mean over none is ``None``.
    """
    episodes = [trajectory for group in groups for trajectory in group.trajectories]
    steps = [step for episode in episodes for step in episode.steps]
    entropies = [entropy for step in steps for entropy in step.action.entropies]
    entropies = entropies or [x for row in update.entropies.values() for x in row]
    total = score(episodes)
    imitated = bool(steps) and not any(step.action.logprobs for step in steps)
    scored = [episode for episode in episodes if episode.outcome is not None]
    sampled_tokens = sum(episode.num_action_tokens for episode in episodes)
    figures: dict[str, Any] = {
        # Demonstrations succeed because they were chosen so.
        "success": None if imitated else total.success,
        "reward": total.reward,
        "shaped": shaped,
        **total.metrics,
        "entropy": _mean(entropies),
        "action_tokens": _mean([episode.num_action_tokens for episode in scored]),
        "tokens": _mean([episode.num_tokens for episode in scored]),
        "turns": _mean([len(episode.steps) for episode in scored]),
        "tool_calls": _mean([episode.num_calls for episode in scored]),
        "resampled": sum(episode.discarded for episode in episodes),
        "groups_used": len(used),
        "groups_without_signal": len(groups) - len(used),
        **_of_importance(groups, known),
        **_of_masks(update),
        **_of_update(update),
        "lr": lr,
    }
    for episode in episodes:
        _count(figures, f"stop/{episode.stop}")
    for episode in scored:
        for part, value in episode.process_reward().items():
            _count(figures, f"process/{part}", value / len(scored))
    lost = (event for episode in episodes for event in episode.discarded_events)
    for event in (*lost, *(event for step in steps for event in step.events)):
        _count(figures, event if "/" in event else f"event/{event}")  # no figure's own name
    return {
        "figures": figures,
        "skipped": update.skipped,
        "seconds": {**clock.seconds, "total": clock.total},
        "env_seconds": _percentiles([step.env_seconds for step in steps]),
        "tokens_per_second": {
            "generated": sampled_tokens / sampling_seconds,
            "trained": update.num_tokens / clock.seconds["learner"],
        },
        "memory_gib": _memory(),
    }


def ages_of(groups: list[Group], iteration: int) -> dict[str, float]:
    """How many updates older than the policy that is trained the one was that sampled: the mean
    over tokens, the largest, and the share of tokens of each age.
    """
    counts: dict[int, int] = {}
    for step in (s for group in groups for t in group.trajectories for s in t.steps):
        for version, start, end in step.action.versions:
            age = iteration - 1 - version
            counts[age] = counts.get(age, 0) + end - start
    if not (total := sum(counts.values())):
        return {}
    return {
        "age/mean": sum(age * count for age, count in counts.items()) / total,
        "age/max": max(counts),
        **{f"age/{age}": counts[age] / total for age in sorted(counts)},
    }


def _of_importance(groups: list[Group], known: Estimates) -> dict[str, Any]:
    """How far the policy that sampled is from the one that the update starts from, as the learner
    computes both; nothing where that was not computed (without ``importance_cap``).

    The effective sample size is Kish's, (sum w)^2 / (n sum w^2), as a share of the n tokens.
    """
    steps = {key: step for group in groups for key, step in group.steps()}
    weights = [
        math.exp(min(ours - theirs, 20.0))
        for key, step in steps.items()
        if key in known.old_logprobs and step.action.logprobs
        for ours, theirs in zip(known.old_logprobs[key], step.action.logprobs, strict=True)
    ]
    if not weights:
        return {}
    squares = math.fsum(weight * weight for weight in weights)
    return {
        "importance/outside": _mean([not 0.9 <= weight <= 1.1 for weight in weights]),
        "importance/effective": math.fsum(weights) ** 2 / (len(weights) * squares),
    }


def _of_masks(update: Update) -> dict[str, Any]:
    """The share of tokens that weigh nothing by their importance."""
    weights = [weight for row in update.importance.values() for weight in row]
    return {"importance/masked": _mean([weight == 0 for weight in weights])} if weights else {}


def _of_update(update: Update) -> dict[str, Any]:
    critic = {"value_loss": update.value_loss, "explained_variance": update.explained_variance}
    return {
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "kl": update.kl,
        **(critic if update.explained_variance is not None else {}),
        "clip_fraction": update.clip_fraction,
        "logprob_error": update.logprob_error,
        "updates": update.num_steps,
        "updates_skipped": len(update.skipped),
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _memory() -> dict[str, float]:
    """GiB of the process, and the most that PyTorch has had on its GPU."""
    found = {"process": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.max_memory_allocated()
    return {name: num_bytes / 2**30 for name, num_bytes in found.items()}


def _percentiles(values: list[float]) -> dict[str, float]:
    """50th and 99th percentile of the seconds that steps waited for their environment."""
    ranked = sorted(values)
    last = len(ranked) - 1
    return {f"p{p}": ranked[round(p / 100 * last)] for p in (50, 99)} if ranked else {}


def _count(figures: dict[str, Any], key: str, amount: float = 1) -> None:
    figures[key] = figures.get(key, 0) + amount
