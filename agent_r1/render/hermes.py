"""Tools, calls and results as the Hermes style writes them: the texts of Qwen's chat templates.
``parse_hermes`` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from agent_r1.render.encoding import Markup
from agent_r1.types import MalformedCall, Message

_BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
_AFTER = (
    "\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n"
    "<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


def tool_section(tools: Sequence[dict[str, Any]]) -> list[str | Markup]:
    """The system message's section on the tools; empty if there are none."""
    if not tools:
        return []
    schemas = ["\n" + json.dumps(tool, ensure_ascii=False) for tool in tools]
    return [Markup(_BEFORE), *schemas, Markup(_AFTER)]


def said(message: Message) -> list[str | Markup]:
    """Content and calls of one message."""
    pieces: list[str | Markup] = [message.content]
    for number, call in enumerate(message.tool_calls):
        if isinstance(call, MalformedCall):
            raise ValueError(f"a malformed call cannot be rendered: {call.text!r}")
        body = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        newline = "\n" if number or message.content else ""
        pieces += [Markup(f"{newline}<tool_call>\n"), body, Markup("\n</tool_call>")]
    return pieces


def tool_result(content: str) -> list[str | Markup]:
    """One tool's result, for a user turn."""
    return [Markup("<tool_response>\n"), content, Markup("\n</tool_response>")]
