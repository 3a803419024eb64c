"""The explanation of a trajectory, as data, as text and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agent_r1.envs.gold import in_words
from agent_r1.types import Estimates, Group, Step, StepKey, Trajectory

Place = tuple[int, int, int]
"""Iteration, group and attempt, the latter two counted from 1."""


@dataclass(frozen=True)
class Column:
    """An algorithm's numbers for the trajectory.

    Attributes:
        name: Name of the algorithm, or of several with the same numbers.
        advantages: Per step, per action token.
        weights: Per step, the weight of one of its tokens in the loss.
    """

    name: str
    advantages: list[tuple[float, ...]]
    weights: list[float]


@dataclass(frozen=True)
class Explanation:
    """See the module's docstring.

    Attributes:
        place: Where the trajectory is stored.
        group: All attempts at its task.
        trajectory: The one that is explained.
        known: Stored estimates of its group's steps.
        earned: Per step, the rewards that credit and algorithm placed on its tokens: process
            rewards as weighed, the outcome, a KL penalty.
        returns: Per step, the return of its first token by the run's credit.
        group_returns: Per attempt of the group, its counted rewards; ``None`` if it was excluded.
        own: The run's algorithm: the advantages that it trained on, and their weights; no weights
            if the algorithm's code was not run.
        others: Other algorithms without a critic, with default settings and the run's credit.
        notes: Notes for the reader.
    """

    place: Place
    group: Group
    trajectory: Trajectory
    known: Estimates
    credit: str
    earned: list[float]
    returns: list[float]
    group_returns: list[float | None]
    own: Column
    others: list[Column]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the numbers of every token."""
        t = self.trajectory
        return {
            "iteration": self.place[0],
            "group": self.place[1],
            "attempt": self.place[2],
            "task": t.task_id,
            "stop": str(t.stop),
            "outcome": None if t.outcome is None else dataclasses.asdict(t.outcome),
            "credit": self.credit,
            "group_returns": self.group_returns,
            "steps": [
                {
                    "said": _said(step),
                    "seen": [message.content for message in step.observation],
                    "state_key": step.state_key,
                    "rewards": step.rewards,
                    "counted": earned,
                    "return": value,
                    "token_ids": step.action.token_ids,
                    "logprobs": step.action.logprobs,
                    "values": self.known.values.get(key),
                    "ratios": self.known.ratios.get(key),
                }
                for key, step, earned, value in zip(
                    self._keys, t.steps, self.earned, self.returns, strict=True
                )
            ],
            "algorithms": [dataclasses.asdict(column) for column in (self.own, *self.others)],
            "notes": self.notes,
        }

    @property
    def _keys(self) -> list[StepKey]:
        attempt = self.place[2] - 1
        return [key for key, _ in self.group.steps() if key.attempt == attempt]

    def as_text(self, *, tokens: bool = False) -> str:
        """For people; with ``tokens``, a line for each action token."""
        t, group = self.trajectory, self.group
        iteration, number, attempt = self.place
        question = next((m.content for m in reversed(t.prompt) if m.role == "user"), "")
        lines = [
            f"iteration {iteration}, group {number}, attempt {attempt} of "
            f"{len(group.trajectories)}: task {t.task_id}",
            question,
            "",
        ]
        for index, step in enumerate(t.steps, 1):
            parts = "  ".join(f"{part} {reward:+.3g}" for part, reward in step.rewards.items())
            lines.append(f"step {index}  {_said(step)}")
            state = f"in state {step.state_key!r}  " if step.state_key else ""
            events = f"  {', '.join(step.events)}" if step.events else ""
            counted = (
                f"counted {self.earned[index - 1]:+.3f}  return {self.returns[index - 1]:+.3f}"
            )
            lines.append(f"        {state}{parts or 'no process reward'}  {counted}{events}")
            lines += [
                f"        <- {message.role}: {_short(message.content)}"
                for message in step.observation
            ]
        outcome = t.outcome
        assert outcome is not None
        lines += [
            f"end     {t.stop}: outcome reward {outcome.reward:g}, "
            f"{'solved' if outcome.success else 'not solved'}",
            "the group's outcomes: "
            + " ".join(
                "-" if o.outcome is None else f"{o.outcome.reward:g}" for o in group.trajectories
            ),
            "the group's returns (sum of each attempt's counted rewards): "
            + " ".join("-" if value is None else f"{value:g}" for value in self.group_returns),
            "",
            f"advantage of each step, credit {self.credit!r}; other algorithms by their defaults",
            *_table((self.own, *self.others), self._mean_advantages),
            "",
            "weight in the loss of one token, times its advantage, x 1000",
            *_table([c for c in (self.own, *self.others) if c.weights], self._pushes),
        ]
        if tokens:
            lines += ["", *self._token_lines()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _mean_advantages(self, column: Column) -> list[float]:
        return [math.fsum(values) / len(values) for values in column.advantages]

    def _pushes(self, column: Column) -> list[float]:
        means = self._mean_advantages(column)
        return [1000 * a * w for a, w in zip(means, column.weights, strict=True)]

    def _token_lines(self) -> Iterator[str]:
        yield "step  token     id   logprob   value  advantage   ratio  weight x advantage x 1000"
        for number, (key, step) in enumerate(
            zip(self._keys, self.trajectory.steps, strict=True), 1
        ):
            advantages = self.own.advantages[number - 1]
            weight = self.own.weights[number - 1] if self.own.weights else math.nan
            values, ratios = self.known.values.get(key), self.known.ratios.get(key)
            for index, token_id in enumerate(step.action.token_ids):
                logprob = f"{step.action.logprobs[index]:.3f}" if step.action.logprobs else "-"
                value = f"{values[index]:+.3f}" if values else "-"
                ratio = f"{ratios[index]:.3f}" if ratios else "-"
                yield (
                    f"{number:4d} {index + 1:6d} {token_id:6d} {logprob:>9} "
                    f"{value:>7} {advantages[index]:+10.3f} {ratio:>7} "
                    f"{1000 * weight * advantages[index]:+10.4f}"
                )


def _said(step: Step) -> str:
    """What the agent did, in a line."""
    return _short(in_words(step.message))


def _short(text: str) -> str:
    """A text in one line of at most 110 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 110 else text[:107] + "..."


def _table(columns: Sequence[Column], numbers: Any) -> list[str]:
    width = max(len(column.name) for column in columns)
    values = [numbers(column) for column in columns]
    head = " ".join(f"{f'step {i}':>9}" for i in range(1, max(map(len, values)) + 1))
    rows = [
        f"  {column.name:<{width}} " + " ".join(f"{value:+9.3f}" for value in row)
        for column, row in zip(columns, values, strict=True)
    ]
    return [f"  {'':<{width}} {head}", *rows]
