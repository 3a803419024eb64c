"""Checks arguments against a foreign schema, within limits of work and time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

MAX_KEYWORDS = 2_000
"""Most branching keywords followed for one call; beyond them the server checks instead."""


_BRANCHING = ("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if")


PATTERN_SECONDS = 0.05
"""Time limit of one pattern of a schema."""


def checker_of(schema: dict[str, Any]) -> Any:
    """A function that lists what is wrong with arguments; ``None`` if the schema itself is invalid.
    Nothing outside the schema is fetched, and a pattern has a time limit.
    """
    import jsonschema
    import referencing

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema, format_checker=jsonschema.FormatChecker(()))
    except Exception:  # its author's mistake, in whatever form
        return None
    known = kind.VALIDATORS
    left = [MAX_KEYWORDS]
    limited = jsonschema.validators.extend(
        kind,
        {
            **{name: _counted(known[name], left) for name in _BRANCHING if name in known},
            "pattern": _pattern,
            "patternProperties": lambda *_: (),
            **{
                name: _unless_patterns(known[name])
                for name in ("additionalProperties", "unevaluatedProperties")
                if name in known
            },
        },
    )
    checker = limited(schema, registry=referencing.Registry())

    def problems(arguments: Any) -> Iterator[Any]:
        left[0] = MAX_KEYWORDS
        yield from checker.iter_errors(arguments)

    return problems


def _counted(check: Any, left: list[int]) -> Any:
    """Counts uses of a keyword that leads to other schemas: their number may grow exponentially."""

    def limited(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RecursionError("a schema that takes too long")
        return check(validator, value, instance, schema)

    return limited


def _unless_patterns(check: Any) -> Any:
    """A check of additional properties, left to the server where patterns define them."""

    def limited(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        return () if "patternProperties" in schema else check(validator, value, instance, schema)

    return limited


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
    import jsonschema
    import regex

    if isinstance(value, str):
        with contextlib.suppress(regex.error, TimeoutError):  # then the server decides
            if regex.search(pattern, value, timeout=PATTERN_SECONDS) is None:
                yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")
