"""What clients ask for and get, without the words of a dialect."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agent_r1.types import MalformedCall, Message, Step, ToolCall
from agent_r1.utils.text import clean

MAX_DEPTH = 64
"""Deepest nesting of a request's JSON."""
MAX_CHOICES = 64
"""Most answers to one request (``n``)."""

MAX_STOPS, MAX_STOP_CHARS = 16, 256
"""Texts that end a turn are looked for after each token."""


class RefusedCallError(Exception):
    """A request that gets no turn: the HTTP status, why, and a word for programs.

    Attributes:
        is_final: The same request would be refused again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        is_final: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.is_final = status, code, is_final


@dataclass(frozen=True, slots=True)
class Call:
    """One request for a turn of the agent.

    Attributes:
        messages: The whole conversation as the client has it.
        tools: Schemas of the tools that it offers, as ``FunctionTool.schema``.
        max_tokens: Most tokens of the turn, if it says so.
        stop: Texts that end the turn.
        n: Number of turns, each another answer to the same messages.
        overridden: What it asked of sampling and does not get, e.g. ``temperature``.
        previous: Name of the turn whose conversation the messages go on with, if they are not all
            of it; ``result_ids``: then, of each message, the call that it is the result of.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    overridden: tuple[str, ...] = ()
    previous: str | None = None
    result_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """The agent's answer to a call.

    Attributes:
        number: Of its step in the episode; ``name`` is unique among all episodes.
        said: What the client gets to see.
        step: As recorded.
        num_context: Tokens before it, of which ``num_known`` had been computed for a turn before.
        stop: The client's text that ended it, if one did; it was sampled, and is not in ``said``.
    """

    number: int
    name: str
    said: Message
    step: Step
    num_context: int
    num_known: int
    stop: str | None = None

    @property
    def calls(self) -> list[ToolCall]:
        return [call for call in self.said.tool_calls if isinstance(call, ToolCall)]

    @property
    def malformed(self) -> list[dict[str, Any]]:
        """Calls that could not be parsed, their places among all calls, and why; their text is in
        ``said.content``.
        """
        return [
            {"index": index, "text": call.text, "reason": call.reason}
            for index, call in enumerate(self.step.message.tool_calls)
            if isinstance(call, MalformedCall)
        ]


class Dialect(Protocol):
    """One language of clients. Its names are those of the interface that it speaks."""

    def read(self, body: dict[str, Any]) -> Call:
        """Raises ``RefusedCallError`` for what cannot be served, with the reason."""
        ...

    def answer(self, body: dict[str, Any], call: Call, turns: Sequence[Turn]) -> dict[str, Any]:
        """The response's JSON."""
        ...

    def events(self, body: dict[str, Any], answer: dict[str, Any]) -> Iterator[str]:
        """The same as server-sent events."""
        ...

    def refusal(self, error: RefusedCallError) -> dict[str, Any]:
        """An error's JSON."""
        ...


def spoken(message: Message) -> Message:
    """The agent's message as a client sees it: what was meant as a call and is none is text."""
    broken = [call.text for call in message.tool_calls if isinstance(call, MalformedCall)]
    calls = tuple(call for call in message.tool_calls if isinstance(call, ToolCall))
    content = "\n".join([message.content, *broken] if message.content else broken)
    return dataclasses.replace(message, content=content, tool_calls=calls)


def text_of(content: Any, where: str) -> str:
    """Content as text: a string, nothing, or parts that are text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RefusedCallError(f"{where}: text or a list of parts, not {content!r:.80}")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else None
        if isinstance(part, dict):
            if part.get("type") in ("thinking", "redacted_thinking", "reasoning"):
                continue
            text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RefusedCallError(f"{where}: the agent reads text alone, no part {kind!r}")
        texts.append(text)
    return "".join(texts)


def tool_of(name: Any, description: Any, parameters: Any, where: str) -> dict[str, Any]:
    """A tool's schema in the one form that prompts are made of."""
    if not isinstance(name, str) or not name:
        raise RefusedCallError(f"{where}: a tool needs a name, not {name!r:.80}")
    if not isinstance(parameters, dict | None):
        raise RefusedCallError(
            f"{where}: a tool's parameters are an object, not {parameters!r:.80}"
        )
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = text_of(description, f"{where}.description")
    function["parameters"] = parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def call_of(name: Any, arguments: Any, call_id: Any, where: str) -> ToolCall:
    """A tool call that stands in a conversation; its arguments may be JSON as text."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RefusedCallError(f"{where}: arguments that are no JSON: {error}") from error
        if depth_of(arguments) > MAX_DEPTH:
            raise RefusedCallError(f"{where}: arguments nested deeper than {MAX_DEPTH}")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise RefusedCallError(f"{where}: a call needs a name and an object of arguments")
    return ToolCall(name, arguments, call_id if isinstance(call_id, str) else "")


def in_order(messages: Iterable[tuple[Message, str]]) -> tuple[Message, ...]:
    """Messages with the results of calls in the calls' order, whatever order they come in.

    Args:
        messages: Each with the id of the call that it is the result of, or ``""``.
    """
    ordered: list[Message] = []
    waiting: list[tuple[int, Message]] = []
    order: dict[str, int] = {}

    def release() -> None:
        ordered.extend(message for _, message in sorted(waiting, key=lambda pair: pair[0]))
        waiting.clear()

    for message, call_id in messages:
        if message.role == "tool":
            waiting.append((order.get(call_id, len(order)), message))
            continue
        release()
        ordered.append(message)
        if message.role == "assistant":
            calls = (call for call in message.tool_calls if isinstance(call, ToolCall))
            order = {call.id: number for number, call in enumerate(calls)}
    release()
    return tuple(ordered)


def count_of(body: dict[str, Any], *names: str) -> int | None:
    """The whole number under the first of the names that is there."""
    for name in names:
        if (value := body.get(name)) is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RefusedCallError(f"{name}: a whole number from 1 on, not {value!r:.80}")
            return value
    return None


def stops_of(value: Any, name: str) -> tuple[str, ...]:
    """Texts that end a turn: none, one, or a list."""
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise RefusedCallError(f"{name}: texts that are not empty, not {value!r:.80}")
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise RefusedCallError(f"{name}: at most {MAX_STOPS} texts of {MAX_STOP_CHARS} characters")
    return tuple(map(clean, stops))


def chosen(tools: Sequence[dict[str, Any]], choice: Any) -> tuple[dict[str, Any], ...]:
    """The tools that a choice leaves. One that forces a call is not enforced: what is sampled is
    the policy's own.

    Args:
        choice: ``"none"``, a tool's name in whichever form, or anything else for all of them.
    """
    if choice == "none" or (isinstance(choice, dict) and choice.get("type") == "none"):
        return ()
    if not isinstance(choice, dict):
        return tuple(tools)
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else choice.get("name")
    named = tuple(tool for tool in tools if tool["function"]["name"] == name)
    return named or tuple(tools)


def sampling_of(body: dict[str, Any]) -> tuple[str, ...]:
    """What a request says about sampling and does not get: the run's own is trained on."""
    names = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty")
    return tuple(name for name in names if body.get(name) is not None)


def depth_of(value: Any) -> int:
    """Deepest nesting of JSON."""
    deepest, layer = 0, [value]
    while layer:
        deepest += 1
        nested: list[Any] = []
        for item in layer:
            if isinstance(item, dict):
                nested.extend(item.values())
            elif isinstance(item, list):
                nested.extend(item)
        layer = nested
    return deepest


def event(data: Any, name: str | None = None) -> str:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data)
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"
