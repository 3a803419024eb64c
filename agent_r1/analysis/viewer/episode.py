"""An episode and a group as plain data: turns, calls, rewards, and every token with its author and
its numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from agent_r1.analysis.episode_index import question_of
from agent_r1.envs.gold import in_words
from agent_r1.errors import ConfigError
from agent_r1.model.checkpoint_folder import newest_first
from agent_r1.run.folder import RunFolder
from agent_r1.tree import build_tree, common_prefix
from agent_r1.types import (
    CallResult,
    Estimates,
    Group,
    Kind,
    MalformedCall,
    Message,
    StepKey,
    ToolCall,
    Trajectory,
)
from agent_r1.utils.run_files import CHECKPOINTS

TOKENIZER = "tokenizer.json"
SHOWN = 400
"""Most characters of a node's text in a tree."""


def tokenizer_of(run: RunFolder) -> Tokenizer | None:
    """The run's tokenizer, of its newest checkpoint; ``None`` if there is none that can be read."""
    for _, folder in newest_first(run.path / CHECKPOINTS):
        file: Path = folder / TOKENIZER
        try:
            return Tokenizer.from_file(str(file))
        except Exception:  # the library raises nothing more exact; an older one may do
            continue
    return None


def stored_group(run: RunFolder, iteration: int, number: int) -> tuple[Group, Estimates]:
    """A group of an iteration by its number, from 1.

    Raises:
        ConfigError: There is no such group.
    """
    exists = 0 < number < 1 << 31 and iteration in run.trajectory_iterations()
    found = itertools.islice(run.estimated(iteration), number - 1, None) if exists else ()
    for group, known in found:
        return group, known
    raise ConfigError(f"iteration {iteration} has no group {number}")


