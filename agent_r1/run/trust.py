"""Decides which run folders may be resumed: recipes name files, modules, commands and servers, and
resuming a run loads and calls them. Recipes that ran on this account are listed in the user's state
folder, by hash; the recipe of a folder from elsewhere is not on that list.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent_r1.errors import ConfigError
from agent_r1.utils.text import printable, texts_in

_CODE = re.compile(r".+:[^\s/:]+\s*", re.DOTALL)
"""``file.py:Class``, ``package.module:Class``, ``module:Game-v0``: values shown with a
refusal. Every recipe that did not run here is refused.
"""
_TELLING = (
    *("command", "url", "taskset", "headers", "env", "cassette", "id", "path", "module"),
    *("tracking_uri", "space_id"),
)
"""Keys whose values are shown as well."""
_RELATIVE_FILE = re.compile(r"(?![-/~@])(\S*/\S*|\S*\.[A-Za-z]\w{0,3})")
"""Words of a command that are files of the current folder, by their form."""
MAX_SHOWN = 12


def code_of(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of a recipe that name code, commands, servers or files."""
    last = key.rpartition(".")[2]
    table = isinstance(data, dict) and (last not in ("headers", "cassette", "env") or key == "env")
    if table:
        for name, value in data.items():
            yield from code_of(value, f"{key}.{name}".lstrip("."))
    elif last in _TELLING and data:
        yield key, data
    elif isinstance(data, list):
        for value in data:
            yield from code_of(value, key)
    elif isinstance(data, str) and _CODE.fullmatch(data):
        yield key, data


def allow(data: dict[str, Any]) -> None:
    """Records that runs with this recipe may be resumed. If the record cannot be written, the next
    resume asks for ``--trust``.
    """
    with contextlib.suppress(OSError, RuntimeError):  # a read-only disk, an account without home
        file = _file_of(data)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def must_be_allowed(data: dict[str, Any], file: Path) -> None:
    """Raises ``ConfigError`` for a recipe in ``file`` that did not run on this account."""
    with contextlib.suppress(OSError, RuntimeError):
        if _file_of(data).exists():
            return
    used = sorted(code_of(data), key=lambda pair: not _is_code(*pair))  # that comes first
    named = [printable(f"{key} = {json.dumps(value)}") for key, value in used]
    if (more := len(named) - MAX_SHOWN) > 0:
        named[MAX_SHOWN:] = [f"and {more} more"]
    raise ConfigError(
        f"{file}: this run was not made by this account, or its recipe was changed since. Going on "
        f"with it would use: {'; '.join(named)}. Look at that; if you trust it, repeat with "
        "--trust (in Python: trust=True)"
    )


def _file_of(data: dict[str, Any]) -> Path:
    text = json.dumps(data, sort_keys=True)
    commands = (value for key, value in code_of(data) if key.endswith("command"))
    if any(map(_is_relative_code, texts_in(data))) or any(
        _RELATIVE_FILE.fullmatch(word) for command in commands for word in texts_in(command)
    ):
        text += str(Path.cwd())  # another folder's files of the same names are not these
    home = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not home.is_absolute():  # to be ignored, by the XDG specification
        home = Path.home() / ".local" / "state"
    return home / "agent-r1" / "runs" / hashlib.sha256(text.encode()).hexdigest()


def _is_relative_code(value: str) -> bool:
    """Whether a value names code that is looked for from the current folder."""
    if Path(value).is_absolute() or "://" in value:
        return False
    return _CODE.fullmatch(value) is not None


def _is_code(key: str, value: Any) -> bool:
    return key.endswith("command") or _CODE.fullmatch(str(value)) is not None
