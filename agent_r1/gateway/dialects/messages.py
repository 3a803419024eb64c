"""``/v1/messages``, as the ``anthropic`` client and Claude Code speak it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from agent_r1.gateway.call import (
    Call,
    RefusedCallError,
    Turn,
    call_of,
    chosen,
    count_of,
    event,
    in_order,
    sampling_of,
    stops_of,
    text_of,
    tool_of,
)
from agent_r1.types import Message, ToolCall

KINDS = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
"""Types of errors by status, as the interface calls them."""


class Messages:
    """See ``Dialect``."""

    def read(self, body: dict[str, Any]) -> Call:
        given = body.get("messages")
        if not isinstance(given, list) or not given:
            raise RefusedCallError("messages: a list with at least one message")
        messages: list[tuple[Message, str]] = []
        if system := text_of(body.get("system"), "system"):
            messages.append((Message("system", system), ""))
        for number, message in enumerate(given):
            messages += _messages(message, f"messages[{number}]")
        tools = [
            _tool(tool, f"tools[{number}]") for number, tool in enumerate(body.get("tools") or [])
        ]
        return Call(
            in_order(messages),
            chosen(tools, body.get("tool_choice")),
            count_of(body, "max_tokens"),
            stops_of(body.get("stop_sequences"), "stop_sequences"),
            overridden=sampling_of(body),
        )

    def answer(self, body: dict[str, Any], call: Call, turns: Sequence[Turn]) -> dict[str, Any]:
        (turn,) = turns
        content: list[dict[str, Any]] = []
        if turn.said.content or not turn.calls:
            content.append({"type": "text", "text": turn.said.content})
        for made in turn.calls:
            content.append(
                {"type": "tool_use", "id": made.id, "name": made.name, "input": made.arguments}
            )
        reason = "stop_sequence" if turn.stop else "max_tokens" if turn.said.cut else "end_turn"
        return {
            "id": f"msg_{turn.name}",
            "type": "message",
            "role": "assistant",
            "model": body.get("model") or "policy",
            "content": content,
            "stop_reason": "tool_use" if turn.calls else reason,
            "stop_sequence": turn.stop,
            "usage": {
                "input_tokens": turn.num_context - turn.num_known,
                "cache_read_input_tokens": turn.num_known,
                "cache_creation_input_tokens": 0,
                "output_tokens": len(turn.step.action.token_ids),
            },
            "agent_r1": {"overridden": list(call.overridden), "malformed_calls": turn.malformed},
        }

    def events(self, body: dict[str, Any], answer: dict[str, Any]) -> Iterator[str]:
        def tell(kind: str, **data: Any) -> str:
            return event({"type": kind, **data}, kind)

        usage = {**answer["usage"], "output_tokens": 0}
        begun = {**answer, "content": [], "stop_reason": None, "usage": usage}
        yield tell("message_start", message=begun)
        for index, block in enumerate(answer["content"]):
            if block["type"] == "text":
                empty, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
            else:
                written = json.dumps(block["input"])
                empty = {**block, "input": {}}
                delta = {"type": "input_json_delta", "partial_json": written}
            yield tell("content_block_start", index=index, content_block=empty)
            yield tell("content_block_delta", index=index, delta=delta)
            yield tell("content_block_stop", index=index)
        ending = {key: answer[key] for key in ("stop_reason", "stop_sequence")}
        yield tell("message_delta", delta=ending, usage=answer["usage"])
        yield tell("message_stop")

    def refusal(self, error: RefusedCallError) -> dict[str, Any]:
        kind = KINDS.get(error.status, "invalid_request_error")
        if error.status in (429, 503):
            kind = {429: "rate_limit_error", 503: "api_error"}[error.status]
        return {"type": "error", "error": {"type": kind, "message": str(error)}}


def _messages(message: Any, where: str) -> Iterator[tuple[Message, str]]:
    """A message, and the results of calls in it as messages of their own before it."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("user", "assistant", "system"):
        raise RefusedCallError(f"{where}: no message with a role: {message!r:.80}")
    content = message.get("content")
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
    calls: list[ToolCall] = []
    rest: list[Any] = []
    for number, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else None
        place = f"{where}.content[{number}]"
        if kind == "tool_use":
            calls.append(call_of(block.get("name"), block.get("input"), block.get("id"), place))
        elif kind == "tool_result":
            text = text_of(block.get("content"), f"{place}.content")
            if block.get("is_error") and not text:
                text = "Error"
            yield Message("tool", text), str(block.get("tool_use_id") or "")
        else:
            rest.append(block)
    text = text_of(rest, where)
    if role == "assistant" or text or not any(_is_result(block) for block in blocks):
        yield Message(role, text, tuple(calls)), ""


def _is_result(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") == "tool_result"


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or "input_schema" not in tool:
        raise RefusedCallError(f"{where}: a tool with an input_schema, not {tool!r:.80}")
    return tool_of(tool.get("name"), tool.get("description"), tool["input_schema"], where)
