"""Tool calls in the text that an agent wrote, one function per format. What was meant as a call and
cannot be read as one says why.
"""

from __future__ import annotations

import json
import re
from typing import Any

from agent_r1.types import MalformedCall, Message, ToolCall

MAX_DEPTH = 64
"""Of a call's arguments: what is deeper cannot be written down again."""
_TAGGED = re.compile(
    r"<think>.*?(?:</think>|\Z)|(?P<end></think>)"
    r"|(?P<call><tool_call>(?P<body>.*?)(?P<close></tool_call>|(?=<tool_call>)|\Z)"
    r"|(?P<alone></tool_call>))",
    re.DOTALL,
)


def parse_hermes(text: str) -> Message:
    """The assistant's message in ``text``: its calls in order, and the text around them.

    Example: ``'Let me see.<tool_call>{"name": "f", "arguments": {}}</tool_call>'`` is the content
    ``'Let me see.'`` and one call of ``f``. What cannot be read as a call becomes a
    ``MalformedCall``. Thinking, between ``<think>`` and ``</think>`` or not yet ended, is neither
    content nor call; what stands before a ``</think>`` alone was thinking too.
    """
    content = ""
    calls: list[ToolCall | MalformedCall] = []
    start = 0
    for match in _TAGGED.finditer(text):
        content += text[start : match.start()]
        start = match.end()
        if match["end"]:
            content, calls = "", []
        elif match["call"]:
            calls.append(_read_call(match))
    return Message("assistant", (content + text[start:]).strip(), tuple(calls))


def _read_call(match: re.Match[str]) -> ToolCall | MalformedCall:
    text, body, end, alone = match.group("call", "body", "close", "alone")

    def malformed(reason: str) -> MalformedCall:
        return MalformedCall(text, reason)

    if alone:
        return malformed("</tool_call> without <tool_call> before it")
    if not end:
        return malformed("the call is not closed by </tool_call>")
    try:
        return _checked(json.loads(body), "arguments", text)
    except (ValueError, RecursionError) as error:
        return malformed(f"the call is not valid JSON: {error}")


def parse_llama3(text: str) -> Message:
    """The same for Llama 3.x, whose calls are bare JSON objects and nothing besides.

    Example: ``'{"name": "f", "parameters": {}}'`` is a call of ``f``. An object without a name is
    no call but the agent's answer, and so is all other text; several calls may be parted by ``;``.
    """
    rest = text.strip().removeprefix("<|python_tag|>").strip()
    calls: list[ToolCall | MalformedCall] = []
    while rest.startswith("{"):
        try:
            body, end = json.JSONDecoder().raw_decode(rest)
            if not calls and "name" not in body:
                break
            calls.append(_checked(body, "parameters", rest[:end]))
        except (ValueError, RecursionError) as error:
            if re.match(r'\{\s*"name"', rest):
                calls.append(MalformedCall(rest, f"the call is not valid JSON: {error}"))
            break
        rest = rest[end:].lstrip("; \n")
    return Message("assistant", "" if calls else text.strip(), tuple(calls))


def _checked(body: Any, key: str, text: str) -> ToolCall | MalformedCall:
    """A call from its JSON, whose arguments stand under ``key`` or, as some models write, under the
    other name for them.
    """
    if not isinstance(body, dict) or not isinstance(body.get("name"), str):
        reason = f'the call must be an object like {{"name": "...", "{key}": {{...}}}}'
        return MalformedCall(text, reason)
    other = "arguments" if key == "parameters" else key
    arguments = body.get(key, body.get(other, {}))
    if not isinstance(arguments, dict):
        return MalformedCall(text, f'"{key}" must be an object')
    if _depth(body) > MAX_DEPTH:
        return MalformedCall(text, f"the arguments are nested more than {MAX_DEPTH} deep")
    return ToolCall(body["name"], arguments)


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0
