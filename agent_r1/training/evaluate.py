"""Evaluation: rollout without the update, on tasks that training never sees, figures by category
with intervals.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agent_r1.errors import RunError
from agent_r1.rollout.rollout import Rollout
from agent_r1.types import Group, Task, Trajectory
from agent_r1.utils.scope import run_async


@dataclass(frozen=True)
class Score:
    """Figures of some episodes; a mean over none of them is ``None``.

    Attributes:
        tasks: Episodes that count, and ``faults``: those excluded because the infrastructure
            failed.
        success: Share of successes; ``low`` and ``high`` bound its 95 % interval.
        reward: Mean outcome reward.
        turns: Mean number of steps.
        truncated: Share cut off by a limit.
        metrics: Means of the outcome's further metrics, each over the episodes that have it.
        events: What went wrong with tools, per episode: ``fault`` (the infrastructure),
            ``mistake`` (the agent), ``noise`` (injected).
    """

    tasks: int
    faults: int
    success: float | None
    low: float
    high: float
    reward: float | None
    turns: float | None
    truncated: float | None
    metrics: dict[str, float | None]
    events: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Scores over all tasks and per category, and the episodes behind them."""

    total: Score
    categories: dict[str, Score]
    groups: list[Group]
    seconds: float

    def figures(self) -> dict[str, Any]:
        """The scores as plain data."""
        by_category = {name: asdict(score) for name, score in self.categories.items()}
        return {"total": asdict(self.total), "categories": by_category, "seconds": self.seconds}


def evaluate(
    rollout: Rollout, tasks: Sequence[Task], *, temperature: float, seed: int
) -> Evaluation:
    """One attempt at each task, in the order given. ``temperature`` 0 is greedy.

    Raises:
        RunError: No episode could be scored, so there are no figures.
    """
    start = time.perf_counter()
    groups = run_async(rollout.run(tasks, attempts=1, temperature=temperature, seed=seed))
    episodes = [trajectory for group in groups for trajectory in group.trajectories]
    must_be_scored(episodes, "evaluation")
    names = sorted({episode.category for episode in episodes})
    categories = {name: score([e for e in episodes if e.category == name]) for name in names}
    return Evaluation(score(episodes), categories, groups, time.perf_counter() - start)


def must_be_scored(episodes: Sequence[Trajectory], what: str) -> None:
    """Raises ``RunError`` with the first reason if there is no outcome among the episodes."""
    if any(episode.outcome is not None for episode in episodes):
        return
    reason = next((e.fault for e in episodes if e.fault), "there were none")
    raise RunError(
        f"{what}: not one of {len(episodes)} episodes could be scored; the first: {reason}"
    )


def score(episodes: list[Trajectory]) -> Score:
    """The figures of ``episodes``; those without an outcome are counted as faults and nothing
    else.
    """
    scored = [e for e in episodes if e.outcome is not None]
    outcomes = [e.outcome for e in scored if e.outcome is not None]
    n = len(outcomes)

    def mean(values: Iterable[float]) -> float | None:
        listed = list(values)
        return math.fsum(listed) / len(listed) if listed else None

    successes = sum(outcome.success for outcome in outcomes)
    low, high = wilson(successes, n)
    events = Counter(
        event.partition("/")[0] for e in episodes for step in e.steps for event in step.events
    )
    keys = sorted({key for outcome in outcomes for key in outcome.metrics})
    return Score(
        tasks=n,
        faults=len(episodes) - n,
        success=mean(outcome.success for outcome in outcomes),
        low=low,
        high=high,
        reward=mean(outcome.reward for outcome in outcomes),
        turns=mean(len(episode.steps) for episode in scored),
        truncated=mean(episode.stop.truncated for episode in scored),
        metrics={key: mean(o.metrics[key] for o in outcomes if key in o.metrics) for key in keys},
        events={kind: count / max(1, len(episodes)) for kind, count in sorted(events.items())},
    )


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927), 95 % by default; the whole of [0, 1] if n
    is 0.
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)
