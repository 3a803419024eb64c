"""Questions that are answered by SQL, over generated databases or one of your own.

    [env]
    name = "database"
    path = "tickets.db"              # a SQLite file, or a .sql script; left out: generated ones
    questions = "questions.jsonl"    # id, question, answer, and optionally sql, which answers it

The agent has two tools, ``list_tables`` and ``query``. It cannot write: the connection is read-only
and an authorizer admits nothing but reading; a query has a limit of work, rows and size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from agent_r1.envs.base import Transition
from agent_r1.envs.gold import Gold
from agent_r1.envs.tool_env import ToolEnv
from agent_r1.errors import CallError, ConfigError
from agent_r1.tasks.answers import answer_in
from agent_r1.tasks.database.database import Database, Rows, from_script, open_database
from agent_r1.tasks.database.shops import build_database
from agent_r1.tasks.from_files import load_rows
from agent_r1.tasks.lazy import LazyTasks
from agent_r1.tasks.row_file import BadRows, RowFile
from agent_r1.tasks.splits import deal
from agent_r1.tools.base import ToolResult
from agent_r1.tools.function_tool import tool
from agent_r1.types import Message, Outcome, Task, ToolCall, derive_seed
from agent_r1.utils.scope import kept

NUM_TASKS = 100_000


def _example(question: str, sql: str, result: str, answer: str) -> tuple[Message, ...]:
    """A worked example on a database that no task has."""
    return (
        Message("user", question),
        Message("assistant", "", (ToolCall("list_tables", {}),)),
        Message("tool", "films(id, title, year, director_id)\ndirectors(id, name, country)"),
        Message("assistant", "", (ToolCall("query", {"sql": sql}),)),
        Message("tool", result),
        Message("assistant", f"<answer>{answer}</answer>"),
    )


EXAMPLES = (
    _example(
        "How many directors are from Chile?",
        "SELECT COUNT(*) FROM directors WHERE country = 'Chile'",
        "COUNT(*)\n4",
        "4",
    ),
    _example(
        "What is the year of Blue Mill?",
        "SELECT year FROM films WHERE title = 'Blue Mill'",
        "year\n1987",
        "1987",
    ),
    _example(
        "How many films does Mia Lind have?",
        "SELECT COUNT(*) FROM films JOIN directors ON directors.id = films.director_id "
        "WHERE directors.name = 'Mia Lind'",
        "COUNT(*)\n3",
        "3",
    ),
)


class DatabaseEnv(ToolEnv):
    """Reward: 1 for the right value between answer tags; numbers count as numbers.

    Process rewards, each at most 1 over an episode: ``format``, a well-formed call; ``ran``, a
    query that runs; ``tables``, the share of the tables that the question is about which were read;
    ``answered``, an answer between tags, right or wrong.
    """

    class Settings(ToolEnv.Settings):
        """Where the data comes from and what a query may cost.

        Attributes:
            path: A SQLite file or SQL script; by default every task has a generated database.
            questions: A JSONL file about it: ``id``, ``question``, ``answer`` and ``sql``.
            tables: Numbers of tables that generated questions cycle through.
            seed: Seed of generated databases.
            max_rows: Most rows of a result.
            max_steps: Most instructions of SQLite's virtual machine per query.
            examples: How many worked examples are shown before the question.
            holdout: Share of your own questions for validation, and the same again for test.
            bad_rows: Treatment of unusable questions, e.g. whose ``sql`` does not run: an
                ``error`` before the run, or ``skip``, which leaves them out.
        """

        name: str = "database"
        path: str = ""
        questions: str = ""
        tables: tuple[Literal[1, 2, 3], ...] = Field((1, 2, 3), min_length=1)
        seed: int = 0
        max_rows: int = Field(20, ge=1)
        max_steps: int = Field(500_000, ge=1000)
        examples: int = Field(0, ge=0, le=len(EXAMPLES))
        holdout: float = Field(0.1, gt=0, lt=0.5)
        bad_rows: BadRows = "error"

        @model_validator(mode="after")
        def _both(self) -> Self:
            if bool(self.path) != bool(self.questions):
                raise ValueError("path and questions go together: a database and what is asked")
            return self

    system = (
        "Answer the question from the database. List the tables, then query them with SQL. "
        "End with the value alone: <answer>value</answer>"
    )
    reward_parts = ("format", "ran", "tables", "answered")

    @classmethod
    def tasks(cls, settings: Any, split: str) -> Sequence[Task]:
        if not settings.questions:
            make = functools.partial(_generated, settings.seed, split, settings.tables)
            return LazyTasks(NUM_TASKS, make)
        limits = settings.max_rows, settings.max_steps
        good = _runnable(settings.path, settings.questions, settings.bad_rows, *limits)
        return deal(good, split, settings.holdout)

    def prompt(self) -> Sequence[Message]:
        system, question = super().prompt()
        shown = EXAMPLES[: self.settings.examples]
        return [system, *(message for example in shown for message in example), question]

    def start(self) -> None:
        settings = self.settings
        self._database = Database(self._connect(), settings.max_rows, settings.max_steps)
        wanted: list[str] = []
        if sql := self.task.data.get("sql"):
            try:
                wanted = self._database.query(sql).tables
            except CallError as error:
                raise ConfigError(
                    f"{settings.questions}: question {self.task.id!r}: its sql: {error}"
                ) from error
        self._wanted, self._read = set(wanted), set[str]()
        self._has_called = self._has_run = False

    def _connect(self) -> sqlite3.Connection:
        if not self.settings.path:
            script, _ = build_database(self.task.data["seed"], self.task.data["tables"])
            return from_script(script)
        return open_database(self.settings.path)

    async def close(self) -> None:
        await super().close()
        if hasattr(self, "_database"):  # else the episode never began
            self._database.close()

    @tool
    async def list_tables(self) -> str:
        """List the tables of the database and their columns."""
        tables = self._database.tables.items()
        return "\n".join(f"{name}({', '.join(columns)})" for name, columns in tables)

    @tool
    async def query(self, sql: str) -> Rows:  # in the loop's thread: its work is limited
        """Run one SELECT statement and see its rows.

        Args:
            sql: The statement, in SQLite's dialect.
        """
        return self._database.query(sql)

    def as_text(self, result: ToolResult) -> str:
        if not isinstance(result.value, Rows):
            return super().as_text(result)
        found = result.value
        lines = [" | ".join(found.columns), *(" | ".join(map(_shown, r)) for r in found.rows)]
        if not found.rows:
            lines.append("(no rows)")
        if found.more:
            lines.append(f"(more rows; the first {len(found.rows)} are shown)")
        return super().as_text(dataclasses.replace(result, value="\n".join(lines)))

    def interpret(self, results: Sequence[ToolResult]) -> Transition:
        well_formed = any(not result.by_agent or result.error == "rejected" for result in results)
        rewards = {"format": float(well_formed and not self._has_called), "ran": 0.0, "tables": 0.0}
        self._has_called = self._has_called or well_formed
        for found in (r.value for r in results if isinstance(r.value, Rows)):
            rewards["ran"] += not self._has_run
            self._has_run = True
            new = (self._wanted & {*found.tables}) - self._read
            self._read |= new
            rewards["tables"] += len(new) / len(self._wanted) if self._wanted else 0.0
        return self.show(results, **rewards)

    def reply(self, message: Message) -> Transition:
        return Transition(
            done=True, rewards={"answered": float(answer_in(message.content) is not None)}
        )

    def score(self, answer: str | None) -> Outcome:
        given = answer_in(answer or "")
        right = given is not None and _same(given, self.task.answer)
        return Outcome(float(right), success=right, metrics={"ran": float(self._has_run)})

    def gold(self) -> list[Gold]:
        actions: list[Gold] = [ToolCall("list_tables", {})]
        if sql := self.task.data.get("sql"):
            actions.append(ToolCall("query", {"sql": sql}))
        return [*actions, f"<answer>{self.task.answer}</answer>"]


def _generated(seed: int, split: str, tables: Sequence[int], index: int) -> Task:
    """A task of a split; it depends on (seed, split, index) and the cycle of tables only."""
    database_seed = derive_seed("database", seed, split, index)
    num_tables = tables[index % len(tables)]
    script, question = build_database(database_seed, num_tables)
    with closing(from_script(script)) as connection:
        (value,) = connection.execute(question.sql).fetchone()
    return Task(
        id=f"database-{seed}-{split}-{index}",
        question=question.text,
        answer=_shown(value),
        category=f"{num_tables} tables",
        data={"seed": database_seed, "tables": num_tables, "sql": question.sql},
    )


@kept
def _runnable(
    path: str, questions: str, bad_rows: BadRows, max_rows: int, max_steps: int
) -> list[Task]:
    """The questions whose ``sql``, if they have one, runs within the agent's limits."""
    rows = RowFile(Path(questions).expanduser(), bad_rows)
    # No time limit: the set of questions must not depend on the machine's speed.
    database = Database(open_database(path), max_rows, max_steps, max_seconds=math.inf)
    good = []
    for line, task in load_rows(questions, "env.questions", bad_rows):
        try:
            if sql := task.data.get("sql"):
                database.query(sql)
        except (CallError, TypeError) as error:
            rows.bad(line, f"question {task.id!r}: its sql: {error}")
            continue
        good.append(task)
    database.close()
    return good


def _shown(value: Any) -> str:
    return "NULL" if value is None else str(value)


def _same(given: str, gold: str) -> bool:
    if given.casefold() == gold.casefold():
        return True
    try:
        return float(given) == float(gold)
    except ValueError:
        return False
