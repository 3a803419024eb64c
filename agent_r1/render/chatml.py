"""ChatML with Hermes tool calls: Qwen 2.5 and 3, SmolLM2, and the models that follow them.

The texts are those of Qwen's chat template. Where the template would render an old assistant turn
again (JSON re-serialised, old thinking dropped), the tokens stay as sampled. Qwen 2.5's template
invents a system message when there is none; here the environment's messages are all there is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from agent_r1.config import ConfigError, NamedSection
from agent_r1.render.calls import parse_hermes
from agent_r1.render.encoding import Encoder, HuggingFaceTokenizer, Markup
from agent_r1.types import Action, MalformedCall, Message

_TOOLS_BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
_TOOLS_AFTER = (
    "\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n"
    "<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


class ChatML:
    """See the module's docstring; the methods are those of ``Renderer``."""

    class Settings(NamedSection):
        name: str = "chatml"

    def __init__(self, settings: NamedSection, tokenizer: HuggingFaceTokenizer) -> None:
        self._encoder = Encoder(tokenizer.backend_tokenizer)
        end = self._encoder.id_of("<|im_end|>")
        if end is None or self._encoder.id_of("<|im_start|>") is None:
            raise ConfigError(
                "renderer 'chatml': the tokenizer has no <|im_start|> and <|im_end|> tokens; "
                "choose the renderer of the model's own chat format"
            )
        self._end = end
        text_end = self._encoder.id_of("<|endoftext|>")
        self.stop_token_ids = (end,) if text_end is None else (end, text_end)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[int, ...]:
        pieces: list[str | Markup] = []
        rest = list(messages)
        system = rest.pop(0).content if rest and rest[0].role == "system" else ""
        if system or tools:
            pieces += [Markup("<|im_start|>system\n"), system]
            if tools:
                pieces.append(Markup(("\n\n" if system else "") + _TOOLS_BEFORE))
                pieces += ["\n" + json.dumps(tool, ensure_ascii=False) for tool in tools]
                pieces.append(Markup(_TOOLS_AFTER))
            pieces.append(Markup("<|im_end|>\n"))
        pieces += _turns(rest)
        pieces.append(Markup("<|im_start|>assistant\n"))
        return self._encoder.encode(pieces)

    def observation(self, messages: Sequence[Message], action: Action) -> tuple[int, ...]:
        closed = action.token_ids[-1:] == (self._end,)
        opening = Markup(("" if closed else "<|im_end|>") + "\n")
        return self._encoder.encode([opening, *_turns(messages), Markup("<|im_start|>assistant\n")])

    def parse(self, action: Action) -> Message:
        ids = action.token_ids
        ended = ids[-1:] and ids[-1] in self.stop_token_ids
        return parse_hermes(self._encoder.decode(ids[:-1] if ended else ids))

    def encode_message(self, message: Message) -> tuple[int, ...]:
        return self._encoder.encode([*_said(message), Markup("<|im_end|>")])

    def encode_action(self, text: str) -> tuple[int, ...]:
        return self._encoder.encode([Markup(text + "<|im_end|>")])


def _turns(messages: Sequence[Message]) -> list[str | Markup]:
    """The messages as whole turns; neighbouring tool results share one user turn."""
    pieces: list[str | Markup] = []
    for index, message in enumerate(messages):
        if message.role == "tool":
            if index == 0 or messages[index - 1].role != "tool":
                pieces.append(Markup("<|im_start|>user"))
            pieces += [Markup("\n<tool_response>\n"), message.content, Markup("\n</tool_response>")]
            if index + 1 == len(messages) or messages[index + 1].role != "tool":
                pieces.append(Markup("<|im_end|>\n"))
            continue
        pieces += [Markup(f"<|im_start|>{message.role}\n"), *_said(message), Markup("<|im_end|>\n")]
    return pieces


def _said(message: Message) -> list[str | Markup]:
    """Content and calls of one message."""
    pieces: list[str | Markup] = [message.content]
    for number, call in enumerate(message.tool_calls):
        if isinstance(call, MalformedCall):
            raise ValueError(f"a malformed call cannot be rendered: {call.text!r}")
        body = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        newline = "\n" if number or message.content else ""
        pieces += [Markup(f"{newline}<tool_call>\n"), body, Markup("\n</tool_call>")]
    return pieces
