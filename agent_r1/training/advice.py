"""Advice to the user while a change still helps: named warnings, each with what was seen and what
to do next. Names go into the metrics, texts to the console.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from agent_r1.errors import ConfigError
from agent_r1.run.recipe import Recipe
from agent_r1.types import Group, StopReason, Task, Trajectory

Advice = dict[str, str]
"""Words by name."""
SMALL = 30
"""Tasks of an evaluation below which its interval is wider than most differences."""
MOST = 0.75
LIMITS = {
    StopReason.MAX_TURNS: "limits.turns",
    StopReason.MAX_TOKENS: "limits.tokens or limits.tokens_per_turn",
    StopReason.MAX_TIME: "limits.seconds",
    StopReason.MAX_MEMORY: "engine.cache_gib",
}


def must_fit(prompt_ids: Sequence[int], task: Task, limit: int) -> None:
    """Raises ``ConfigError`` for a prompt that leaves no room for a single token."""
    if len(prompt_ids) >= limit:
        raise ConfigError(
            f"limits.tokens = {limit}: the prompt of task {task.id!r} alone has "
            f"{len(prompt_ids)} tokens, so that the agent could say nothing; raise it, or shorten "
            "the system message and the tools' descriptions"
        )


def on_sets(recipe: Recipe, sizes: Mapping[str, int]) -> Advice:
    """Advice on the number of evaluation tasks; ``sizes`` by split."""
    settings = recipe.evaluation
    asked = {"validation": settings.tasks if settings.every else 0, "test": settings.test_tasks}
    few = {
        split: f"{split} has {min(num, size)} tasks"
        + (f" of {num} asked for" if num > size else "")
        for split, num in asked.items()
        if num and min(num, size := sizes.get(split, num)) < SMALL
    }
    if not few:
        return {}
    cure = "add tasks" + (", or raise env.holdout" if hasattr(recipe.env, "holdout") else "")
    which = " and ".join(few.values())
    return {"small-sets": f"{which}: too few to tell progress from luck; {cure}"}


def on_demonstrations(trajectories: Sequence[Trajectory], *, has_tools: bool) -> Advice:
    """Advice on demonstrations."""
    silent = [t for t in trajectories if not t.num_calls]
    if not has_tools or not silent or len(silent) < MOST * len(trajectories):
        return {}
    return {
        "no-tool-shown": f"{len(silent)} of {len(trajectories)} demonstrations use no tool: "
        "imitating them teaches not to; let gold() write the calls, then the answer (for the "
        "multi-hop data: give 'supporting' titles or a 'decomposition')"
    }


def on_iteration(
    recipe: Recipe,
    groups: Sequence[Group],
    figures: Mapping[str, Any],
    before: Mapping[str, Any],
    *,
    has_tools: bool,
    run: str,
) -> Advice:
    """Advice on an iteration.

    Args:
        recipe: The run's recipe.
        groups: Groups of episodes played.
        figures: Metrics of this iteration, which ``iterations_without_signal`` includes.
        before: The row of metrics of the iteration before.
        has_tools: Whether the agent has tools.
        run: The run folder, for commands.
    """
    episodes = [t for group in groups for t in group.trajectories if t.outcome is not None]
    said = before.get("advice", {})
    advice: Advice = {}
    mute = [t for t in episodes if not t.steps and t.stop is StopReason.MAX_TOKENS]
    if mute and "prompt-too-long" not in said:
        advice["prompt-too-long"] = (
            f"{len(mute)} of {len(episodes)} episodes had no room for a single token: their "
            f"prompts reach limits.tokens = {recipe.limits.tokens}; raise it, or leave them out"
        )
    silent = figures["iterations_without_signal"]
    is_due = silent == 2 or (silent and silent % 10 == 0)
    if is_due and (figures.get("success") or 0.0) >= 0.8:
        advice["no-signal"] = (
            f"nothing to learn from in {silent} iterations: most tasks are solved; harder ones "
            "teach more, or stop here"
        )
    elif is_due:
        advice["no-signal"] = (
            f"nothing to learn from in {silent} iterations: {_seen(recipe, episodes, has_tools)}. "
            f"`agent-r1 explain {run}` shows what was tried. What helps: easier tasks, more "
            "train.attempts, process rewards ([credit] name = 'step'), or a warm start first "
            "(`agent-r1 sft RECIPE`)"
        )
    stop, count = _commonest_limit(episodes)
    many = stop is not None and count >= MOST * len(episodes)
    if stop is not None and many and not mute and "one-stop" not in said:
        advice["one-stop"] = (
            f"{count} of {len(episodes)} episodes stopped at {stop}: {LIMITS[stop]} cuts off most "
            "of what is tried; raise it, or ask the agent for less"
        )
    return advice


def _seen(recipe: Recipe, episodes: Sequence[Trajectory], has_tools: bool) -> str:
    rewards = Counter(t.outcome.reward for t in episodes if t.outcome is not None)
    parts = [f"in each group all attempts earn the same (reward {_shares(rewards, len(episodes))})"]
    mute = sum(not t.num_calls for t in episodes)
    if has_tools and mute:
        parts.append(f"{mute} of {len(episodes)} made no well-formed call")
    stop, count = _commonest_limit(episodes)
    if stop is not None:
        parts.append(f"{count} stopped at {stop} ({LIMITS[stop]})")
    return "; ".join(parts)


def _shares(rewards: Counter[float], total: int) -> str:
    return ", ".join(f"{value:g} in {n} of {total}" for value, n in rewards.most_common(3))


def _commonest_limit(episodes: Sequence[Trajectory]) -> tuple[StopReason | None, int]:
    stops = Counter(t.stop for t in episodes if t.stop in LIMITS)
    return stops.most_common(1)[0] if stops else (None, 0)
