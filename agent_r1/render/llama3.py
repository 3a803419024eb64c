"""The format of Llama 3.1, 3.2 and 3.3: headers, JSON calls, results from ``ipython``.

The texts are those of the models' chat template: its system block is always there, tools stand in
the first user message, contents are stripped, a tool's result is a JSON string. The template allows
one call per answer and drops the text beside it; sampled tokens stay as they were. The date is a
setting, because a run must not depend on the day.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from pydantic import Field

from agent_r1.config.section import NamedSection
from agent_r1.errors import ConfigError
from agent_r1.render.base import TurnRenderer
from agent_r1.render.calls import parse_llama3
from agent_r1.render.encoding import Encoder, HuggingFaceTokenizer, Markup
from agent_r1.types import Action, Message, ToolCall

_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and '
    "its value}.Do not use variables.\n\n"
)
_END = "<|eot_id|>"


class Llama3(TurnRenderer):
    """See the module's docstring; the methods are those of ``Renderer``."""

    class Settings(NamedSection):
        """``date``: today's date in the system message."""

        name: str = "llama3"
        date: str = Field("26 Jul 2024", pattern=r"^[\w ,./-]{1,40}$")

    end = _END

    def __init__(self, settings: Settings, tokenizer: HuggingFaceTokenizer) -> None:
        self._encoder = Encoder(tokenizer.backend_tokenizer)
        self._date = settings.date
        template = files("agent_r1.render") / "llama3.jinja"
        self.chat_template = template.read_text().replace(
            "DATE", json.dumps(settings.date, ensure_ascii=False)
        )
        needed = (_END, "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
        if missing := [token for token in needed if self._encoder.id_of(token) is None]:
            raise ConfigError(
                f"renderer 'llama3': the tokenizer has no {', '.join(missing)}; "
                "choose the renderer of the model's own chat format"
            )
        ends = map(self._encoder.id_of, (_END, "<|eom_id|>", "<|end_of_text|>"))
        self.stop_token_ids = tuple(end for end in ends if end is not None)
        self._closing_ids = tuple(map(self._encoder.id_of, (_END, "<|eom_id|>")))

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[int, ...]:
        rest = list(messages)
        system = rest.pop(0).content.strip() if rest and rest[0].role == "system" else ""
        environment = "Environment: ipython\n" if tools else ""
        dates = f"Cutting Knowledge Date: December 2023\nToday Date: {self._date}\n\n"
        pieces = [Markup("<|begin_of_text|>"), *_header("system")]
        pieces += [Markup(environment + dates), system, Markup(_END)]
        if tools:
            if not rest:
                raise ValueError("tools stand in the first user message, and there is none")
            pieces += [*_header("user"), Markup(_TOOLS)]
            for tool in tools:
                pieces.append(json.dumps(tool, ensure_ascii=False, indent=4) + "\n\n")
            pieces += [rest.pop(0).content.strip(), Markup(_END)]
        return self._encoder.encode([*pieces, *_turns(rest), *_header("assistant")])

    def observation(self, messages: Sequence[Message], action: Action) -> tuple[int, ...]:
        closed = action.token_ids[-1:] and action.token_ids[-1] in self._closing_ids
        opening = [] if closed else [Markup(_END)]
        return self._encoder.encode([*opening, *_turns(messages), *_header("assistant")])

    def read(self, text: str) -> Message:
        return parse_llama3(text)

    def said(self, message: Message) -> list[str | Markup]:
        return _said(message)


def _header(role: str) -> list[str | Markup]:
    return [Markup(f"<|start_header_id|>{role}<|end_header_id|>\n\n")]


def _turns(messages: Sequence[Message]) -> list[str | Markup]:
    pieces: list[str | Markup] = []
    for message in messages:
        if message.role == "tool":
            result = json.dumps(message.content, ensure_ascii=False)
            pieces += [*_header("ipython"), result, Markup(_END)]
        else:
            pieces += [*_header(message.role), *_said(message), Markup(_END)]
    return pieces


def _said(message: Message) -> list[str | Markup]:
    if not message.tool_calls:
        return [message.content.strip()]
    call = message.tool_calls[0]
    if len(message.tool_calls) > 1 or not isinstance(call, ToolCall):
        raise ValueError(f"one well-formed call an answer, not {message.tool_calls!r}")
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return [f'{{"name": "{call.name}", "parameters": {arguments}}}']
