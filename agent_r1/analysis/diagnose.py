"""``agent-r1 diagnose``: what goes wrong in a run without an error, seen in its figures and its
episodes: each finding with evidence and a cure. Nothing that the run names is executed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from agent_r1.analysis.episode_index import EpisodeIndex, Query
from agent_r1.run.figures import flat_figures
from agent_r1.run.folder import RunFolder
from agent_r1.training.advice import LIMITS

FEWEST = 3
"""Iterations below which no trend is told."""


@dataclass(frozen=True)
class Finding:
    """Something to look at.

    Attributes:
        name: Its kind, e.g. ``"entropy-collapse"``.
        evidence: What was seen, with figures.
        cure: What helps.
        episodes: A query that shows episodes of it, as ``agent-r1 episodes`` takes it: names and
            texts; empty if the figures are the evidence.
    """

    name: str
    evidence: str
    cure: str
    episodes: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Seen:
    """What findings are made from.

    Attributes:
        rows: Flat figures of the iterations of training, in order; each has ``"iteration"``.
        late: The last of them: a third, at least 3 and at most 10.
        recipe: The recipe as plain data.
        index: The episodes.
    """

    rows: list[dict[str, float]]
    late: list[dict[str, float]]
    recipe: dict[str, Any]
    index: EpisodeIndex

    def mean(self, name: str, rows: Sequence[dict[str, float]] | None = None) -> float:
        """Mean of a figure over rows, by default the late ones; NaN if none has it."""
        values = [row[name] for row in (self.late if rows is None else rows) if name in row]
        return statistics.fmean(values) if values else math.nan

    def early(self) -> list[dict[str, float]]:
        """As many of the first rows as there are late ones, none of those."""
        return self.rows[: min(len(self.late), len(self.rows) - len(self.late))]

    def share(self, name: str) -> float:
        """A count of the late rows, for each episode of theirs."""
        episodes = sum(v for row in self.late for k, v in row.items() if k.startswith("stop/"))
        count = sum(row.get(name, 0.0) for row in self.late)
        return count / episodes if episodes else 0.0

    def names(self, prefix: str) -> list[str]:
        return sorted({name for row in self.late for name in row if name.startswith(prefix)})

    def key(self, section: str, name: str) -> Any:
        """A key of the recipe; ``None`` if it is not there."""
        table = self.recipe.get(section)
        return table.get(name) if isinstance(table, dict) else None

    @property
    def when(self) -> str:
        first, last = self.late[0]["iteration"], self.late[-1]["iteration"]
        return f"iterations {first:g} to {last:g}" if first != last else f"iteration {first:g}"

    def latest(self, **more: str) -> dict[str, str]:
        """A query for episodes of the late iterations."""
        first, last = self.late[0]["iteration"], self.late[-1]["iteration"]
        return {"iteration": f"{first:g}..{last:g}", **more}


def diagnose(run: RunFolder, index: EpisodeIndex) -> list[Finding]:
    """The findings of a run, the gravest first; its index is read as far as it goes."""
    found = [
        Finding("damaged-file", f"iteration {n}: {why}", "restore the file, or do without it")
        for n, why in index.damaged().items()
    ]
    metrics = run.metrics()
    rows = [
        {"iteration": float(row["iteration"]), **flat_figures(row)}
        for row in metrics
        if row["iteration"]
    ]
    if len(rows) >= 1:
        late = rows[-min(10, max(FEWEST, len(rows) // 3)) :]
        seen = _Seen(rows, late, run.recipe_data(), index)
        for check in CHECKS:
            found += check(seen)
    told = {finding.name for finding in found}
    late = metrics[-len(late) :] if rows else []
    advice = {name: (row["iteration"], words) for row in late for name, words in _advice(row)}
    found += [
        Finding(name, f"told in iteration {iteration}: {words}", "as told there")
        for name, (iteration, words) in advice.items()
        if name not in told
    ]
    return found


def _advice(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    advice = row.get("advice")
    yield from advice.items() if isinstance(advice, dict) else ()


def _excluded(seen: _Seen) -> Iterator[Finding]:
    if (share := seen.share("stop/fault")) >= 0.02:
        yield Finding(
            "excluded-episodes",
            f"{share:.0%} of the episodes in {seen.when} were excluded: the environment or its "
            "scorer failed",
            "read their faults; what your code raises is excluded from training, not scored 0",
            seen.latest(stop="fault"),
        )


def _faults(seen: _Seen) -> Iterator[Finding]:
    for name in seen.names("fault/"):
        if (share := seen.share(name)) >= 0.05:
            what, _, tool = name.removeprefix("fault/").partition(":")
            yield Finding(
                "tool-faults",
                f"tool {tool or '?'}: {what} {share:.2f} times an episode in {seen.when}",
                "the agent learns to live with a broken tool: mend it, raise its timeout, or give "
                f"it retries (env.failure.{tool or 'TOOL'}.retries = 2)",
                seen.latest(event=name),
            )


def _no_signal(seen: _Seen) -> Iterator[Finding]:
    without, used = seen.mean("groups_without_signal"), seen.mean("groups_used")
    share = without / (without + used) if without + used else 0.0
    success = seen.mean("success")
    if not share >= 0.6 or success >= 0.8:  # most tasks are solved: that is what was wanted
        return
    yield Finding(
        "no-signal",
        f"{share:.0%} of the groups in {seen.when} had no signal: all attempts at the task earned "
        f"the same (success {success:.2f})",
        "easier tasks, more train.attempts, process rewards ([credit] name = 'step'), or a warm "
        "start (`agent-r1 sft`)",
        seen.latest(sort="group"),
    )


def _entropy(seen: _Seen) -> Iterator[Finding]:
    early = seen.early()
    if len(seen.rows) < 2 * FEWEST or not early:
        return
    before, now = seen.mean("entropy", early), seen.mean("entropy")
    success, gained = seen.mean("success"), seen.mean("success") - seen.mean("success", early)
    if now < 0.25 * before and success < 0.8 and gained < 0.05:
        yield Finding(
            "entropy-collapse",
            f"entropy fell from {before:.3f} to {now:.3f} nats a token while success went from "
            f"{success - gained:.2f} to {success:.2f}: attempts repeat one another",
            "lower learner.lr, clip higher (algorithm.clip_high), add a KL term, or raise "
            "train.temperature; go on from a checkpoint before the fall",
            seen.latest(sort="entropy", order="ascending"),
        )


def _drift(seen: _Seen) -> Iterator[Finding]:
    error, clipped = seen.mean("logprob_error"), seen.mean("clip_fraction")
    rounded = seen.key("model", "dtype") == "bfloat16" or seen.key("model", "matmul") == "bf16"
    if error > (0.5 if rounded else 0.02):
        yield Finding(
            "engine-differs",
            f"log-probabilities of engine and learner differ by up to {error:.3f} nats in "
            f"{seen.when}: what is trained on is not what was sampled",
            "compare another engine, model.dtype = 'float32' and no model.matmul; "
            "algorithm.importance_cap = 2 bounds what it does",
        )
    off = seen.index.mean("off_policy", Query(ranges={"iteration": _span(seen)}))
    if clipped > 0.2 or (off is not None and off > 0.25):
        yield Finding(
            "ratio-drift",
            f"in {seen.when}, "
            + " and ".join(
                f"{share:.0%} of the tokens {what}"
                for share, what in (
                    (clipped, "were clipped by the loss"),
                    (off, "had an importance ratio outside [0.9, 1.1]"),
                )
                if share is not None and not math.isnan(share)
            ),
            "the policy moves far within an iteration: lower learner.lr, or have fewer "
            "learner.epochs and learner.minibatches",
            seen.latest(sort="off_policy"),
        )


def _without_tools(seen: _Seen) -> Iterator[Finding]:
    called = seen.index.find(Query(ranges={"tool_calls": (1, None)}, limit=0))[0]
    if not called and not seen.names("tool_calls"):
        return  # an environment without tools
    span = _span(seen)
    total, _ = seen.index.find(Query(ranges={"iteration": span}, limit=0))
    mute, _ = seen.index.find(Query(ranges={"iteration": span, "tool_calls": (0, 0)}, limit=0))
    if total and mute / total >= 0.5:
        yield Finding(
            "answers-without-tools",
            f"{mute} of {total} episodes in {seen.when} made no well-formed call",
            "say in the system message when to call; reward calls that help (a process reward); "
            "show some in a warm start (`agent-r1 sft`)",
            seen.latest(tool_calls="0"),
        )


def _truncated(seen: _Seen) -> Iterator[Finding]:
    for stop, key in LIMITS.items():
        if (share := seen.share(f"stop/{stop}")) >= 0.2:
            yield Finding(
                "truncation",
                f"{share:.0%} of the episodes in {seen.when} stopped at {stop}",
                f"raise {key}, or ask the agent for less; an answer that is cut off earns nothing",
                seen.latest(stop=str(stop)),
            )


def _hacked(seen: _Seen) -> Iterator[Finding]:
    early = seen.early()
    if len(seen.rows) < 2 * FEWEST or not early:
        return
    lost = seen.mean("success", early) - seen.mean("success")
    if not lost > 0.05 or seen.key("credit", "name") in (None, "outcome"):
        return  # or process rewards are not learned from
    weights = seen.key("credit", "weights")
    for name in seen.names("process/"):
        if isinstance(weights, dict) and weights.get(name.removeprefix("process/")) == 0:
            continue
        before, now = seen.mean(name, early), seen.mean(name)
        if now > before + 0.1 * max(abs(before), 0.1):
            part = name.removeprefix("process/")
            yield Finding(
                "reward-hacking",
                f"the reward {part!r} rose from {before:.2f} to {now:.2f} an episode while success "
                f"fell by {lost:.2f}",
                f"the agent earns {part!r} without solving the task: lower "
                f"credit.weights.{part}, or set credit.gate = true",
                seen.latest(sort=f"part/{part}", success="0"),
            )


def _mistakes(seen: _Seen) -> Iterator[Finding]:
    for name in seen.names("mistake/"):
        if (share := seen.share(name)) >= 0.3:
            yield Finding(
                "mistakes",
                f"{name.removeprefix('mistake/')}: {share:.2f} times an episode in {seen.when}",
                "describe the tool and its arguments better, reward well-formed calls, or show "
                "some in a warm start (`agent-r1 sft`)",
                seen.latest(event=name),
            )


def _near_limit(seen: _Seen) -> Iterator[Finding]:
    limit = seen.key("limits", "tokens")
    longest = seen.index.find(Query(sort="prompt_tokens", limit=1))[1]
    if not isinstance(limit, int) or not longest:
        return
    tokens = longest[0]["prompt_tokens"] or 0
    if tokens > 0.8 * limit:
        yield Finding(
            "prompts-near-limit",
            f"the longest prompt has {tokens:.0f} tokens, limits.tokens is {limit}: little room is "
            "left to act",
            "raise limits.tokens, or shorten the system message, the tools' descriptions or the "
            "question",
            {"sort": "prompt_tokens"},
        )


def _longer(seen: _Seen) -> Iterator[Finding]:
    early = seen.early()
    before, now = seen.mean("action_tokens", early), seen.mean("action_tokens")
    gained = seen.mean("success") - seen.mean("success", early)
    if len(seen.rows) >= 2 * FEWEST and now > 2 * before and gained < 0.05:
        yield Finding(
            "longer-not-better",
            f"episodes grew from {before:.0f} to {now:.0f} sampled tokens, success by {gained:.2f}",
            "algorithm 'dr-grpo' has no bias to length; DAPO's overlong penalty "
            "(algorithm.overlong) and a smaller limits.tokens_per_turn shorten",
            seen.latest(sort="action_tokens"),
        )


def _waiting(seen: _Seen) -> Iterator[Finding]:
    waited, rollout = seen.mean("engine/wait_seconds"), seen.mean("seconds/rollout")
    if waited > 5.0 and waited > 0.3 * rollout:
        yield Finding(
            "waits-for-tools",
            f"the engine waited {waited:.0f} of {rollout:.0f} seconds of an iteration's rollout",
            "make slow tools async, lower their timeout, or set engine.patience = 0",
            seen.latest(sort="seconds"),
        )


def _skipped(seen: _Seen) -> Iterator[Finding]:
    if skipped := sum(row.get("updates_skipped", 0.0) for row in seen.late):
        yield Finding(
            "updates-skipped",
            f"updates skipped in {seen.when}: {skipped:.0f}, for gradients that were no numbers",
            "lower learner.lr; look at rewards of extreme size",
        )


def _span(seen: _Seen) -> tuple[float, float]:
    return seen.late[0]["iteration"], seen.late[-1]["iteration"]


CHECKS: tuple[Callable[[_Seen], Iterator[Finding]], ...] = (
    _excluded,
    _faults,
    _skipped,
    _drift,
    _hacked,
    _no_signal,
    _entropy,
    _truncated,
    _without_tools,
    _mistakes,
    _near_limit,
    _longer,
    _waiting,
)
