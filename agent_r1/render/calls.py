"""Tool calls in the text that an agent wrote, one function per format. Text meant as a call that
cannot be parsed is returned with the reason.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from agent_r1.types import MalformedCall, Message, ToolCall
from agent_r1.utils.text import clean, clean_json

MAX_DEPTH = 64
"""Deepest nesting of a call's arguments: deeper JSON cannot be written again."""
_TAG = re.compile(r"<think>|</think>|<tool_call>|</tool_call>")
_END_OF_CALL = re.compile(r"</tool_call>|(?=<tool_call>|</think>)|\Z")
_DECODER = json.JSONDecoder()


def parse_hermes(text: str) -> Message:
    """The assistant's message in ``text``: its calls in order, and the text around them.

    Example: ``'Let me see.<tool_call>{"name": "f", "arguments": {}}</tool_call>'`` is the content
    ``'Let me see.'`` and one call of ``f``. What cannot be read as a call becomes a
    ``MalformedCall``. A call's JSON is read to its end before its closing tag is looked for, so
    that a tag may stand in an argument. Thinking, between ``<think>`` and ``</think>`` or not yet
    ended, is neither content nor call; what stands before a ``</think>`` alone was thinking too.
    """
    content = ""
    calls: list[ToolCall | MalformedCall] = []
    start = 0
    while (tag := _TAG.search(text, start)) is not None:
        content += text[start : tag.start()]
        start = tag.end()
        if tag[0] == "<think>":
            end = text.find("</think>", start)
            start = len(text) if end < 0 else end + len("</think>")
        elif tag[0] == "</think>":
            content, calls = "", []
        elif tag[0] == "</tool_call>":
            reason = "</tool_call> without <tool_call> before it"
            calls.append(MalformedCall(tag[0], reason))
        else:
            call, start = _read_call(text, tag.start(), start)
            calls.append(call)
    return Message("assistant", clean((content + text[start:]).strip()), tuple(calls))


def _read_call(text: str, start: int, inside: int) -> tuple[ToolCall | MalformedCall, int]:
    """The call that opens at ``start``, and where it ends; its JSON begins at ``inside``."""
    rest = text[inside:]
    try:
        body, end = _DECODER.raw_decode(rest, len(rest) - len(rest.lstrip()))
        end += inside
    except (ValueError, RecursionError) as error:
        closing = _END_OF_CALL.search(text, inside)
        assert closing is not None
        reason = f"the call is not valid JSON: {error}"
        if not closing[0]:
            reason = "the call is not closed by </tool_call>"
        return MalformedCall(clean(text[start : closing.end()]), reason), closing.end()
    closing = _END_OF_CALL.search(text, end)
    assert closing is not None
    written = text[start : closing.end()]
    if not closing[0]:
        reason = "the call is not closed by </tool_call>"
    elif text[end : closing.start()].strip():
        reason = "the call is not valid JSON: there is more after its end"
    else:
        return _checked(body, "arguments", written), closing.end()
    return MalformedCall(clean(written), reason), closing.end()


def parse_llama3(text: str) -> Message:
    """As ``parse_hermes``, for Llama 3.x, whose calls are bare JSON objects without text.

    Example: ``'{"name": "f", "parameters": {}}'`` is a call of ``f``. An object without a name is
    no call but the agent's answer, and so is all other text; several calls may be parted by ``;``
    or ``,`` or stand in a list.
    """
    rest = text.strip().removeprefix("<|python_tag|>").strip()
    calls: list[ToolCall | MalformedCall] = []
    while rest.startswith(("{", "[{")):
        try:
            body, end = _DECODER.raw_decode(rest)
            found = body if isinstance(body, list) else [body]
            found = [_unwrapped(one) for one in found]
            if not calls and not all(isinstance(b, dict) and "name" in b for b in found):
                break
            calls += [_checked(one, "parameters", rest[:end]) for one in found]
        except (ValueError, RecursionError) as error:
            if calls or _MEANT_AS_LLAMA3_CALL.match(rest):
                reason = f"the call is not valid JSON: {error}"
                calls.append(MalformedCall(clean(rest), reason))
            break
        rest = rest[end:].lstrip(";, \n\t")
    return Message("assistant", "" if calls else clean(text.strip()), tuple(calls))


_MEANT_AS_LLAMA3_CALL = re.compile(
    r'\[?\{\s*("name"|"type"\s*:\s*"function"|"(parameters|arguments)")'
)


def _checked(body: Any, key: str, text: str) -> ToolCall | MalformedCall:
    """A call from its JSON, whose arguments stand under ``key`` or, as some models write, under the
    other name. Missing, empty or null means none; a string may hold them as JSON.
    """
    body = _unwrapped(body)
    if not isinstance(body, dict) or not isinstance(body.get("name"), str):
        reason = f'the call must be an object like {{"name": "...", "{key}": {{...}}}}'
        return MalformedCall(clean(text), reason)
    other = "arguments" if key == "parameters" else "parameters"
    arguments = body.get(key, body.get(other))
    if isinstance(arguments, str) and arguments.strip():
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, dict):
        return MalformedCall(clean(text), f'"{key}" must be an object')
    if _is_deeper(arguments, MAX_DEPTH):
        return MalformedCall(clean(text), f"the arguments are nested more than {MAX_DEPTH} deep")
    return ToolCall(clean(body["name"]), clean_json(arguments))


def _unwrapped(body: Any) -> Any:
    """A call without the ``{"type": "function", "function": ...}`` of OpenAI's around it."""
    inner = body.get("function") if isinstance(body, dict) and "name" not in body else None
    return inner if isinstance(inner, dict) else body


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than ``depth`` deep."""
    level = [value]
    for _ in range(depth + 1):
        inner = [v.values() if isinstance(v, dict) else v for v in level]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True
