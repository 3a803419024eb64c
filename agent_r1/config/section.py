"""Sections: the tables of a recipe, checked and typed.

A *section* is a pydantic model that forbids unknown keys, so that a key which the chosen class does
not have is an error before anything is loaded. Which sections exist is not known here.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, ValidationError

from agent_r1.errors import ConfigError


class Section(BaseModel):
    """Base of all sections: frozen; unknown keys, infinity and NaN are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NamedSection(Section):
    """A section whose ``name`` chose the class that it configures."""

    name: str


def nearest(word: str, known: list[str], otherwise: str = "") -> str:
    """``; did you mean 'x'?`` when one is close, else all known words, or ``otherwise``."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    close.sort(key=lambda other: sorted(other) != sorted(word))  # swapped letters come first
    if close:
        return f"; did you mean {close[0]!r}?"
    return "; " + (otherwise or f"known: {', '.join(sorted(known))}")


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
