"""Multi-hop question answering with a search tool: HotpotQA, 2WikiMultiHopQA, MuSiQue, or files
like theirs.

``path`` is a folder with ``<dataset>.jsonl`` (fields ``id``, ``question``, ``answer``, and
optionally ``aliases``, ``supporting_ids``, ``type``) and ``corpus.<dataset>.jsonl`` (``id``,
``title``, ``text``), each also as ``.jsonl.gz``. Questions are dealt to the splits by a hash of
their id.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from agent_r1.config import ConfigError
from agent_r1.env import ToolEnv, Transition
from agent_r1.tasks.answers import answer_in
from agent_r1.tasks.search import Passage, PassageIndex
from agent_r1.tools import ToolResult, tool
from agent_r1.types import Message, Outcome, Task, ToolCall, derive_seed

EXAMPLE = (
    Message("user", "In which country was the painter of The Blue Mill born?"),
    Message("assistant", "", (ToolCall("search", {"query": "The Blue Mill painter"}),)),
    Message("tool", "The Blue Mill: The Blue Mill is a painting of 1901 by Ada Quist."),
    Message("assistant", "", (ToolCall("search", {"query": "Ada Quist born"}),)),
    Message("tool", "Ada Quist: Ada Quist (1870-1944) was a painter born in Denmark."),
    Message("assistant", "<answer>Denmark</answer>"),
)
"""Invented; in no data set."""


class MultiHop(ToolEnv):
    """Search, then answer between answer tags. Outcome reward: exact match; F1 is a metric.

    Process rewards: ``format``, half for the first well-formed call and half for an answer between
    tags; ``supporting``, the share of the gold passages that a search finds for the first time.
    """

    class Settings(ToolEnv.Settings):
        """Where the data is and how much of it the agent sees.

        Attributes:
            path: The data folder.
            dataset: ``hotpotqa``, ``2wikimultihopqa``, ``musique``, or one of your own.
            k: Passages per search.
            passage_chars: A longer passage is cut.
            example: Show one worked example, as turns of its own, before the question: for models
                whose chat template knows no tools.
            holdout: Share of the questions for validation, and the same again for test.
        """

        name: str = "multihop"
        path: str
        dataset: str = "hotpotqa"
        k: int = Field(3, ge=1)
        passage_chars: int = Field(500, ge=1)
        example: bool = False
        holdout: float = Field(0.1, gt=0, lt=0.5)

    system = (
        "You answer questions with the help of a search tool. Search for one fact at a time, read "
        "the passages, and search again if something is missing. When you know the answer, write "
        "it between answer tags, as short as possible: <answer>the answer</answer>"
    )
    reward_parts = ("format", "supporting")

    @classmethod
    def tasks(cls, settings: Any, split: str) -> Sequence[Task]:
        questions = load_questions(settings.path, settings.dataset)
        return [t for t in questions if _split_of(t.id, settings.holdout) == split]

    def prompt(self) -> Sequence[Message]:
        system, question = super().prompt()
        return [system, *(EXAMPLE if self.settings.example else ()), question]

    def start(self) -> None:
        self._index = load_index(self.settings.path, self.settings.dataset)
        self._found: set[str] = set()
        self._has_called = False

    @tool
    async def search(self, query: str) -> list[Passage]:  # async: the stemmer is not thread-safe
        """Search an encyclopedia for passages.

        Args:
            query: A few words about one person, place or thing.
        """
        return self._index.search(query, self.settings.k)

    def as_text(self, result: ToolResult) -> str:
        if result.error is not None:
            return super().as_text(result)
        limit = self.settings.passage_chars
        texts = [f"{p.title}: {p.text[:limit]}" for p in result.value]
        return "\n\n".join(texts) or "Nothing found."

    def interpret(self, results: Sequence[ToolResult]) -> Transition:
        rewards = {"format": 0.0, "supporting": 0.0}
        if not self._has_called and any(not result.by_agent for result in results):
            self._has_called = True
            rewards["format"] = 0.5
        gold = set(self.task.data["supporting_ids"])
        ids = {p.id for result in results if result.error is None for p in result.value}
        new = (gold & ids) - self._found
        self._found |= new
        rewards["supporting"] = len(new) / len(gold) if gold else 0.0
        return self.show(results, **rewards)

    def reply(self, message: Message) -> Transition:
        return Transition(
            done=True, rewards={"format": 0.5 * (answer_in(message.content) is not None)}
        )

    def score(self, answer: str | None) -> Outcome:
        found = answer_in(answer or "")
        given = found or ""
        accepted = [self.task.answer, *self.task.data["aliases"]]
        em = max(exact_match(given, gold) for gold in accepted)
        f1 = max(f1_score(given, gold) for gold in accepted)
        recall = len(self._found) / max(1, len(self.task.data["supporting_ids"]))
        metrics = {
            "em": em,
            "f1": f1,
            "supporting_recall": recall,
            "answered": float(found is not None),
        }
        return Outcome(em, success=em == 1.0, metrics=metrics)

    def gold(self) -> list[str]:
        return [f"<answer>{self.task.answer}</answer>"]


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as HotpotQA's and SQuAD's official
    scripts.
    """
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(given: str, gold: str) -> float:
    """1.0 if both normalise to the same text."""
    return float(normalize_answer(given) == normalize_answer(gold))


def f1_score(given: str, gold: str) -> float:
    """F1 of the words, after normalisation; yes, no and noanswer must match whole (HotpotQA's
    script).
    """
    a, b = normalize_answer(given), normalize_answer(gold)
    if a != b and {a, b} & {"yes", "no", "noanswer"}:
        return 0.0
    words, gold_words = a.split(), b.split()
    common = (Counter(words) & Counter(gold_words)).total()
    return 2 * common / (len(words) + len(gold_words)) if common else 0.0


@functools.lru_cache(maxsize=8)
def load_questions(path: str, dataset: str) -> list[Task]:
    """The questions of a data set, in the file's order."""
    tasks = []
    file, rows = _read(path, dataset, ("id", "question", "answer"))
    for row in rows:
        data = {key: list(row.get(key) or []) for key in ("aliases", "supporting_ids")}
        tasks.append(
            Task(row["id"], row["question"], row["answer"], str(row.get("type", "")), data)
        )
    if not tasks:
        raise ConfigError(f"{file} has no questions")
    return tasks


@functools.lru_cache(maxsize=4)
def load_index(path: str, dataset: str) -> PassageIndex:
    """The search index over a data set's passages, built once a process."""
    file, rows = _read(path, f"corpus.{dataset}", ("id", "title", "text"))
    if not rows:
        raise ConfigError(f"{file} has no passages")
    return PassageIndex([Passage(row["id"], row["title"], row["text"]) for row in rows])


def _read(path: str, name: str, fields: tuple[str, ...]) -> tuple[Path, list[dict[str, Any]]]:
    folder = Path(path).expanduser()
    choices = [folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"]
    file = next((choice for choice in choices if choice.exists()), None)
    if file is None:
        raise ConfigError(
            f"env.path = {path!r}: there is no {choices[0].name} or {choices[1].name} in it"
        )
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
    rows = []
    for number, line in enumerate(text.rstrip("\n").split("\n") if text else [], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: not valid JSON: {error}") from error
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise ConfigError(f"{file}, line {number}: needs the text field {field!r}")
        rows.append(row)
    return file, rows


def _split_of(task_id: str, holdout: float) -> str:
    draw = derive_seed("multihop split", task_id) / 2**63
    return "validation" if draw < holdout else "test" if draw < 2 * holdout else "train"
