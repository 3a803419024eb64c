"""An index of a run's episodes: the figures and words by which people look for them, in an SQLite
file in the user's cache. The run folder is only read, each file of trajectories once, and again if
it has changed.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from agent_r1.config.section import nearest
from agent_r1.envs.gold import in_words
from agent_r1.errors import ConfigError
from agent_r1.run.folder import RunFolder
from agent_r1.types import Estimates, Group, StepKey, Trajectory
from agent_r1.utils.cache_folder import cache_folder

VERSION = "1"
"""Of the tables below; another one makes another file."""
NUMBERS = {
    "iteration": "iteration of training",
    "group": "number of the group in its iteration, from 1",
    "attempt": "number of the attempt in its group, from 1",
    "success": "1 if the task was solved, else 0",
    "reward": "outcome reward",
    "turns": "model calls",
    "tool_calls": "well-formed calls",
    "tokens": "tokens of the episode as one sequence, the prompt included",
    "prompt_tokens": "tokens of the prompt",
    "action_tokens": "sampled tokens",
    "seconds": "wall time",
    "advantage": "mean advantage of its tokens",
    "entropy": "mean entropy of its tokens, in nats",
    "off_policy": "share of its tokens whose importance ratio is outside [0.9, 1.1]",
}
"""Figures of an episode, to filter and sort by."""
WORDS = ("task", "category", "stop")
"""Texts of an episode, to filter by as they are, and to sort by."""
SHOWN = 240
"""Most characters of a text in a row."""
_TABLES = f"""
CREATE TABLE IF NOT EXISTS files (
    iteration INTEGER PRIMARY KEY, stamp TEXT NOT NULL, error TEXT);
CREATE TABLE IF NOT EXISTS episodes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, {", ".join(f'"{n}" REAL' for n in NUMBERS)},
    task TEXT, category TEXT, stop TEXT, fault TEXT, question TEXT, answer TEXT,
    UNIQUE ("iteration", "group", "attempt"));
CREATE TABLE IF NOT EXISTS parts (id INTEGER, name TEXT, value REAL, PRIMARY KEY (name, id));
CREATE TABLE IF NOT EXISTS events (id INTEGER, name TEXT, value REAL, PRIMARY KEY (name, id));
CREATE INDEX IF NOT EXISTS parts_by_id ON parts (id);
CREATE INDEX IF NOT EXISTS events_by_id ON events (id);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 (text, content='');
"""


@dataclass(frozen=True)
class Query:
    """Which episodes, in which order.

    Attributes:
        ranges: Lowest and highest value by name of a figure in ``NUMBERS``, or of a part of the
            reward, ``"part/format"``; ``None`` for no bound.
        equal: Exact values by name in ``WORDS``.
        event: An event that happened, e.g. ``"fault/timeout:search"``, or its beginning.
        text: Words that the episode contains, in any order; each may be a word's beginning.
        sort: A figure, one of ``WORDS``, or ``"part/..."``.
        descending: Whether the largest come first.
        offset, limit: The part of the list that is wanted.
    """

    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    event: str = ""
    text: str = ""
    sort: str = "iteration"
    descending: bool = True
    offset: int = 0
    limit: int = 100


class EpisodeIndex:
    """The index of one run; see the module's docstring. Several threads and processes may use it
    at once.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._file = cache_folder("episodes", (), VERSION, str(run.path.resolve())) / "index.sqlite"
        try:
            self._make()
        except (OSError, sqlite3.Error):  # no home, a read-only one, or somebody else's
            self._temporary = tempfile.TemporaryDirectory()
            self._file = Path(self._temporary.name) / "index.sqlite"
            self._make()

    def _make(self) -> None:
        """Makes the file, once, whoever else does so now; a damaged one is made again."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self._file}.lock"):
            try:
                self._check()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:  # cut off by a full disk, say
                for end in ("", "-wal", "-shm"):
                    Path(f"{self._file}{end}").unlink(missing_ok=True)
                self._check()

    def _check(self) -> None:
        with self._connected() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_TABLES)
            if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError(f"{self._file} is damaged")

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._file, timeout=30.0)
        connection.row_factory = sqlite3.Row
        try:
            with connection:  # a transaction
                yield connection
        finally:
            connection.close()

    def missing(self) -> list[int]:
        """The iterations that are still to be read, the newest first; rows of files that are gone
        are dropped.
        """
        now = {number: self._stamp(number) for number in self.run.trajectory_iterations()}
        with self._connected() as connection:
            rows = connection.execute("SELECT iteration, stamp FROM files").fetchall()
            known = {row["iteration"]: row["stamp"] for row in rows}
            for number in known.keys() - now.keys():
                _forget(connection, number)
        return sorted((n for n, stamp in now.items() if known.get(n) != stamp), reverse=True)

    def read(self, iteration: int) -> None:
        """Reads the trajectories of an iteration. Of a damaged file, what comes before the damage
        is kept, and the damage noted.
        """
        stamp, error = self._stamp(iteration), None
        found: list[tuple[_Row, str]] = []
        try:
            for group, known in self.run.estimated(iteration):
                found += _rows(iteration, group, known)
        except ConfigError as damage:
            if self._stamp(iteration) != stamp:
                return  # the run went back meanwhile; the next look finds what is there now
            error = str(damage)
        with self._connected() as connection:
            _forget(connection, iteration)
            for row, text in found:
                _insert(connection, row, text)
            connection.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (iteration, stamp, error)
            )

    def read_all(self) -> EpisodeIndex:
        """Reads all that is missing."""
        for iteration in self.missing():
            self.read(iteration)
        return self

    def _stamp(self, iteration: int) -> str:
        """Size and time of an iteration's file; it may go away meanwhile."""
        try:
            found = self.run.trajectories_file(iteration).stat()
        except OSError:
            return "gone"
        return f"{found.st_size} {found.st_mtime_ns}"

    def damaged(self) -> dict[int, str]:
        """Iterations whose file could not be read to its end, and why."""
        with self._connected() as connection:
            rows = connection.execute("SELECT * FROM files WHERE error IS NOT NULL").fetchall()
        return {row["iteration"]: row["error"] for row in rows}

    def find(self, query: Query) -> tuple[int, list[dict[str, Any]]]:
        """How many episodes a query finds, and the part of them that it asks for.

        Raises:
            ConfigError: The query names a figure that there is none of.
        """
        where, values = _conditions(query)
        order, of_order = _order(query)
        with self._connected() as connection:
            total = connection.execute(f"SELECT count(*) FROM episodes e{where}", values)
            rows = connection.execute(
                f"SELECT e.* FROM episodes e{where} {order} LIMIT ? OFFSET ?",
                (*values, *of_order, query.limit, query.offset),
            )
            return total.fetchone()[0], [_as_dict(connection, row) for row in rows.fetchall()]

    def facets(self) -> dict[str, Any]:
        """What there is to filter by, with the number of episodes of each."""
        with self._connected() as connection:

            def counts(column: str, table: str = "episodes") -> dict[str, int]:
                rows = connection.execute(
                    f'SELECT "{column}", count(*) FROM {table} GROUP BY 1 ORDER BY 2 DESC LIMIT 200'
                )
                return dict(map(tuple, rows.fetchall()))

            first, last, total = connection.execute(
                "SELECT min(iteration), max(iteration), count(*) FROM episodes"
            ).fetchone()
            return {
                "episodes": total,
                "iterations": [first, last] if total else [],
                "stops": counts("stop"),
                "categories": counts("category"),
                "parts": counts("name", "parts"),
                "events": counts("name", "events"),
            }

    def mean(self, figure: str, query: Query = Query()) -> float | None:
        """The mean of a figure over the episodes of a query that have it."""
        where, values = _conditions(query)
        with self._connected() as connection:
            found = connection.execute(
                f"SELECT avg(e.{_column(figure)}) FROM episodes e{where}", values
            )
            mean: float | None = found.fetchone()[0]
        return mean


