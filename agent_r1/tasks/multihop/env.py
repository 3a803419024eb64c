"""Multi-hop question answering with a search tool: HotpotQA, 2WikiMultiHopQA, MuSiQue, or files
like theirs. ``data.py`` loads questions and passages, ``scores.py`` scores an answer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from agent_r1.envs.base import Transition
from agent_r1.envs.gold import Gold
from agent_r1.envs.tool_env import ToolEnv
from agent_r1.search import Passage, SearchSection, open_search
from agent_r1.tasks.answers import answer_in
from agent_r1.tasks.multihop.data import corpus_files, load_split
from agent_r1.tasks.multihop.scores import (
    contains,
    exact_match,
    f1_score,
    graded_reward,
    normalize_answer,
    paper_reward,
)
from agent_r1.tasks.row_file import BadRows
from agent_r1.tools.base import ToolResult
from agent_r1.tools.function_tool import tool
from agent_r1.types import Message, Outcome, Task, ToolCall

MAX_CHECKED = 1_000_000
"""Largest corpus that is checked for gold passages before a run."""
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
    """Search, then answer between answer tags. Success is exact match; F1 is a metric.

    Process rewards: ``format``, half for the first well-formed call and half for an answer between
    tags; ``supporting``, the share of the gold passages that a search finds for the first time.
    """

    class Settings(ToolEnv.Settings):
        """Where the data is and how much of it the agent sees.

        Attributes:
            path: The data folder, or ``hub``.
            datasets: Data sets; questions of several take turns, in training in equal shares.
            search: The search engine, see ``search``; by default BM25 over the passages of
                the data sets. With a server or an index of other passages, gold passages are known
                by their titles.
            k: Passages per search.
            passage_chars: A longer passage is cut.
            example: Show one worked example, as turns of its own, before the question: for models
                whose chat template knows no tools.
            holdout: Share of the questions for validation, and the same again for test, where the
                files define none.
            bad_rows: Treatment of unusable questions: an ``error`` before the run that names the
                line, or ``skip``, which leaves them out.
            reward: ``paper``: exact match, less for a wrong format. ``graded``: that of the
                authors' first public scripts. ``em``: exact match alone.
        """

        name: str = "multihop"
        path: str
        datasets: tuple[str, ...] = Field(("hotpotqa", "2wikimultihopqa"), min_length=1)
        search: SearchSection = Field({}, validate_default=True)
        k: int = Field(3, ge=1)
        passage_chars: int = Field(500, ge=1)
        example: bool = False
        holdout: float = Field(0.1, gt=0, lt=0.5)
        bad_rows: BadRows = "error"
        reward: Literal["paper", "graded", "em"] = "paper"

        @field_validator("datasets", mode="before")
        @classmethod
        def _one(cls, value: Any) -> Any:
            return (value,) if isinstance(value, str) else value

    system = (
        "You answer questions with the help of a search tool. Search for one fact at a time, read "
        "the passages, and search again if something is missing. When you know the answer, write "
        "it between answer tags, as short as possible: <answer>the answer</answer>"
    )
    reward_parts = ("format", "supporting")
    worked_example: ClassVar[Sequence[Message]] = EXAMPLE

    @classmethod
    def tasks(cls, settings: Any, split: str) -> Sequence[Task]:
        return load_split(
            settings.path, settings.datasets, split, settings.holdout, settings.bad_rows
        )

    @classmethod
    def check_data(cls, settings: Any) -> Iterator[str]:
        """Reports gold passages that no search can find: the corpus lacks them."""
        if getattr(settings.search, "brings_passages", False):
            return
        files = corpus_files(settings.path, settings.datasets)
        passages = getattr(open_search(settings.search, files), "passages", None)
        if passages is None or len(passages) > MAX_CHECKED:
            return
        known = {passages[position].id for position in range(len(passages))}
        tasks = [t for split in ("train", "validation", "test") for t in cls.tasks(settings, split)]
        wanted = {(t.id, gold) for t in tasks for gold in t.data["supporting_ids"]}
        if missing := sorted(pair for pair in wanted if pair[1] not in known):
            task_id, passage_id = missing[0]
            yield (
                f"supporting_ids: {len(missing)} of {len(wanted)} gold passages are not in the "
                f"corpus, the first: {passage_id!r} of question {task_id!r}; nobody can earn the "
                "process reward for them"
            )
        if not wanted:
            yield "no question has supporting_ids: the process reward 'supporting' stays 0"

    def prompt(self) -> Sequence[Message]:
        system, question = super().prompt()
        return [system, *(self.worked_example if self.settings.example else ()), question]

    def start(self) -> None:
        search, data = self.settings.search, self.task.data
        self._gold: dict[str, str]
        if getattr(search, "brings_passages", False):
            # Other passages have other ids: gold ones are known by title.
            self._key = "title"
            self._gold = {title: title for title in data["supporting"]}
            self._searcher = open_search(search, ())
        else:
            self._key = "id"
            titles = itertools.chain(data["supporting"], itertools.repeat(""))
            self._gold = dict(zip(data["supporting_ids"], titles, strict=False))
            files = corpus_files(self.settings.path, self.settings.datasets)
            self._searcher = open_search(search, files)
        self._found: set[str] = set()
        self._shown = ""
        self._num_calls = 0
        self._broken_calls = 0

    @property
    def accepted(self) -> list[str]:
        """The gold answer and its aliases."""
        return [self.task.answer, *self.task.data["aliases"]]

    @tool(parallel=True)
    async def search(self, query: str) -> list[Passage]:
        """Search an encyclopedia for passages.

        Args:
            query: A few words about one person, place or thing.
        """
        return await self._searcher.search(query, self.settings.k)

    def as_text(self, result: ToolResult) -> str:
        if result.error is not None:
            return super().as_text(result)
        limit = self.settings.passage_chars
        texts = [f"{p.title}: {p.text[:limit]}" for p in result.value]
        return "\n\n".join(texts) or "Nothing found."

    def interpret(self, results: Sequence[ToolResult]) -> Transition:
        broken = sum(result.by_agent for result in results)
        first = not self._num_calls and broken < len(results)
        self._num_calls += len(results) - broken
        self._broken_calls += broken
        shown = [p for result in results if result.error is None for p in result.value]
        new = (self._gold.keys() & {getattr(p, self._key) for p in shown}) - self._found
        self._found |= new
        rewards = {"format": 0.5 * first, "supporting": len(new) / max(1, len(self._gold))}
        transition = self.show(results, **rewards)
        self._shown = "\n".join([self._shown, *(m.content for m in transition.messages)])
        return transition

    def reply(self, message: Message) -> Transition:
        answered = answer_in(message.content) is not None
        return Transition(done=True, rewards={"format": 0.5 * answered})

    def score(self, answer: str | None) -> Outcome:
        found = answer_in(answer or "")
        em = exact_match(found or "", self.accepted)
        recall = len(self._found) / max(1, len(self._gold))
        closed = normalize_answer(self.task.answer) in ("yes", "no")
        metrics = {
            "em": em,
            "f1": f1_score(found or "", self.accepted),
            "supporting_recall": recall,
            "answer_shown": float(closed or contains(self._shown, self.accepted)),
            "answered": float(found is not None),
            "calls": float(self._num_calls + self._broken_calls),
        }
        return Outcome(self._reward(em, found, answer or ""), success=em == 1.0, metrics=metrics)

    def _reward(self, em: float, found: str | None, last: str) -> float:
        if self.settings.reward == "graded":
            return graded_reward(found, last, self.accepted, num_calls=self._num_calls)
        if self.settings.reward == "paper":
            return paper_reward(em, answer_ok=found is not None, calls_ok=not self._broken_calls)
        return em

    def gold(self) -> Iterator[Gold]:
        """A search for each hop, then the answer. The next query depends on what has been shown, so
        play each text before asking for the next.
        """
        for query in self.task.data["decomposition"] or self._gold_queries():
            yield ToolCall("search", {"query": query})
        yield f"<answer>{self.task.answer}</answer>"

    def _gold_queries(self) -> Iterator[str]:
        """Titles of gold passages not found yet, first those that the question and the results so
        far mention most; before them the question itself, if it mentions too little of any.
        """
        titles = {key: title for key, title in self._gold.items() if title}
        asked = False
        while missing := {key: title for key, title in titles.items() if key not in self._found}:
            seen = f"{self.task.question}\n{self._shown}"
            nearest = max(missing, key=lambda key: _mentioned(missing[key], seen))
            title = missing[nearest]
            if _mentioned(title, seen) < 0.7 and not asked:
                asked = True
                yield self.task.question.rstrip("?")
                continue
            asked = True
            del titles[nearest]  # it is asked for once
            yield title if normalize_answer(title) in normalize_answer(seen) else _core(title)


def _core(title: str) -> str:
    """A title without its disambiguation: "Psycho (1960 film)" is "Psycho"."""
    return re.sub(r"\s*\([^)]*\)$", "", title) or title


def _mentioned(title: str, text: str) -> float:
    """The share of a title's words that stand in a text."""
    words = normalize_answer(_core(title)).split()
    known = set(normalize_answer(text).split())
    return sum(word in known for word in words) / max(1, len(words))
