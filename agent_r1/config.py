"""Sections, names and overrides: how a TOML file becomes a checked, typed recipe. Which sections
exist is not known here.

A *section* is a pydantic model that forbids unknown keys. A *registry* maps the names of one kind
of thing (environments, algorithms, ...) to classes; a class brings its own section as
``Settings``. So a key that the chosen class does not have is an error before anything is loaded.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import tomllib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
from pydantic import BaseModel, ConfigDict, ValidationError

from agent_r1.text import describe, place_of


class ConfigError(ValueError):
    """The user's input cannot be used; the message says where, what and how to mend it."""


class RunError(RuntimeError):
    """A run, or a part of it, came to nothing; the message says what was seen first."""


class Section(BaseModel):
    """Base of all sections: frozen, and a key it does not know is an error, as are infinity and
    NaN.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NamedSection(Section):
    """A section whose ``name`` chose the class that it configures."""

    name: str


def nearest(word: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` when something known is close, else all that is known."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    close.sort(key=lambda other: sorted(other) != sorted(word))  # letters that changed places
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


@dataclass(frozen=True)
class Registry:
    """Names of one kind of thing, resolved to classes on first use.

    A name is a key of ``table``, an installed entry point of group ``agent_r1.<kind>``, or
    ``path/to/file.py:Class`` / ``package.module:Class``.
    """

    kind: str
    table: dict[str, str]
    default: str | None = None
    """The name that a section without one has."""

    def resolve(self, name: str, *, base: Path | None = None) -> Any:
        """The class behind ``name``. Relative file names are looked up from ``base``, then from
        here.
        """
        if ":" in name:
            return load_object(name, what=self.kind, base=base)
        if name in self.table:
            return load_object(self.table[name], what=self.kind)
        entry_points = importlib.metadata.entry_points(group=f"agent_r1.{self.kind}")
        for entry_point in entry_points:
            if entry_point.name == name:
                return entry_point.load()
        known = [*self.table, *(e.name for e in entry_points)]
        raise ConfigError(
            f"unknown {self.kind} {name!r}{nearest(name, known)} "
            f"(one of your own is named as 'file.py:Class')"
        )

    def settings(self, name: str, *, base: Path | None = None) -> type[NamedSection]:
        """The section of the class behind ``name``."""
        settings = getattr(self.resolve(name, base=base), "Settings", None)
        if not (isinstance(settings, type) and issubclass(settings, NamedSection)):
            cure = "its Settings must inherit from agent_r1.config.NamedSection"
            if self.kind == "env":
                cure = "its Settings must inherit from ToolEnv.Settings or EnvSettings"
            if self.kind == "algorithm" and inspect.isfunction(self.resolve(name, base=base)):
                cure = "decorate the function with @advantage (from agent_r1 import advantage)"
            raise ConfigError(f"{name!r} is no {self.kind}: it has no Settings of ours; {cure}")
        return settings

    def section(self, value: Any, *, base: Path | None = None) -> NamedSection:
        """A checked section from its raw value: ``"grpo"`` or ``{"name": "grpo", ...}``."""
        if isinstance(value, NamedSection):
            return value
        data = {"name": value} if isinstance(value, str) else value
        if not isinstance(data, dict):
            raise ConfigError(f"{data!r} is neither a section nor a name")
        name = data.get("name", self.default)
        if not isinstance(name, str):
            raise ConfigError(f"[{self.kind}] needs a name{nearest('', [*self.table])}")
        data = {**data, "name": name}
        settings = self.settings(name, base=base)
        if ":" in name and name.partition(":")[0].endswith(".py"):  # found again from any directory
            path, _, attribute = name.rpartition(":")
            data = {**data, "name": f"{_find(path, base)}:{attribute}"}
        return settings.model_validate(data)


def load_object(reference: str, *, what: str, base: Path | None = None) -> Any:
    """The object named ``module:attribute`` or ``file.py:attribute``."""
    module_name, _, attribute = reference.rpartition(":")
    if not module_name:
        raise ConfigError(f"{what} = {reference!r}: name it as 'file.py:name' or 'module:name'")
    if module_name.endswith(".py"):
        path = _find(module_name, base)
        if not path.exists():
            raise ConfigError(f"{what} {reference!r}: there is no file {path}")
        module = _load_file(path)
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{what} {reference!r}: {error}") from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ConfigError(
            f"{what} {reference!r}: no {attribute!r} there{nearest(attribute, public)}"
        )
    return getattr(module, attribute)


def _find(path: str, base: Path | None) -> Path:
    beside = (base or Path()) / path
    return (beside if beside.exists() else Path(path)).resolve()


@functools.cache
def _load_file(path: Path) -> Any:
    digest = hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{digest}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if (folder := str(path.parent)) not in sys.path:
        sys.path.append(folder)  # what lies beside it can be imported, as in a script
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # its author's code
        del sys.modules[spec.name]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
        place = f", line {line}" if line else place_of(error)
        raise ConfigError(f"{path}{place} cannot be imported: {describe(error)}") from error
    cloudpickle.register_pickle_by_value(module)  # an isolated tool's process cannot import it
    return module


def load_toml(path: Path) -> dict[str, Any]:
    """The raw content of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}") from error
    except (OSError, RecursionError, ValueError) as error:  # no UTF-8, digits without end
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def parse_overrides(arguments: list[str]) -> list[tuple[str, Any]]:
    """``["--a.b", "1", "--c=x"]`` to ``[("a.b", 1), ("c", "x")]``.

    Values are TOML; what is not TOML is a string.
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


def explain(
    error: ValidationError, source: str, known_keys: Callable[[tuple[int | str, ...]], list[str]]
) -> ConfigError:
    """A pydantic error as lines that name the source, the field, the value and the cure.

    ``known_keys`` gives the keys of the section at a location, to suggest the nearest.
    """
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            lines.append(f"{where}: no such key{nearest(key, known_keys(item['loc'][:-1]))}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing")
        elif item["type"] == "value_error":  # a message of ours, which names the value itself
            lines.append(
                ": ".join(filter(None, [where, item["msg"].removeprefix("Value error, ")]))
            )
        else:
            lines.append(f"{where} = {item['input']!r}: {item['msg']}")
    return ConfigError(f"{source}: " + f"\n{source}: ".join(lines))


def keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at a location below ``model``."""
    for part in location:
        if str(part) not in model.model_fields:
            continue  # a name within a table of sections
        annotation = model.model_fields[str(part)].annotation
        # A section may be optional, or there may be a table of them.
        options = [annotation, *typing.get_args(annotation)]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not inner:
            break
        model = inner[0]
    return list(model.model_fields)
