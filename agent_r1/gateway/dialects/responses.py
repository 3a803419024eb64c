"""``/v1/responses``, as openai-agents speaks it by default."""

from __future__ import annotations

import json
import time
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
    text_of,
    tool_of,
)
from agent_r1.gateway.dialects.chat import ROLES, refusal_of
from agent_r1.types import Message, ToolCall

PREFIX = "resp_"


class Responses:
    """See ``Dialect``."""

    def read(self, body: dict[str, Any]) -> Call:
        form = (body.get("text") or {}).get("format") or {}
        if form.get("type", "text") != "text":
            raise RefusedCallError(
                f"text.format {form.get('type')!r}: the agent's words are sampled as they are, so "
                "that they can be trained on; ask for the form in words, or by a tool"
            )
        for name in ("conversation", "prompt"):
            if body.get(name) is not None:
                raise RefusedCallError(f"{name}: nothing is stored here; send it as input")
        given, items = body.get("input"), list[tuple[Message, str]]()
        if (instructions := body.get("instructions")) is not None:
            items.append((Message("system", text_of(instructions, "instructions")), ""))
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
        if not isinstance(given, list):
            raise RefusedCallError("input: text or a list of items")
        for number, item in enumerate(given):
            _add(items, item, f"input[{number}]")
        tools = [
            _tool(tool, f"tools[{number}]") for number, tool in enumerate(body.get("tools") or [])
        ]
        before = body.get("previous_response_id")
        return Call(
            in_order(items) if before is None else tuple(message for message, _ in items),
            chosen(tools, body.get("tool_choice")),
            count_of(body, "max_output_tokens"),
            overridden=sampling_of(body),
            previous=None if before is None else str(before).removeprefix(PREFIX),
            result_ids=tuple(call_id for _, call_id in items),
        )

    def answer(self, body: dict[str, Any], call: Call, turns: Sequence[Turn]) -> dict[str, Any]:
        (turn,) = turns
        sampled = len(turn.step.action.token_ids)
        return {
            "id": f"{PREFIX}{turn.name}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "incomplete" if turn.said.cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if turn.said.cut else None,
            "error": None,
            "instructions": body.get("instructions"),
            "model": body.get("model") or "policy",
            "output": [*_output(turn)],
            "parallel_tool_calls": True,
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "previous_response_id": body.get("previous_response_id"),
            "metadata": body.get("metadata") or {},
            "usage": {
                "input_tokens": turn.num_context,
                "input_tokens_details": {"cached_tokens": turn.num_known},
                "output_tokens": sampled,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": turn.num_context + sampled,
            },
            "agent_r1": {"overridden": list(call.overridden), "malformed_calls": turn.malformed},
        }

    def events(self, body: dict[str, Any], answer: dict[str, Any]) -> Iterator[str]:
        number = -1

        def tell(kind: str, **data: Any) -> str:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number, **data}, kind)

        begun = {**answer, "status": "in_progress", "output": [], "usage": None}
        yield tell("response.created", response=begun)
        yield tell("response.in_progress", response=begun)
        for index, item in enumerate(answer["output"]):
            place: dict[str, Any] = {"output_index": index, "item_id": item["id"]}
            empty: dict[str, Any] = (
                {"content": []} if item["type"] == "message" else {"arguments": ""}
            )
            yield tell(
                "response.output_item.added",
                output_index=index,
                item={**item, "status": "in_progress", **empty},
            )
            if item["type"] == "message":
                (part,) = item["content"]
                place["content_index"] = 0
                yield tell("response.content_part.added", part={**part, "text": ""}, **place)
                yield tell("response.output_text.delta", delta=part["text"], logprobs=[], **place)
                yield tell("response.output_text.done", text=part["text"], logprobs=[], **place)
                yield tell("response.content_part.done", part=part, **place)
            else:
                written = item["arguments"]
                yield tell("response.function_call_arguments.delta", delta=written, **place)
                yield tell(
                    "response.function_call_arguments.done",
                    arguments=written,
                    name=item["name"],
                    **place,
                )
            yield tell("response.output_item.done", output_index=index, item=item)
        yield tell(f"response.{answer['status']}", response=answer)

    def refusal(self, error: RefusedCallError) -> dict[str, Any]:
        return refusal_of(error)


def _add(items: list[tuple[Message, str]], item: Any, where: str) -> None:
    """Adds an item; calls belong to the words before them, which are of the same turn."""
    if not isinstance(item, dict):
        raise RefusedCallError(f"{where}: an item, not {item!r:.80}")
    kind = item.get("type") or "message"
    if kind == "reasoning":
        return
    if kind == "function_call":
        call = call_of(item.get("name"), item.get("arguments"), item.get("call_id"), where)
        if items and items[-1][0].role == "assistant":
            said = items.pop()[0]
            items.append((Message("assistant", said.content, (*said.tool_calls, call)), ""))
        else:
            items.append((Message("assistant", "", (call,)), ""))
    elif kind == "function_call_output":
        text = text_of(item.get("output"), f"{where}.output")
        items.append((Message("tool", text), str(item.get("call_id") or "")))
    elif kind == "message" and item.get("role") in ROLES:
        text = text_of(item.get("content"), f"{where}.content")
        items.append((Message(ROLES[item["role"]], text), ""))
    else:
        raise RefusedCallError(f"{where}: the agent knows no item {kind!r} of {item.get('role')!r}")


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise RefusedCallError(f"{where}: a function, not {tool!r:.80}; nothing else is run here")
    return tool_of(tool.get("name"), tool.get("description"), tool.get("parameters"), where)


def _output(turn: Turn) -> Iterator[dict[str, Any]]:
    if turn.said.content or not turn.calls:
        part = {"type": "output_text", "text": turn.said.content, "annotations": [], "logprobs": []}
        yield {
            "id": f"msg_{turn.name}",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [part],
        }
    for call in turn.calls:
        yield _call_item(call)


def _call_item(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"fc_{call.id}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": json.dumps(call.arguments),
        "status": "completed",
    }
