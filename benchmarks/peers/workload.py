"""A multi-turn workload of forced tokens, the same for every side of the comparison.

What the agent says is given, token by token, with calls of a search tool in it; what the tool
answers is given, too. So every side decodes and trains on the same text, however it samples.
Needs no library but the tokenizer that it is handed.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could these "
    "two may first then do any like my now over such our man me even most made after also did many "
    "before must well back through years where much your way down should because long each just "
    "those people mister how too little state good very make world still own see men work long "
    "here get both between life being under never day same another know while last might us great "
    "old year off come since against go came right used take three"
)
WORDS = TEXT.split()
END = "<|im_end|>"
QUERY = re.compile(r'"query": "q (\d+) (\d+) (\d+)"')
QUESTION = re.compile(r"Question number (\d+):")


@dataclass(frozen=True)
class Shape:
    """How large a workload is. ``even``: all episodes have the same number of turns and all turns
    about the same length; otherwise both have long tails.
    """

    tasks: int
    attempts: int
    even: bool
    prompt_tokens: int = 400
    turns: int = 4
    action_tokens: int = 60
    observation_tokens: int = 80


SHAPES = {
    "even-short": Shape(1, 8, True, turns=2, action_tokens=50, observation_tokens=60),
    "even": Shape(1, 8, even=True),
    "long-tailed": Shape(2, 8, even=False),
    "tiny": Shape(1, 2, True, prompt_tokens=240, turns=2, action_tokens=50, observation_tokens=20),
}
"""``tiny`` is for the test alone."""

Episode = list[tuple[list[int], str | None]]
"""Turns: the ids of the action, the tool's answer; the last action calls no tool."""


@dataclass(frozen=True)
class Workload:
    """Opening messages by task, and episodes by (task, attempt)."""

    shape: Shape
    prompts: list[list[dict[str, str]]]
    episodes: dict[tuple[int, int], Episode]

    def search(self, query: str) -> str:
        """What the tool answers to ``q TASK ATTEMPT TURN``."""
        task, attempt, turn = map(int, query.split()[1:])
        answer = self.episodes[task, attempt][turn][1]
        assert answer is not None
        return answer

    def counts(self) -> dict[str, int]:
        """How much there is of what."""
        turns = [len(episode) for episode in self.episodes.values()]
        actions = [ids for episode in self.episodes.values() for ids, _ in episode]
        return {
            "tasks": self.shape.tasks,
            "attempts": self.shape.attempts,
            "turns": sum(turns),
            "most_turns": max(turns),
            "action_tokens": sum(map(len, actions)),
        }


def make(tokenizer: Any, shape: Shape, seed: int = 1) -> Workload:
    """The workload for a tokenizer of ChatML; the same for the same arguments."""
    rng = random.Random(seed)
    prompts: list[list[dict[str, str]]] = []
    episodes: dict[tuple[int, int], Episode] = {}
    for task in range(shape.tasks):
        system = "You are an agent that answers questions with the help of tools. " + _text(
            tokenizer, rng, shape.prompt_tokens - 230
        )
        question = f"Question number {task}: " + _text(tokenizer, rng, 40)
        prompts.append(
            [{"role": "system", "content": system}, {"role": "user", "content": question}]
        )
        for attempt in range(shape.attempts):
            episodes[task, attempt] = _episode(tokenizer, rng, shape, f"q {task} {attempt}")
    return Workload(shape, prompts, episodes)


def _episode(tokenizer: Any, rng: random.Random, shape: Shape, name: str) -> Episode:
    turns = shape.turns if shape.even else _clipped(rng.expovariate(1 / 2.2) + 1, 1, 8)
    episode: Episode = []
    for turn in range(turns):
        length, answered = shape.action_tokens, shape.observation_tokens
        if not shape.even:
            length = _clipped(rng.lognormvariate(3.9, 0.6), 40, 150)
            answered = _clipped(rng.lognormvariate(4.4, 0.7), 20, 200)
        last = turn == turns - 1
        action = _action(tokenizer, rng, length, None if last else f"{name} {turn}")
        episode.append((action, None if last else _text(tokenizer, rng, answered)))
    return episode


def _clipped(value: float, low: int, high: int) -> int:
    return int(min(max(value, low), high))


def _text(tokenizer: Any, rng: random.Random, length: int) -> str:
    """Words that make about so many tokens."""
    words = " ".join(rng.choice(WORDS) for _ in range(max(1, length)))
    return str(tokenizer.decode(encode(tokenizer, words)[:length]))


def _action(tokenizer: Any, rng: random.Random, length: int, query: str | None) -> list[int]:
    """Ids of words, of a call unless ``query`` is ``None``, and of the end of the turn."""
    end = encode(tokenizer, END)
    call: list[int] = []
    if query is not None:
        said = json.dumps({"name": "search", "arguments": {"query": query}})
        call = encode(tokenizer, f"\n<tool_call>\n{said}\n</tool_call>")
    fill = max(1, length - len(call) - len(end))
    words = " ".join(rng.choice(WORDS) for _ in range(fill + 8))
    return encode(tokenizer, words)[:fill] + call + end


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class Script:
    """What is said next, told from the context that an engine is given."""

    def __init__(self, tokenizer: Any, workload: Workload) -> None:
        self._tokenizer, self._workload = tokenizer, workload
        self._begun: Counter[int] = Counter()

    def action(self, context: Sequence[int]) -> list[int]:
        """The action's ids. Attempts are alike before their first action, so they take theirs in
        the order in which they ask.
        """
        text = self._tokenizer.decode(list(context))
        if calls := QUERY.findall(text):
            task, attempt, turn = map(int, calls[-1])
            return self._workload.episodes[task, attempt][turn + 1][0]
        task = int(QUESTION.findall(text)[-1])
        attempt = self._begun[task] % self._workload.shape.attempts
        self._begun[task] += 1
        return self._workload.episodes[task, attempt][0][0]


def reward(answer: str) -> float:
    """A number in [0, 1) that the last action decides: no two attempts have the same, so that no
    advantage is 0 and nobody may leave an attempt out.
    """
    return zlib.crc32(answer.strip().encode()) / 2**32
