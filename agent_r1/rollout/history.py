"""The tokens of messages that hold turns of the agent: those stay as they were sampled."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from agent_r1.render import Renderer
from agent_r1.types import Action, Message, ToolCall


def render_messages(
    messages: Sequence[Message],
    schemas: Sequence[dict[str, Any]],
    renderer: Renderer,
    sampled: Sequence[tuple[Message, tuple[int, ...]]],
    *,
    after: Action | None = None,
) -> list[int]:
    """The tokens of messages up to the agent's next turn: a whole conversation, or what comes
    ``after`` an action. A message that the agent wrote, found in ``sampled``, keeps its tokens.
    """
    rest = list(messages)
    if not rest or rest[-1].role == "assistant":
        raise ValueError("a history must end with a message to the agent")
    opening = _until_assistant(rest)
    if after is None:
        ids = list(renderer.prompt(opening, schemas))
    else:
        ids = list(renderer.observation(opening, after))
    while rest:
        message = rest.pop(0)
        own = _tokens_of(message, sampled) or renderer.encode_message(message)
        zeros = (0.0,) * len(own)
        action = Action(own, zeros, zeros, (), "stop")
        ids += [*own, *renderer.observation(_until_assistant(rest), action)]
    return ids


def _tokens_of(
    message: Message, sampled: Sequence[tuple[Message, tuple[int, ...]]]
) -> tuple[int, ...] | None:
    """The sampled tokens of a message: of the latest that is equal in words and calls, preferably
    in the calls' ids, too; ``None`` if the agent sampled no such message.
    """
    equal = [(other, ids) for other, ids in sampled if _words(other) == _words(message)]
    same = [ids for other, ids in equal if call_ids(other) == call_ids(message)]
    return next(reversed(same or [ids for _, ids in equal]), None)


def _words(message: Message) -> Message:
    return dataclasses.replace(message, content=message.content.strip(), cut=False)


def call_ids(message: Message) -> list[str]:
    """The ids of a message's calls."""
    return [call.id for call in message.tool_calls if isinstance(call, ToolCall)]


def _until_assistant(rest: list[Message]) -> list[Message]:
    """Removes and returns the messages before the agent's next one."""
    taken = list(itertools.takewhile(lambda message: message.role != "assistant", rest))
    del rest[: len(taken)]
    return taken
