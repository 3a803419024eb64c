"""The common part of the renderers: how an assistant's turn is read and written."""

from __future__ import annotations

from typing import ClassVar

from agent_r1.render.calls import parse_hermes
from agent_r1.render.encoding import Encoder, Markup
from agent_r1.render.hermes import said
from agent_r1.types import Action, Message


class TurnRenderer:
    """Subclass it and write ``prompt`` and ``observation``; set ``_encoder`` and
    ``stop_token_ids``.
    """

    end: ClassVar[str]
    """The control token that ends an assistant's turn."""
    stop_token_ids: tuple[int, ...]
    _encoder: Encoder

    def parse(self, action: Action) -> Message:
        ids = action.token_ids
        ended = ids[-1:] and ids[-1] in self.stop_token_ids
        return self.read(self._encoder.decode(ids[:-1] if ended else ids))

    def read(self, text: str) -> Message:
        """The message that an assistant's turn is, its end left out. Default: Hermes calls."""
        return parse_hermes(text)

    def said(self, message: Message) -> list[str | Markup]:
        """Content and calls of a message as the format writes them. Default: Hermes calls."""
        return said(message)

    def encode_message(self, message: Message) -> tuple[int, ...]:
        return self._encoder.encode([*self.said(message), Markup(self.end)])

    def encode_action(self, text: str) -> tuple[int, ...]:
        """The tokens of a turn as text that may hold control tokens, its end added."""
        return self._encoder.encode([Markup(text + self.end)])
