"""Passages from files: JSONL, JSONL.gz, Parquet.

A row has ``title`` and ``text``, or ``contents`` as in the corpora of FlashRAG and Search-R1 (the
title in quotes, a line break, the text); and an ``id``, by default its number in the corpus.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from agent_r1.errors import ConfigError
from agent_r1.search import Passage

FIELDS = ("id", "_id", "title", "text", "contents")


def read_corpus(files: Sequence[Path]) -> Iterator[Passage]:
    """The passages of all files, one after another.

    Raises:
        ConfigError: Where a row is not a passage, or has the id of another.
    """
    places: dict[str, tuple[Path, str]] = {}
    numbers = count()
    for file in files:
        for place, row in _rows(file):
            passage = _passage(row, str(next(numbers)), f"{file}, {place}")
            if passage.id in places:
                first = "{}, {}".format(*places[passage.id])
                raise ConfigError(
                    f"{file}, {place}: id = {passage.id!r} is that of {first}, too; ids must differ"
                )
            places[passage.id] = (file, place)
            yield passage
    if not places:
        raise ConfigError(f"corpus {', '.join(map(str, files)) or '()'}: no passages")


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of ``contents``; a single line is text without a title."""
    title, line_break, text = contents.partition("\n")
    if not line_break:
        return "", contents
    quoted = len(title) > 1 and title[0] == title[-1] == '"'
    return title[1:-1] if quoted else title, text


def _passage(row: Any, number: str, place: str) -> Passage:
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: {row!r:.80} is no object with the fields of a passage")
    for field in FIELDS:
        _check_text(row, field, place)
    name: Any = row.get("id", row.get("_id", number))  # the latter as in BEIR
    if "contents" in row and "text" not in row:
        title, text = split_contents(row["contents"])
        return Passage(name, row.get("title", title), text)
    for field in ("title", "text"):
        if field not in row:
            raise ConfigError(
                f"{place}: no field {field!r}; a passage has 'title' and 'text', or 'contents'"
            )
    return Passage(name, row["title"], row["text"])


def _check_text(row: dict[str, Any], field: str, place: str) -> None:
    value = row.get(field, "")
    if not isinstance(value, str):
        raise ConfigError(f"{place}: {field} = {value!r:.80} must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: {field} is not valid Unicode: {error}") from error


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    if not file.is_file():
        raise ConfigError(f"corpus: there is no file {file}")
    if file.suffix == ".parquet":
        return _parquet_rows(file)
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_rows(file)
    raise ConfigError(f"corpus {file}: its name must end in .jsonl, .jsonl.gz or .parquet")


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ConfigError(f"{file}, line {number}: not valid JSON: {error}") from error
                yield f"line {number}", row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{file}, after line {number}: not whole gzip: {error}") from error


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{file}: reading Parquet needs {error.name!r}: pip install 'agent-r1[parquet]'"
        ) from error
    numbers = count(1)
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = [name for name in FIELDS if name in table.schema_arrow.names]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    yield f"row {next(numbers)}", row
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{file}: not valid Parquet: {error}") from error
