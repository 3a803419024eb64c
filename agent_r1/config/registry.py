"""Registries map names of one kind of thing (environments, algorithms, ...) to classes. Each class
declares its recipe section as ``Settings``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import cloudpickle

from agent_r1.config.section import NamedSection, nearest
from agent_r1.errors import ConfigError
from agent_r1.utils.text import describe, place_of

T = TypeVar("T")
FOLDER: ContextVar[Path | None] = ContextVar("recipe_folder", default=None)
"""Folder of the recipe being read; files named in the recipe are looked for there."""


@dataclass(frozen=True)
class Registry(Generic[T]):
    """Names of one kind of thing, resolved to classes on first use.

    A name is a key of ``table``, an installed entry point of group ``agent_r1.<kind>``, or
    ``path/to/file.py:Class`` / ``package.module:Class``.
    """

    kind: str
    table: dict[str, str]
    default: str | None = None
    """Name of a section that does not give one."""

    def resolve(self, name: str) -> type[T]:
        """The class behind ``name``; a file is looked for in ``FOLDER``, then here."""
        if ":" in name:
            return cast(type[T], load_object(name, what=self.kind))
        if name in self.table:
            return cast(type[T], load_object(self.table[name], what=self.kind))
        entry_points = importlib.metadata.entry_points(group=f"agent_r1.{self.kind}")
        for entry_point in entry_points:
            if entry_point.name == name:
                return cast(type[T], entry_point.load())
        known = [*self.table, *(e.name for e in entry_points)]
        raise ConfigError(
            f"unknown {self.kind} {name!r}{nearest(name, known)} "
            f"(one of your own is named as 'file.py:Class')"
        )

    def make(self, section: NamedSection, *args: object) -> T:
        """An object of the class that a section names: ``Class(section, *args)``."""
        made: Callable[..., T] = self.resolve(section.name)
        return made(section, *args)

    def settings(self, name: str) -> type[NamedSection]:
        """The section of the class behind ``name``."""
        settings = getattr(self.resolve(name), "Settings", None)
        if not (isinstance(settings, type) and issubclass(settings, NamedSection)):
            cure = "its Settings must inherit from agent_r1.config.section.NamedSection"
            if self.kind == "env":
                cure = "its Settings must inherit from ToolEnv.Settings or EnvSettings"
            if self.kind == "algorithm" and inspect.isfunction(self.resolve(name)):
                cure = "decorate the function with @advantage (from agent_r1 import advantage)"
            raise ConfigError(f"{name!r} is no {self.kind}: it has no Settings of ours; {cure}")
        return settings

    def section(self, value: object) -> NamedSection:
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
        settings = self.settings(name)
        if ":" in name:
            data = {**data, "name": found_from_here(name)}
        return settings.model_validate(data)


def load_object(reference: str, *, what: str) -> Any:
    """The object named ``module:attribute`` or ``file.py:attribute``."""
    module_name, _, attribute = reference.rpartition(":")
    if not module_name:
        raise ConfigError(f"{what} = {reference!r}: name it as 'file.py:name' or 'module:name'")
    if module_name.endswith(".py"):
        path = _find(module_name)
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


def found_from_here(reference: str) -> str:
    """``file.py:name``, or a file's name, with the file's whole path: it is found again from
    anywhere. ``module:name`` stays as it is.
    """
    path, colon, attribute = reference.rpartition(":")
    if colon and path.endswith(".py"):
        return f"{_find(path)}:{attribute}"
    return reference if colon else str(_find(reference))


def _find(path: str) -> Path:
    beside = (FOLDER.get() or Path()) / path
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
        sys.path.append(folder)  # files beside it can be imported, as in a script
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
