"""Rows of a user's JSONL file (also ``.gz``): each is checked before a run begins. A row that
cannot be used is an error that names file and line, or left out and counted where the recipe says
so.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from agent_r1.errors import ConfigError
from agent_r1.utils.scope import shared
from agent_r1.utils.text import clean_json

BadRows = Literal["error", "skip"]


class RowFile:
    """A file's rows with their line numbers.

    Attributes:
        file: Its path.
        bad_rows: Treatment of rows that cannot be used: an error, or left out.
    """

    def __init__(self, file: Path, bad_rows: BadRows) -> None:
        self.file, self.bad_rows = file, bad_rows
        files: dict[Path, dict[int, str]] = shared("rows left out", dict)
        self._skipped = files.setdefault(file, {})

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in self._lines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                self.bad(number, f"not valid JSON in UTF-8: {error}")
                continue
            if not isinstance(row, dict):
                self.bad(number, f"an object is needed on each line, not {line[:60]!r}")
                continue
            yield number, clean_json(row)

    def bad(self, number: int, reason: str) -> None:
        """Refuses a row, or notes that it is left out."""
        if self.bad_rows == "error":
            raise ConfigError(
                f"{self.file}, line {number}: {reason} (env.bad_rows = 'skip' leaves such rows out)"
            )
        self._skipped[number] = reason

    def why_empty(self) -> str:
        """Why there is no row in it that can be used."""
        return _in_words(self.file, self._skipped) if self._skipped else "it is empty"

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        try:
            opened = gzip.open if self.file.suffix == ".gz" else open
            with opened(self.file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield number, line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            where = f"{self.file}, after line {number}"
            raise ConfigError(f"{where}: not whole gzip: {error}") from error
        except OSError as error:
            raise ConfigError(f"{self.file} cannot be read: {error.strerror or error}") from error


def text_of(row: dict[str, Any], field: str, *, empty: bool = False) -> str:
    """A field that must be text, not empty unless ``empty``; numbers become text.

    Raises:
        ValueError: The field is missing, null or of another type.
    """
    value = row.get(field)
    if isinstance(value, str) and (empty or value.strip()):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    found = "is missing" if field not in row else f"is {value!r:.60}"
    raise ValueError(f"the text field {field!r} {found}")


def left_out() -> list[str]:
    """Rows that were left out of the files that the run has read, one line per file."""
    files: dict[Path, dict[int, str]] = shared("rows left out", dict)
    return [_in_words(file, rows) for file, rows in files.items() if rows]


def _in_words(file: Path, rows: dict[int, str]) -> str:
    return (
        f"{file}: {len(rows)} rows were left out (env.bad_rows = 'skip'), the first: line "
        f"{min(rows)}: {rows[min(rows)]}"
    )
