"""``/v1/chat/completions``, as the ``openai`` client and most frameworks speak it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from agent_r1.gateway.call import (
    MAX_CHOICES,
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
from agent_r1.types import Message, Role

ROLES: dict[Any, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


class Chat:
    """See ``Dialect``."""

    def read(self, body: dict[str, Any]) -> Call:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RefusedCallError("messages: a list with at least one message")
        answer_format = body.get("response_format")
        if isinstance(answer_format, dict) and answer_format.get("type", "text") != "text":
            raise RefusedCallError(
                f"response_format {answer_format.get('type')!r}: the agent's words are sampled as "
                "they are, so that they can be trained on; ask for the form in words, or by a tool"
            )
        given = [{"function": function} for function in body.get("functions") or []]
        given += body.get("tools") or []
        tools = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(given)]
        return Call(
            in_order(_message(message, f"messages[{n}]") for n, message in enumerate(messages)),
            chosen(tools, body.get("tool_choice")),
            count_of(body, "max_completion_tokens", "max_tokens", "max_output_tokens"),
            stops_of(body.get("stop"), "stop"),
            min(count_of(body, "n") or 1, MAX_CHOICES),
            sampling_of(body),
        )

    def answer(self, body: dict[str, Any], call: Call, turns: Sequence[Turn]) -> dict[str, Any]:
        sampled = sum(len(turn.step.action.token_ids) for turn in turns)
        context = turns[0].num_context
        return {
            "id": f"chatcmpl-{turns[0].name}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.get("model") or "policy",
            "choices": [_choice(index, turn) for index, turn in enumerate(turns)],
            "usage": {
                "prompt_tokens": context,
                "completion_tokens": sampled,
                "total_tokens": context + sampled,
                "prompt_tokens_details": {"cached_tokens": turns[0].num_known},
            },
            "agent_r1": {"overridden": list(call.overridden)},
        }

    def events(self, body: dict[str, Any], answer: dict[str, Any]) -> Iterator[str]:
        head = {key: answer[key] for key in ("id", "created", "model")}
        head["object"] = "chat.completion.chunk"

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": index, "delta": delta, "finish_reason": reason}
            return event({**head, "choices": [choice]})

        for choice in answer["choices"]:
            index, message = choice["index"], dict(choice["message"])
            calls = message.pop("tool_calls", [])
            yield chunk(index, {**message, "content": message["content"] or ""})
            for number, call in enumerate(calls):
                yield chunk(index, {"tool_calls": [{"index": number, **call}]})
            yield chunk(index, {}, choice["finish_reason"])
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            yield event({**head, "choices": [], "usage": answer["usage"]})
        yield event("[DONE]")

    def refusal(self, error: RefusedCallError) -> dict[str, Any]:
        return refusal_of(error)


def refusal_of(error: RefusedCallError) -> dict[str, Any]:
    """An error as the openai client reads it."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}


def _message(message: Any, where: str) -> tuple[Message, str]:
    """A message, and the id of the call that it is the result of."""
    named = message.get("role") if isinstance(message, dict) else None
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise RefusedCallError(f"{where}: no message with a role: {message!r:.80}")
    content = text_of(message.get("content"), f"{where}.content")
    calls = []
    given = message.get("tool_calls") or []
    if (old := message.get("function_call")) is not None:  # before there were several
        given = [*given, {"function": old}]
    for number, call in enumerate(given):
        place, function = f"{where}.tool_calls[{number}]", call.get("function") or {}
        calls.append(
            call_of(function.get("name"), function.get("arguments"), call.get("id"), place)
        )
    call_id = message.get("tool_call_id")
    return Message(role, content, tuple(calls)), call_id if isinstance(call_id, str) else ""


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        raise RefusedCallError(f"{where}: a function, not {tool!r:.80}")
    return tool_of(
        function.get("name"), function.get("description"), function.get("parameters"), where
    )


def _choice(index: int, turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.said.content}
    if not turn.said.content and turn.calls:
        message["content"] = None
    if turn.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for call in turn.calls
        ]
    if turn.malformed:
        message["malformed_calls"] = turn.malformed
    reason = "tool_calls" if turn.calls else "length" if turn.said.cut else "stop"
    return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}
