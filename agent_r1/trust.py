"""Which runs may load code: a run folder names files, modules and commands in its recipe, and
whoever goes on with it runs them. Those of recipes that ran here are listed in the user's state
folder, by content; a folder from elsewhere is not, whatever it says of itself.
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

from agent_r1.config import ConfigError

_CODE = re.compile(r"[\w./~\\ -]+(\.py)?:[A-Za-z_][\w.-]*")
"""``file.py:Class``, ``package.module:Class``, ``module:Game-v0``."""


def code_of(data: Any, key: str = "") -> Iterator[str]:
    """What a recipe has loaded or started, as ``key = value``."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from code_of(value, f"{key}.{name}".lstrip("."))
    elif key.endswith(".command") and data:
        yield f"{key} = {json.dumps(data)}"
    elif isinstance(data, list):
        for value in data:
            yield from code_of(value, key)
    elif isinstance(data, str) and _CODE.fullmatch(data):
        yield f"{key} = {data!r}"


def allow(data: dict[str, Any]) -> None:
    """Notes that the code of a recipe may be loaded from any run folder that holds this recipe.
    Where that cannot be noted, somebody will be asked later.
    """
    if any(code_of(data)):
        file = _file_of(data)
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()


def must_be_allowed(data: dict[str, Any], file: Path) -> None:
    """Raises ``ConfigError`` for a recipe in ``file`` that names code and did not run here."""
    named = list(code_of(data))
    if not named or _file_of(data).exists():
        return
    raise ConfigError(
        f"{file} was not made here, or was changed since, and going on would run what it names: "
        f"{'; '.join(named[:8])}; look at that, then add --trust (in Python: trust=True)"
    )


def _file_of(data: dict[str, Any]) -> Path:
    text = json.dumps(data, sort_keys=True)
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "agent-r1" / "runs" / hashlib.sha256(text.encode()).hexdigest()
