"""A SQLite database, read-only, with limits on every query."""

from __future__ import annotations

import itertools
import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_r1.errors import CallError, ConfigError

MAX_VALUE_BYTES = 20_000
"""Largest value that a query reads or makes."""
MAX_RESULT_BYTES = 1_000_000
"""Largest sum of a result's rows."""
MAX_COLUMNS = 100
"""Most columns of a result, unless a table is wider."""
SCRIPT_SECONDS = 30.0
"""Limit of a SQL script that makes the database."""
MAX_SECONDS = 2.0
"""Time limit of one query; it blocks the event loop for at most this long."""
_BROKEN = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_FULL,
}  # fmt: skip
"""Errors that are not the query's fault."""
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


@dataclass(frozen=True)
class Rows:
    """A query's result.

    Attributes:
        more: Whether there were more rows than are here.
        tables: Tables that were read.
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
        """The rows to show and one more; an error if they are too large together."""
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


def open_database(given: str) -> sqlite3.Connection:
    """Opens the user's database, read-only."""
    path = Path(given).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"env.path = {given!r}: there is no file {path}")
    try:
        if path.suffix == ".sql":
            return from_script(path.read_text(encoding="utf-8"))
        with path.open("rb") as file:
            if file.read(16) != b"SQLite format 3\0":
                raise sqlite3.DatabaseError("no SQLite database")
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"env.path = {given!r}: {error}") from error
    return sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, cached_statements=0, timeout=0)


def from_script(script: str) -> sqlite3.Connection:
    # Without a cache, since the authorizer is called only at compilation.
    connection = sqlite3.connect(":memory:", cached_statements=0)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)  # no other file is touched
    until = time.monotonic() + SCRIPT_SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > until, 100_000)
    connection.executescript(script)
    connection.set_progress_handler(None, 0)
    return connection
