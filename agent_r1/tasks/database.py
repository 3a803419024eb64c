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
import itertools
import json
import math
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from agent_r1.config import ConfigError
from agent_r1.env import ToolEnv, Transition
from agent_r1.tasks.answers import answer_in
from agent_r1.tasks.lazy import LazyTasks
from agent_r1.tasks.rows import BadRows, RowFile
from agent_r1.tasks.shops import build_database
from agent_r1.tasks.splits import deal
from agent_r1.tasks.tools import load_rows
from agent_r1.tools import CallError, ToolResult, tool
from agent_r1.types import Message, Outcome, Task, ToolCall, derive_seed

NUM_TASKS = 100_000
MAX_VALUE_BYTES = 20_000
"""Of one value that a query reads or makes."""
MAX_RESULT_BYTES = 1_000_000
"""Of all rows that a query gives."""
MAX_COLUMNS = 100
"""Of a result, or as many as the widest table has."""
SCRIPT_SECONDS = 30.0
"""For a SQL script that makes the database."""
MAX_SECONDS = 2.0
"""Of a query, whatever it does within its steps; that much, it holds up all episodes."""
_BROKEN = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_FULL,
}  # fmt: skip
"""Errors that are not the query's."""
_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
_FUNCTIONS = {
    "abs", "acos", "asin", "atan", "atan2", "avg", "ceil", "ceiling", "char", "coalesce", "concat",
    "concat_ws", "cos", "count", "cume_dist", "date", "datetime", "degrees", "dense_rank", "exp",
    "first_value", "floor", "format", "glob", "group_concat", "hex", "ifnull", "iif", "instr",
    "json", "json_array", "json_array_length", "json_extract", "json_group_array", "json_object",
    "json_quote", "json_type", "json_valid", "julianday", "lag", "last_value", "lead", "length",
    "like", "ln", "log", "log10", "log2", "lower", "ltrim", "max", "median", "min", "mod",
    "nth_value", "ntile", "nullif", "octet_length", "percent_rank", "pi", "pow", "power", "printf",
    "quote", "radians", "rank", "replace", "round", "row_number", "rtrim", "sign", "sin", "sqrt",
    "strftime", "string_agg", "substr", "substring", "sum", "tan", "time", "timediff", "total",
    "trim", "trunc", "typeof", "unhex", "unicode", "unixepoch", "upper", "->", "->>",
}  # fmt: skip


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


@dataclass(frozen=True)
class Rows:
    """What a query gave.

    Attributes:
        more: Whether there were more rows than are here.
        tables: Those that were read.
    """

    columns: list[str] = field(metadata={"noise": False})
    rows: list[list[str | int | float | None]]
    more: bool
    tables: list[str] = field(metadata={"noise": False})


