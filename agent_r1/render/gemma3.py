"""The format of Gemma 3: turns of ``user`` and ``model`` that alternate.

As in the models' chat template, the system text stands before the first user message, a blank line
between, and contents are stripped. The template knows no tools. Here they are described after the
system text and called in the Hermes style, in plain text, as the tokenizer has no tokens for it;
results come in a user turn, and adjacent messages of the same side share a turn.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from agent_r1.config.section import NamedSection
from agent_r1.errors import ConfigError
from agent_r1.render.base import TurnRenderer
from agent_r1.render.encoding import BLANK, Encoder, HuggingFaceTokenizer, Markup
from agent_r1.render.hermes import said, tool_result, tool_section
from agent_r1.types import Action, Message

_END = "<end_of_turn>"
_OPENING = Markup("<start_of_turn>model\n")
_HTML = (
    "table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|"
    "a|html|body|img|span|bbox|ul|li|div|iframe|footer"
)
_WORDS = re.compile(f"{BLANK.pattern}|</?(?:{_HTML})>")


class Gemma3(TurnRenderer):
    """See the module's docstring; the methods are those of ``Renderer``."""

    class Settings(NamedSection):
        name: str = "gemma3"

    end = _END

    def __init__(self, settings: Settings, tokenizer: HuggingFaceTokenizer) -> None:
        self._encoder = Encoder(tokenizer.backend_tokenizer, _WORDS)
        self.chat_template = (files("agent_r1.render") / "gemma3.jinja").read_text()
        needed = ("<bos>", "<start_of_turn>", _END)
        if missing := [token for token in needed if self._encoder.id_of(token) is None]:
            raise ConfigError(
                f"renderer 'gemma3': the tokenizer has no {', '.join(missing)}; "
                "choose the renderer of the model's own chat format"
            )
        ends = map(self._encoder.id_of, (_END, "<eos>"))
        self.stop_token_ids = tuple(end for end in ends if end is not None)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[int, ...]:
        rest = list(messages)
        system = rest.pop(0).content if rest and rest[0].role == "system" else ""
        before: list[str | Markup] = []
        for part in ([system] if system else [], tool_section(tools)):
            before += [*part, "\n\n"] if part else []
        if before and (not rest or rest[0].role == "assistant"):
            raise ValueError("system text and tools stand in the first user turn: there is none")
        return self._encoder.encode([Markup("<bos>"), *_turns(rest, before), _OPENING])

    def observation(self, messages: Sequence[Message], action: Action) -> tuple[int, ...]:
        closed = action.token_ids[-1:] == self.stop_token_ids[:1]
        opening = Markup(("" if closed else _END) + "\n")
        return self._encoder.encode([opening, *_turns(messages), _OPENING])

    def said(self, message: Message) -> list[str | Markup]:
        return _said(message)


def _turns(messages: Sequence[Message], before: Sequence[str | Markup] = ()) -> list[str | Markup]:
    """The messages as whole turns, the first of which begins with ``before``."""
    pieces: list[str | Markup] = []
    for model, turn in itertools.groupby(messages, lambda message: message.role == "assistant"):
        pieces += [Markup(f"<start_of_turn>{'model' if model else 'user'}\n"), *before]
        for number, message in enumerate(turn):
            pieces += ["\n" if number else "", *_said(message)]
        pieces.append(Markup(_END + "\n"))
        before = ()
    return pieces


def _said(message: Message) -> list[str | Markup]:
    if message.role == "tool":
        return tool_result(message.content)
    return said(dataclasses.replace(message, content=message.content.strip()))