def group_data(group: Group, known: Estimates, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """All attempts at a task, in short, and their tokens as a tree: what several attempts share is
    one node.
    """
    tree = build_tree(group)
    texts = _Texts(tokenizer)
    return {
        "task": dataclasses.asdict(group.task),
        "attempts": [
            {
                **_ending(trajectory),
                "prompt": [dataclasses.asdict(m) for m in trajectory.prompt],
                "steps": [
                    {
                        "said": in_words(step.message)[:SHOWN],
                        "seen": [message.content[:SHOWN] for message in step.observation],
                        "rewards": step.rewards,
                        "events": step.events,
                        "advantage": _mean(
                            known.advantages.get(StepKey(group.number, attempt, index), ())
                        ),
                    }
                    for index, step in enumerate(trajectory.steps)
                ],
            }
            for attempt, trajectory in enumerate(group.trajectories)
        ],
        "tree": [
            {
                "parent": node.parent,
                "kind": node.kind.name.lower(),
                "tokens": len(node.token_ids),
                "step": None if node.step is None else [node.step.attempt, node.step.step],
                "text": "".join(text or "" for text in texts.of(node.token_ids))[:SHOWN],
            }
            for node in tree.nodes
        ],
        "unique_tokens": tree.num_tokens,
        "all_tokens": sum(trajectory.num_tokens for trajectory in group.scored),
    }


def episode_data(
    group: Group, known: Estimates, attempt: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """An episode whole; ``attempt`` counts from 1.

    Raises:
        ConfigError: There is no such attempt.
    """
    if not 1 <= attempt <= len(group.trajectories):
        raise ConfigError(f"the group has attempts 1 to {len(group.trajectories)}, not {attempt}")
    trajectory = group.trajectories[attempt - 1]
    return {
        **_ending(trajectory),
        "task": dataclasses.asdict(group.task),
        "attempts": len(group.trajectories),
        "question": question_of(trajectory),
        "prompt": [_message(message) for message in trajectory.prompt],
        "steps": [
            {
                "said": _message(step.message, step.results),
                "seen": [_message(message) for message in step.observation],
                "rewards": step.rewards,
                "events": step.events,
                "state": step.state_key,
                "stop": step.action.stop,
                "versions": step.action.versions,
                "rewritten": step.context_ids is not None,
                "generate_seconds": step.generate_seconds,
                "env_seconds": step.env_seconds,
            }
            for step in trajectory.steps
        ],
        "tokens": _tokens(group.number, attempt - 1, trajectory, known, _Texts(tokenizer)),
    }


def _ending(trajectory: Trajectory) -> dict[str, Any]:
    outcome = trajectory.outcome
    return {
        "stop": str(trajectory.stop),
        "fault": trajectory.fault,
        "outcome": None if outcome is None else dataclasses.asdict(outcome),
        "parts": trajectory.process_reward(),
        "discarded": trajectory.discarded,
        "seconds": trajectory.seconds,
        "num_tokens": trajectory.num_tokens,
        "action_tokens": trajectory.num_action_tokens,
    }


def _message(message: Message, results: Sequence[CallResult] = ()) -> dict[str, Any]:
    calls = []
    for call, result in itertools.zip_longest(
        message.tool_calls, results[: len(message.tool_calls)]
    ):
        raw = None if result is None else dataclasses.asdict(result)
        if isinstance(call, MalformedCall):
            calls.append({"malformed": call.text, "reason": call.reason, "result": raw})
        elif isinstance(call, ToolCall):
            calls.append({"name": call.name, "arguments": call.arguments, "result": raw})
    return {"role": message.role, "content": message.content, "cut": message.cut, "calls": calls}


class _Texts:
    """The texts of tokens, one for each."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def of(self, token_ids: Sequence[int]) -> list[str | None]:
        """A token that holds only a part of a character has an empty text; the one that completes
        the character has it. Without a tokenizer, ``None``.
        """
        if self._tokenizer is None:
            return [None for _ in token_ids]
        stream = DecodeStream(skip_special_tokens=False)
        found: list[str | None] = []
        for token_id in token_ids:
            try:
                found.append(stream.step(self._tokenizer, token_id) or "")
            except Exception:  # an id that this tokenizer does not know, bytes that are no text
                stream = DecodeStream(skip_special_tokens=False)
                found.append("\N{REPLACEMENT CHARACTER}")
        return found


def _tokens(
    group: int, attempt: int, trajectory: Trajectory, known: Estimates, texts: _Texts
) -> dict[str, list[Any]]:
    """All tokens of an episode in order, as columns. A history that was rewritten before a step
    stands there as context, as far as it differs from what the agent had seen.
    """
    columns: dict[str, list[Any]] = {
        name: []
        for name in (
            *("id", "text", "kind", "step", "trained"),
            *("logprob", "entropy", "advantage", "ratio", "value"),
        )
    }
    for ids, kind, step, numbers in _runs(group, attempt, trajectory, known):
        count = len(ids)
        columns["id"] += ids
        columns["text"] += texts.of(ids)
        columns["kind"] += [kind.name.lower()] * count
        columns["step"] += [step] * count
        columns["trained"] += [kind is Kind.ACTION] * count
        for name in ("logprob", "entropy", "advantage", "ratio", "value"):
            values = list(numbers.get(name) or ())[:count]
            columns[name] += values + [None] * (count - len(values))
    return columns


Run = tuple[Sequence[int], Kind, int, dict[str, Sequence[float]]]
"""Tokens of one author, who that is, the step (from 0; the prompt has -1), and their numbers."""


def _runs(group: int, attempt: int, trajectory: Trajectory, known: Estimates) -> Iterator[Run]:
    yield trajectory.prompt_ids, Kind.OBSERVATION, -1, {}
    path = list(trajectory.prompt_ids)
    for number, step in enumerate(trajectory.steps):
        if step.context_ids is not None:
            shared = common_prefix(path, step.context_ids)
            yield step.context_ids[shared:], Kind.CONTEXT, number, {}
            path = list(step.context_ids)
        key, action = StepKey(group, attempt, number), step.action
        numbers: dict[str, Sequence[float]] = {
            "logprob": action.logprobs,
            "entropy": action.entropies,
            "advantage": known.advantages.get(key, ()),
            "ratio": known.ratios.get(key, ()),
            "value": known.values.get(key, ()),
        }
        yield action.token_ids, Kind.ACTION, number, numbers
        yield step.observation_ids, Kind.OBSERVATION, number, {}
        path += [*action.token_ids, *step.observation_ids]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
