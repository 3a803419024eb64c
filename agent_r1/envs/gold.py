"""Gold actions: an environment's own solution of its task, as messages. ``check_env`` plays them
without a model, ``agent-r1 check`` and ``agent-r1 sft`` through the tokenizer
(``rollout/gold_episode.py``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from agent_r1.envs.base import run_plain
from agent_r1.envs.lifecycle import thread_of
from agent_r1.render.calls import parse_hermes
from agent_r1.types import MalformedCall, Message, ToolCall

Gold = str | ToolCall | Message
"""One gold action: words alone, a call alone, or a whole message of the assistant."""


def gold_of(env: Any) -> Iterable[Gold]:
    """An environment's gold actions; none if it has no ``gold``."""
    return env.gold() if hasattr(env, "gold") else ()


def as_message(said: Gold) -> Message:
    """A gold action as the message that the agent would have said.

    Raises:
        TypeError: It is none of the three, or writes a call as text.
    """
    if isinstance(said, ToolCall):
        return Message("assistant", "", (said,))
    if isinstance(said, str):
        message = parse_hermes(said)
        if message.tool_calls:
            raise TypeError(
                f"an action writes a call as text: {said!r:.100}; give ToolCall(name, arguments), "
                "or Message('assistant', words, (ToolCall(...),))"
            )
        return message
    if not isinstance(said, Message) or said.role != "assistant":
        raise TypeError(
            f"an action must be text, a ToolCall or a message of the assistant, not {said!r:.100}"
        )
    return said


async def played_gold(env: Any) -> AsyncIterator[Message]:
    """The gold actions one by one, each to be played before the next is asked for; the author's
    code runs in its episode's thread.
    """
    thread = thread_of(env)
    actions = await run_plain(thread, lambda: iter(gold_of(env)))
    while (said := await run_plain(thread, next, actions, None)) is not None:
        yield as_message(said)


def in_words(message: Message) -> str:
    """What a message of the assistant says and calls, in one line."""
    calls = [
        f"malformed call ({call.reason})"
        if isinstance(call, MalformedCall)
        else f"{call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})"
        for call in message.tool_calls
    ]
    words = " ".join(message.content.split())
    return "  ".join([*([words] if words else []), *calls]) or "nothing"


def all_in_words(messages: Sequence[Message]) -> str:
    """Several messages, at most 200 characters."""
    return f"{[in_words(message) for message in messages]!r:.200}"