class Database:
    """A connection that can only read, within limits."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        max_rows: int,
        max_steps: int,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self._connection, self._max_rows, self._max_steps = connection, max_rows, max_steps
        self._max_seconds = max_seconds
        self._steps, self._until = 0, math.inf
        self._touched: set[str] = set()
        connection.execute("PRAGMA query_only = ON")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.set_progress_handler(self._count, 1000)
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        self.tables = self._read_tables()
        widest = max(map(len, self.tables.values()), default=0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, max(MAX_COLUMNS, widest))
        connection.set_authorizer(self._authorize)

    def query(self, sql: str) -> Rows:
        """The rows of one statement.

        Raises:
            CallError: SQLite's message, or which limit the query broke.
        """
        self._steps, self._touched = 0, set()
        self._until = time.monotonic() + self._max_seconds
        try:
            with closing(self._connection.execute(sql)) as cursor:
                rows = list(self._fetch(cursor))
                if cursor.description is None:
                    raise CallError("that is no statement")
                columns = [column[0] for column in cursor.description]
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code is not None and code & 0xFF in _BROKEN:
                raise
            if code == sqlite3.SQLITE_INTERRUPT:
                raise CallError("the query takes too long; make it simpler") from error
            raise CallError(str(error)) from error
        values = [[v.hex() if isinstance(v, bytes) else v for v in row] for row in rows]
        more = len(rows) > self._max_rows
        return Rows(columns, values[: self._max_rows], more, sorted(self._touched))

    def close(self) -> None:
        self._connection.close()

    def _fetch(self, cursor: sqlite3.Cursor) -> Iterator[tuple[Any, ...]]:
        """As many rows as are shown and one more, unless they are too large together."""
        size = 0
        for row in itertools.islice(cursor, self._max_rows + 1):
            size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
            if size > MAX_RESULT_BYTES:
                raise CallError("the result is too large; ask for fewer or shorter columns")
            yield row

    def _read_tables(self) -> dict[str, list[str]]:
        rows = self._connection.execute(
            "SELECT m.name, c.name FROM sqlite_schema m JOIN pragma_table_info(m.name) c "
            "WHERE m.type IN ('table', 'view') AND m.name NOT LIKE 'sqlite\\_%' ESCAPE '\\' "
            "ORDER BY m.rowid, c.cid"
        ).fetchall()
        tables: dict[str, list[str]] = {}
        for table, column in rows:
            tables.setdefault(table, []).append(column)
        return tables

    def _count(self) -> bool:
        self._steps += 1000
        return self._steps > self._max_steps or time.monotonic() > self._until

    def _authorize(self, action: int, first: str | None, second: str | None, *_: Any) -> int:
        if action == sqlite3.SQLITE_FUNCTION:
            return sqlite3.SQLITE_OK if second in _FUNCTIONS else sqlite3.SQLITE_DENY
        if action == sqlite3.SQLITE_READ and first:
            self._touched.add(first)
        return sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY


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
            tables: Of generated questions: numbers of tables they cycle through.
            seed: Of generated databases.
            max_rows: Of a result.
            max_steps: Instructions of SQLite's virtual machine.
            examples: How many worked examples are shown before the question.
            holdout: Share of one's own questions for validation, and the same again for test.
            bad_rows: What a question leads to that cannot be used, as one whose ``sql`` does not
                run: an ``error`` before the run, or it is left out (``skip``).
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
            return _from_script(script)
        return _open(self.settings.path)

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

    def gold(self) -> list[str]:
        actions = ['<tool_call>\n{"name": "list_tables", "arguments": {}}\n</tool_call>']
        if sql := self.task.data.get("sql"):
            call = json.dumps({"name": "query", "arguments": {"sql": sql}})
            actions.append(f"<tool_call>\n{call}\n</tool_call>")
        return [*actions, f"<answer>{self.task.answer}</answer>"]


def _generated(seed: int, split: str, tables: Sequence[int], index: int) -> Task:
    """A task of a split; it depends on (seed, split, index) and the cycle of tables only."""
    database_seed = derive_seed("database", seed, split, index)
    num_tables = tables[index % len(tables)]
    script, question = build_database(database_seed, num_tables)
    with closing(_from_script(script)) as connection:
        (value,) = connection.execute(question.sql).fetchone()
    return Task(
        id=f"database-{seed}-{split}-{index}",
        question=question.text,
        answer=_shown(value),
        category=f"{num_tables} tables",
        data={"seed": database_seed, "tables": num_tables, "sql": question.sql},
    )


def _open(given: str) -> sqlite3.Connection:
    """A database of the user's, read-only."""
    path = Path(given).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"env.path = {given!r}: there is no file {path}")
    try:
        if path.suffix == ".sql":
            return _from_script(path.read_text(encoding="utf-8"))
        with path.open("rb") as file:
            if file.read(16) != b"SQLite format 3\0":
                raise sqlite3.DatabaseError("no SQLite database")
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"env.path = {given!r}: {error}") from error
    return sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, cached_statements=0, timeout=0)


def _from_script(script: str) -> sqlite3.Connection:
    # Without a cache, since the authorizer sees only what is compiled anew.
    connection = sqlite3.connect(":memory:", cached_statements=0)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)  # no other file is touched
    until = time.monotonic() + SCRIPT_SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > until, 100_000)
    connection.executescript(script)
    connection.set_progress_handler(None, 0)
    return connection


@functools.lru_cache(maxsize=8)
def _runnable(
    path: str, questions: str, bad_rows: BadRows, max_rows: int, max_steps: int
) -> list[Task]:
    """The questions whose ``sql``, if they have one, runs under the limits of the agent's."""
    rows = RowFile(Path(questions).expanduser(), bad_rows)
    # By steps alone: which questions there are must not depend on the machine's speed.
    database = Database(_open(path), max_rows, max_steps, max_seconds=math.inf)
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