@dataclass
class _Row:
    columns: dict[str, Any]
    parts: dict[str, float]
    events: Counter[str]


def _rows(iteration: int, group: Group, known: Estimates) -> Iterator[tuple[_Row, str]]:
    """The rows of a group, each with the text that is searched."""
    for attempt, trajectory in enumerate(group.trajectories):
        steps = trajectory.steps
        keys = [StepKey(group.number, attempt, number) for number in range(len(steps))]
        advantages = [x for key in keys for x in known.advantages.get(key, ())]
        ratios = [x for key in keys for x in known.ratios.get(key, ())]
        events = Counter(event for step in steps for event in step.events)
        events.update(trajectory.discarded_events)
        outcome = trajectory.outcome
        columns = {
            "iteration": iteration,
            "group": group.number + 1,
            "attempt": attempt + 1,
            "success": None if outcome is None else outcome.success,
            "reward": None if outcome is None else outcome.reward,
            "turns": len(steps),
            "tool_calls": trajectory.num_calls,
            "tokens": trajectory.num_tokens,
            "prompt_tokens": len(trajectory.prompt_ids),
            "action_tokens": trajectory.num_action_tokens,
            "seconds": trajectory.seconds,
            "advantage": _mean(advantages),
            "entropy": _mean([x for step in steps for x in step.action.entropies]),
            "off_policy": _mean([not 0.9 <= ratio <= 1.1 for ratio in ratios]),
            "task": trajectory.task_id,
            "category": trajectory.category,
            "stop": str(trajectory.stop),
            "fault": trajectory.fault,
            "question": question_of(trajectory)[:SHOWN],
            "answer": in_words(steps[-1].message)[:SHOWN] if steps else "",
        }
        yield _Row(columns, trajectory.process_reward(), events), _text_of(trajectory)


def question_of(trajectory: Trajectory) -> str:
    """The last thing that was said to the agent before it began."""
    said = (m.content for m in reversed(trajectory.prompt) if m.role == "user")
    return next(said, "")


