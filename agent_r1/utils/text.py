"""Turns foreign values into clean text: results of tools, exceptions, model output."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sysconfig
import traceback
from collections import deque
from collections.abc import Generator, Iterator, KeysView, Mapping, ValuesView
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from agent_r1.errors import NotTextError

_LIBRARIES = ("site-packages", sysconfig.get_paths()["stdlib"])


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """``text`` as text that can be encoded, stored and sent: a lone surrogate (half a character, as
    of ``"\\\\ud83d"``) becomes U+FFFD, NUL is left out.

    Example:
        >>> clean("a\\x00b")
        'ab'
    """
    if "\x00" in text:
        text = text.replace("\x00", "")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # A pair of surrogates is a character after all, which UTF-16 knows.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def printable(text: str) -> str:
    """``text`` made safe for a terminal: control characters except ``\\n`` and tabs are escaped."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def clean_json(value: Any) -> Any:
    """A JSON value with all texts and names in it ``clean``."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [clean_json(item) for item in value]
    if isinstance(value, dict):
        return {clean(str(key)): clean_json(item) for key, item in value.items()}
    return value


def texts_in(value: Any) -> Iterator[str]:
    """All strings in a JSON value, except its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def is_library(file: str) -> bool:
    """Whether code in this file is an installed library's, or Python's own."""
    return file.startswith("<") or any(part in file for part in _LIBRARIES)


def describe(error: BaseException) -> str:
    """An exception in one line: its type and its words."""
    try:
        words = str(error)
    except Exception:  # its author's code
        words = "(its text cannot be read)"
    return clean(f"{type(error).__name__}: {words}").rstrip(": ")


def place_of(error: BaseException) -> str:
    """Where in the user's code an exception was raised: `` (in score, my_env.py, line 7)``;
    empty if it was raised in ours.
    """
    ours = f"{Path(__file__).parent.parent}{os.sep}"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    theirs = [f for f in frames if not f.f_code.co_filename.startswith((ours, "<"))]
    theirs = [f for f in theirs if f.f_code.co_filename != contextlib.__file__]  # scopes of ours
    if not theirs:
        return ""
    # The author's own frame, not the library's that it called.
    own = [f for f in theirs if not is_library(f.f_code.co_filename)]
    frame = (own or theirs)[-1]
    place = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
    return f" (in {frame.f_code.co_qualname}, {place})"


def as_text(value: Any) -> str:
    """A value of any ordinary type as the text that an agent reads: text as it is, a list of texts
    as lines, everything else as JSON, as pydantic writes it (dates, decimals, enums, models,
    dataclasses, sets, NumPy's numbers and arrays).

    Raises:
        NotTextError: The value has no text form: binary data, an object of unknown type.

    Example:
        >>> as_text({"day": __import__("datetime").date(2024, 2, 29), "n": {3}})
        '{"day": "2024-02-29", "n": [3]}'
    """
    if isinstance(value, str):
        return clean(str.__str__(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return _decoded(bytes(value))
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        return clean("\n".join(value))
    try:
        value = _ordered(value)
        plain = to_jsonable_python(value, fallback=_plain, inf_nan_mode="constants")
        text = json.dumps(_sorted(value, plain), ensure_ascii=False)
    except Exception as error:  # what its authors' code raises, too
        raise NotTextError(f"a value of type {type(value).__name__}") from error
    # A single text (a date, a decimal, an enum) needs no quotes.
    return clean(plain if isinstance(plain, str) else text)


def _decoded(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotTextError(f"{len(data):,} bytes") from error
    if any(ord(c) < 32 and c not in "\t\n\r" for c in text):
        raise NotTextError(f"{len(data):,} bytes")
    return text


def _ordered(value: Any) -> Any:
    """Python's containers as lists and dictionaries of clean texts; a set, whose order may
    differ between processes, is sorted by its items' types and texts.
    """
    if isinstance(value, str):
        return clean(str.__str__(value))
    if isinstance(value, set | frozenset):
        return sorted(map(_ordered, value), key=lambda item: (type(item).__name__, repr(item)))
    if type(value) is dict:
        return {clean(k) if isinstance(k, str) else k: _ordered(v) for k, v in value.items()}
    if isinstance(value, list | tuple | deque | KeysView | ValuesView | range | Generator):
        return [_ordered(item) for item in value]
    return value


def _sorted(value: Any, plain: Any) -> Any:
    """Sorts the sets inside objects that pydantic converted."""
    if isinstance(value, set | frozenset) and isinstance(plain, list):
        return sorted(plain, key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, Mapping) and isinstance(plain, dict):
        if len(value) != len(plain):
            return plain  # two keys became one
        pairs = zip(value.values(), plain.items(), strict=True)
        return {key: _sorted(item, made) for item, (key, made) in pairs}
    if isinstance(plain, dict):  # an object with these attributes
        return {key: _sorted(getattr(value, key, made), made) for key, made in plain.items()}
    if isinstance(value, list | tuple) and isinstance(plain, list):
        return [_sorted(item, made) for item, made in zip(value, plain, strict=True)]
    return plain


def _plain(value: Any) -> Any:
    """Converts types unknown to pydantic by their own methods: NumPy, tensors, data frames."""
    for method in ("tolist", "to_dict"):
        if callable(found := getattr(value, method, None)):
            return found()
    if isinstance(value, complex):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if "__str__" in {name for c in type(value).__mro__[:-1] for name in vars(c)}:
        return str(value)  # its class defines a text: a path, a URL, a fraction
    raise TypeError(f"{type(value).__name__} has no text")
