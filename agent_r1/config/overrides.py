"""TOML files and command-line overrides, as plain nested dictionaries."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from agent_r1.errors import ConfigError


def load_toml(path: Path) -> dict[str, Any]:
    """The raw content of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}") from error
    except (OSError, RecursionError, ValueError) as error:  # not UTF-8, too many digits
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def parse_overrides(arguments: list[str]) -> list[tuple[str, Any]]:
    """``["--a.b", "1", "--c=x"]`` to ``[("a.b", 1), ("c", "x")]``.

    Values are TOML; text that is not TOML is a string.
    """
    pairs: list[tuple[str, Any]] = []
    rest = list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--") or len(key) < 3:
            raise ConfigError(
                f"unexpected argument {key!r}; overrides look like --section.key value"
            )
        key, separator, text = key[2:].partition("=")
        if not separator:
            if not rest:
                raise ConfigError(f"--{key} needs a value")
            text = rest.pop(0)
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (RecursionError, ValueError):
            value = text
        pairs.append((key, value))
    return pairs


def override(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested dictionaries; a section given as a bare name becomes a table
    first.
    """
    *sections, last = key.split(".")
    for section in sections:
        inner = data.get(section, {})
        if isinstance(inner, str):
            inner = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"--{key}: {section!r} is not a section but {inner!r}")
        data[section] = inner = dict(inner)
        data = inner
    data[last] = value
