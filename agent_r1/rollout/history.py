"""The tokens of a rewritten history: what the agent said stays as it was sampled."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from agent_r1.render import Renderer
from agent_r1.types import Action, Message


def render_history(
    history: Sequence[Message],
    schemas: Sequence[dict[str, Any]],
    renderer: Renderer,
    sampled: Sequence[tuple[Message, tuple[int, ...]]],
) -> list[int]:
    """The tokens of a rewritten history, up to the agent's next turn. A message that the agent
    wrote, found in ``sampled``, keeps its tokens.
    """
    rest = list(history)
    if not rest or rest[-1].role == "assistant":
        raise ValueError("a history must end with a message to the agent")
    ids = list(renderer.prompt(_until_assistant(rest), schemas))
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
    """The sampled tokens of a message: of this very object, else of the latest equal one;
    ``None`` if the agent sampled no such message.
    """
    same = [ids for other, ids in sampled if other is message]
    equal = [ids for other, ids in sampled if other == message]
    return next(reversed(same or equal), None)


def _until_assistant(rest: list[Message]) -> list[Message]:
    """Removes and returns the messages before the agent's next one."""
    taken = list(itertools.takewhile(lambda message: message.role != "assistant", rest))
    del rest[: len(taken)]
    return taken
