"""``agent-r1 keys`` and the reference of recipes: every key with type, default and meaning, told by
the sections themselves. A section's docstring explains its keys under ``Attributes:``.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import tomllib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import docstring_parser
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from agent_r1.config.registry import Registry
from agent_r1.config.section import nearest
from agent_r1.errors import ConfigError
from agent_r1.run.recipe import SECTIONS, Recipe


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        name: Dotted, e.g. ``"train.iterations"``.
        type: Of its values, as in Python.
        default: As in Python; ``None`` if a value must be given.
        meaning: From the docstring; empty if it tells none.
        of: Those names of the section that have the key, e.g. ``("grpo",)``; empty if all have it.
    """

    name: str
    type: str
    default: str | None
    meaning: str
    of: tuple[str, ...] = ()


def all_keys() -> list[Key]:
    """Every key there is, section by section; classes of one's own are not known here."""
    found = (
        key
        for name, field in Recipe.model_fields.items()
        for key in _of_field(Recipe, name, field, name)
    )
    return list(dict.fromkeys(found))


def keys_of(section: str) -> list[Key]:
    """The keys of a section (``"train"``, ``"env.memory"``), of a name (``"grpo"``), or that one
    key, whole or by a part of its name (``"lr"``, ``"lora.rank"``).

    Raises:
        ConfigError: There is nothing of that name.
    """
    keys = all_keys()
    found = [
        key
        for key in keys
        if section == key.name or section in key.of or key.name.startswith(f"{section}.")
    ]
    within = f".{section}."
    found = found or [key for key in keys if within in f".{key.name}." and section != "NAME"]
    if not found:
        known = {part for key in keys for part in (key.name, *key.name.split("."), *key.of)}
        cure = nearest(section, sorted(known), "`agent-r1 keys` lists all")
        raise ConfigError(f"no section or key {section!r}{cure}")
    return found


def _of_field(model: type[BaseModel], key: str, field: FieldInfo, name: str) -> Iterator[Key]:
    """A key, and those of the table that its value is."""
    if name in SECTIONS:
        registry = SECTIONS[name]
        none = None if field.is_required() else _default(field)
        default = none if registry.default is None else repr(registry.default)
        yield from _of_registry(name, registry, default, _meaning(model, key))
        return
    inner, told = _section_in(field.annotation), _meaning(model, key)
    default = None if field.is_required() else _default(field)
    if inner is None:
        yield Key(name, _text(field.annotation), default, told)
        return
    if told:
        yield Key(name, "table", default, told)
    within = f"{name}.NAME" if typing.get_origin(field.annotation) is dict else name
    for child, child_field in inner.model_fields.items():
        yield from _of_field(inner, child, child_field, f"{within}.{child}")


def _of_registry(
    section: str, registry: Registry[Any], default: str | None, told: str
) -> Iterator[Key]:
    """The names that a section may have, and the keys that come with each."""
    names = f"One of {', '.join(registry.table)}, or 'file.py:Class'."
    yield Key(f"{section}.name", "str", default, " ".join([told, names]).strip())
    owners: dict[Key, list[str]] = {}
    for name in registry.table:
        settings = registry.settings(name)
        for key, field in settings.model_fields.items():
            for found in _of_field(settings, key, field, f"{section}.{key}"):
                if key != "name":
                    owners.setdefault(found, []).append(name)
    for found, of in owners.items():
        everywhere = len(of) == len(registry.table)
        yield found if everywhere or found.of else dataclasses.replace(found, of=tuple(of))


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section of a field that is one, may be one, or is a table of them."""
    options = [annotation, *typing.get_args(annotation)]
    found = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
    return found[0] if found else None


def _meaning(model: type[BaseModel], key: str) -> str:
    """What the docstring of a class that declares a key says of it, under ``Attributes:`` or in a
    sentence that begins "``key``:"; the nearest class that says something counts.
    """
    for owner in model.__mro__:
        if key in vars(owner).get("__annotations__", {}):
            text = inspect.cleandoc(owner.__doc__ or "")
            told_in_line = rf"``{key}``: (.+?)[;.]?(?= ``\w+``: |$)"
            for told in docstring_parser.parse(text).params:
                if key in told.arg_name.replace(" ", "").split(","):
                    return _plain(told.description or "")
            if found := re.search(told_in_line, " ".join(text.split())):
                return _plain(found[1]).removesuffix(".") + "."
    return ""


def _plain(text: str) -> str:
    """A docstring's text in one line, without its marks."""
    plain = re.sub(r"``(.+?)``", r"\1", " ".join(text.split()))
    return plain[:1].upper() + plain[1:]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    return "{}" if isinstance(value, BaseModel) else repr(value)


def _text(annotation: Any) -> str:
    """A type as people write it."""
    if annotation is type(None):
        return "None"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _text(arguments[0])
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if origin in (types.UnionType, typing.Union):
        return " | ".join(map(_text, arguments))
    if origin is not None:
        inner = ", ".join("..." if a is ... else _text(a) for a in arguments)
        return f"{origin.__name__}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def known_metrics(name: str | None = None) -> list[dict[str, str]]:
    """Every figure of ``metrics.jsonl``, as ``flat_figures`` names them: name, unit, meaning, and
    what to watch. Words in capitals stand for names of the run's own.

    Raises:
        ConfigError: There is none of that name.
    """
    text = (files("agent_r1") / "assets" / "metrics.toml").read_text(encoding="utf-8")
    metrics: list[dict[str, str]] = tomllib.loads(text)["metric"]
    found = [m for m in metrics if name is None or pattern_of(m["name"]).match(name)]
    found = found or [m for m in metrics if m["name"].startswith(f"{name}/")]
    if not found:
        raise ConfigError(f"no metric {name!r}{nearest(str(name), [m['name'] for m in metrics])}")
    return found


def pattern_of(name: str) -> re.Pattern[str]:
    """A metric's name as a pattern: words in capitals stand for anything."""
    parts = re.split(r"([A-Z]{3,})", name)
    return re.compile("".join(".+" if p.isupper() else re.escape(p) for p in parts) + r"\Z")