def _text_of(trajectory: Trajectory) -> str:
    said = [message.content for message in trajectory.prompt if message.role != "system"]
    for step in trajectory.steps:
        said.append(in_words(step.message))
        shown = [message.content for message in step.observation]
        said += [*shown, *(result.text for result in step.results if result.text not in shown)]
    return "\n".join([trajectory.task_id, trajectory.fault or "", *said])


def _mean(values: Sequence[float]) -> float | None:
    """The mean; ``None`` for none, or where it is no number."""
    mean = math.fsum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None


def _insert(connection: sqlite3.Connection, row: _Row, text: str) -> None:
    names = ", ".join(f'"{name}"' for name in row.columns)
    marks = ", ".join("?" * len(row.columns))
    found = connection.execute(
        f"INSERT INTO episodes ({names}) VALUES ({marks})", (*row.columns.values(),)
    )
    number = found.lastrowid
    for table, values in (("parts", row.parts), ("events", row.events)):
        connection.executemany(
            f"INSERT INTO {table} VALUES (?, ?, ?)",
            [(number, name, value) for name, value in values.items()],
        )
    connection.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (number, text))


def _forget(connection: sqlite3.Connection, iteration: int) -> None:
    """Drops the rows of an iteration; its words stay, of ids that are never used again."""
    ids = "(SELECT id FROM episodes WHERE iteration = ?)"
    for table in ("parts", "events"):
        connection.execute(f"DELETE FROM {table} WHERE id IN {ids}", (iteration,))
    connection.execute("DELETE FROM episodes WHERE iteration = ?", (iteration,))
    connection.execute("DELETE FROM files WHERE iteration = ?", (iteration,))


def _column(name: str) -> str:
    known = [*NUMBERS, *WORDS]
    if name not in known:
        raise ConfigError(f"episodes have no figure {name!r}{nearest(name, known)}")
    return f'"{name}"'


def _conditions(query: Query) -> tuple[str, list[Any]]:
    """The WHERE clause of a query, and its values."""
    parts: list[str] = []
    values: list[Any] = []
    for name, (low, high) in query.ranges.items():
        part = name.removeprefix("part/")
        bounds = [("value" if part != name else f"e.{_column(name)}", ">=", low)]
        bounds.append((bounds[0][0], "<=", high))
        tests = [
            (f"{column} {sign} ?", bound) for column, sign, bound in bounds if bound is not None
        ]
        if not tests:
            continue
        condition = " AND ".join(test for test, _ in tests)
        if part != name:
            condition = f"e.id IN (SELECT id FROM parts WHERE name = ? AND {condition})"
            values.append(part)
        parts.append(condition)
        values += [bound for _, bound in tests]
    for name, value in query.equal.items():
        parts.append(f"e.{_column(name)} = ?")
        values.append(value)
    if query.event:
        parts.append("e.id IN (SELECT id FROM events WHERE substr(name, 1, ?) = ?)")
        values += [len(query.event), query.event]
    if words := query.text.replace("\x00", " ").split():
        quoted = " ".join('"' + word.replace('"', '""') + '"*' for word in words)
        parts.append("e.id IN (SELECT rowid FROM words WHERE words MATCH ?)")
        values.append(quoted)
    return (f" WHERE {' AND '.join(parts)}" if parts else ""), values


def _order(query: Query) -> tuple[str, list[Any]]:
    """The ORDER BY clause, and its values; what lacks the figure comes last."""
    values: list[Any] = []
    column = "(SELECT value FROM parts WHERE parts.id = e.id AND name = ?)"
    part = query.sort.removeprefix("part/")
    if part != query.sort:
        values = [part]
    else:
        column = f"e.{_column(query.sort)}"
    way = "DESC" if query.descending else "ASC"
    rest = 'e."iteration" DESC, e."group", e."attempt"'
    return f"ORDER BY {column} {way} NULLS LAST, {rest}", values


def _as_dict(connection: sqlite3.Connection, row: sqlite3.Row) -> dict[str, Any]:
    found: dict[str, Any] = {name: row[name] for name in row.keys() if name != "id"}  # noqa: SIM118
    for name in ("iteration", "group", "attempt", "turns", "tool_calls"):
        found[name] = int(found[name])
    for table in ("parts", "events"):
        pairs = connection.execute(f"SELECT name, value FROM {table} WHERE id = ?", (row["id"],))
        found[table] = dict(map(tuple, pairs.fetchall()))
    return found


def parse_range(text: str) -> tuple[float | None, float | None]:
    """Bounds as people write them: ``3..8``, ``3..``, ``..8``, ``3``.

    Raises:
        ConfigError: It is none of these.
    """
    low, dots, high = text.partition("..")
    try:
        bounds = (float(low) if low else None, float(high) if high else None)
    except ValueError as error:
        raise ConfigError(f"{text!r} is no range; write 3..8, 3.., ..8 or 3") from error
    return bounds if dots else (bounds[0], bounds[0])


def as_json(value: Any) -> str:
    """JSON that every reader takes: what is no finite number becomes ``null``."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
