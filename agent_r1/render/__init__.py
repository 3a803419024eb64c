"""Messages to tokens and back, one file per chat format. Only these files know control tokens and
call tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from agent_r1.config.registry import Registry
from agent_r1.types import Action, Message

RENDERERS: Registry[Renderer] = Registry(
    "renderer",
    {
        "chatml": "agent_r1.render.chatml:ChatML",
        "gemma3": "agent_r1.render.gemma3:Gemma3",
        "llama3": "agent_r1.render.llama3:Llama3",
        "template": "agent_r1.render.template:ChatTemplate",
    },
    default="chatml",
)


class Renderer(Protocol):
    """One chat format, made from its section and a tokenizer of transformers. Works incrementally:
    sampled tokens are never rendered again.
    An optional ``chat_template``, the same texts in Jinja, is written into an exported
    model whose own template knows no tools.

    Attributes:
        stop_token_ids: Each of them ends an assistant's turn.
    """

    stop_token_ids: tuple[int, ...]

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[int, ...]:
        """The opening of an episode, up to where the assistant starts to write."""
        ...

    def observation(self, messages: Sequence[Message], action: Action) -> tuple[int, ...]:
        """The tokens that come after ``action``: its turn's end if not sampled, the messages, the
        next opening.
        """
        ...

    def parse(self, action: Action) -> Message:
        """The sampled tokens as the assistant's message, tool calls parsed."""
        ...

    def encode_message(self, message: Message) -> tuple[int, ...]:
        """The tokens of an assistant's turn with this message, its end included: for scripts and
        supervised data.
        """
        ...
