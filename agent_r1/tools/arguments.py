"""From a function's signature to a schema for the model and a check of its arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import docstring_parser
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticUserError,
    ValidationError,
    create_model,
)
from pydantic.fields import FieldInfo


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def as_written(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The underlying function, inside ``functools.partial`` and callable objects."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if not (inspect.isroutine(fn) or inspect.isclass(fn)):
        return type(fn).__call__
    return fn


def descriptions_of(fn: Callable[..., Any], written: Any) -> tuple[str, dict[str, str]]:
    """A docstring's descriptions of the function and its parameters."""
    docstring = inspect.getdoc(written)
    if docstring is None and not inspect.isroutine(fn):
        docstring = inspect.getdoc(type(fn))  # of an object that can be called
    doc = docstring_parser.parse(docstring or "", docstring_parser.DocstringStyle.GOOGLE)
    parts = (doc.short_description, doc.long_description)
    whole = "\n\n".join(part for part in parts if part)
    return whole, {p.arg_name: p.description for p in doc.params if p.description}


def signature_of(fn: Callable[..., Any], name: str) -> inspect.Signature:
    try:
        return inspect.signature(fn, eval_str=True)
    except NameError as error:
        raise ValueError(f"tool {name!r}: an annotation cannot be resolved: {error}") from error


def arguments_model(
    fn: Callable[..., Any], name: str, descriptions: dict[str, str]
) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    parameters = list(signature_of(fn, name).parameters.values())
    if parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    for parameter in parameters:
        where = f"tool {name!r}, parameter {parameter.name!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"{where}: a model cannot fill *args or **kwargs; name each argument")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"{where}: it is positional-only, and a model names its arguments; drop the '/'"
            )
        if parameter.annotation is parameter.empty:
            raise ValueError(f"{where}: has no type annotation, so there is no schema for it")
        if parameter.name.startswith(("_", "model_")) and hasattr(BaseModel, parameter.name):
            raise ValueError(f"{where}: pydantic uses that name for itself; choose another")
        if parameter.name.startswith("_"):
            raise ValueError(f"{where}: a name with '_' in front is private; choose another")
        if isinstance(parameter.default, dataclasses.Field):
            raise ValueError(f"{where}: dataclasses.field is no default; use pydantic's Field")
        fields[parameter.name] = _field(parameter, descriptions.get(parameter.name))
        try:
            create_model(name, __base__=_Arguments, **{parameter.name: fields[parameter.name]})
        except (NameError, TypeError, ValueError, PydanticUserError) as error:
            raise ValueError(f"{where}: {str(error).splitlines()[0]}") from error
    model: type[BaseModel] = create_model(name, __base__=_Arguments, **fields)
    return model


def _field(parameter: inspect.Parameter, described: str | None) -> tuple[Any, Any]:
    """A parameter as pydantic's field. Its description is the docstring's, else the one that
    ``Field`` or a text in ``Annotated`` gives.
    """
    annotation, default = parameter.annotation, parameter.default
    texts = [item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, str)]
    fields = [i for i in getattr(annotation, "__metadata__", ()) if isinstance(i, FieldInfo)]
    has_description = any(field.description for field in fields)
    description = described or (texts[0] if texts and not has_description else None)
    if isinstance(default, FieldInfo):
        if description is not None:
            default = FieldInfo.merge_field_infos(default, description=description)
        return annotation, default
    if description is not None:
        annotation = Annotated[annotation, Field(description=description)]
    return annotation, ... if default is parameter.empty else default


def strip_titles(schema: Any) -> Any:
    """Drops pydantic's generated titles, which cost prompt tokens and say nothing."""
    if isinstance(schema, list):
        return [strip_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: strip_titles(sub) for name, sub in value.items()}
        if key in ("properties", "$defs")
        else value
        if key in ("default", "const", "enum", "examples")
        else strip_titles(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }


def explain_problems(error: ValidationError) -> str:
    problems = []
    for item in error.errors(include_url=False):
        where = ".".join(map(str, item["loc"]))
        given = "" if item["type"] == "missing" else f" (got {item['input']!r:.80})"
        problems.append(f"{where}: {item['msg']}{given}")
    return "; ".join(problems)
