"""ChatML with Hermes tool calls: Qwen 2.5 and 3, SmolLM2, and the models that follow them.

The texts are those of Qwen's chat templates. Where a template would render an old assistant turn
again (JSON re-serialised, thinking from before the user's last message dropped), the tokens stay as
sampled. The templates of Qwen 2.5 and SmolLM2 invent a system message when there is none; here
nothing is added to the environment's messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from agent_r1.config.section import NamedSection
from agent_r1.errors import ConfigError
from agent_r1.render.base import TurnRenderer
from agent_r1.render.encoding import Encoder, HuggingFaceTokenizer, Markup
from agent_r1.render.hermes import said, tool_result, tool_section
from agent_r1.types import Action, Message

_NO_THOUGHT = "<think>\n\n</think>\n\n"


class ChatML(TurnRenderer):
    """See the module's docstring; the methods are those of ``Renderer``."""

    class Settings(NamedSection):
        """``thinking``: false tells Qwen 3 not to think, by an empty thought before each answer."""

        name: str = "chatml"
        thinking: bool = True

    end = "<|im_end|>"

    def __init__(self, settings: Settings, tokenizer: HuggingFaceTokenizer) -> None:
        self._encoder = Encoder(tokenizer.backend_tokenizer)
        end = self._encoder.id_of("<|im_end|>")
        if end is None or self._encoder.id_of("<|im_start|>") is None:
            raise ConfigError(
                "renderer 'chatml': the tokenizer has no <|im_start|> and <|im_end|> tokens; "
                "choose the renderer of the model's own chat format"
            )
        if not settings.thinking and self._encoder.id_of("</think>") is None:
            raise ConfigError(
                "renderer 'chatml': the tokenizer has no </think> token, so this model does not "
                "think and thinking = false would have no meaning; leave it out"
            )
        self._end = end
        self._opening = Markup(
            "<|im_start|>assistant\n" + ("" if settings.thinking else _NO_THOUGHT)
        )
        # For programs that use the model later; a template cannot express the empty thought.
        template = files("agent_r1") / "assets" / "hopworld-base" / "chat_template.jinja"
        self.chat_template = template.read_text() if settings.thinking else None
        text_end = self._encoder.id_of("<|endoftext|>")
        self.stop_token_ids = (end,) if text_end is None else (end, text_end)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[int, ...]:
        pieces: list[str | Markup] = []
        rest = list(messages)
        system = rest.pop(0).content if rest and rest[0].role == "system" else ""
        if system or tools:
            gap = "\n\n" if system and tools else ""
            pieces += [Markup("<|im_start|>system\n"), system, gap, *tool_section(tools)]
            pieces.append(Markup("<|im_end|>\n"))
        return self._encoder.encode([*pieces, *_turns(rest), self._opening])

    def observation(self, messages: Sequence[Message], action: Action) -> tuple[int, ...]:
        closed = action.token_ids[-1:] == (self._end,)
        opening = Markup(("" if closed else "<|im_end|>") + "\n")
        return self._encoder.encode([opening, *_turns(messages), self._opening])


def _turns(messages: Sequence[Message]) -> list[str | Markup]:
    """The messages as whole turns; neighbouring tool results share one user turn."""
    pieces: list[str | Markup] = []
    for index, message in enumerate(messages):
        if message.role == "tool":
            if index == 0 or messages[index - 1].role != "tool":
                pieces.append(Markup("<|im_start|>user"))
            pieces += ["\n", *tool_result(message.content)]
            if index + 1 == len(messages) or messages[index + 1].role != "tool":
                pieces.append(Markup("<|im_end|>\n"))
            continue
        pieces += [Markup(f"<|im_start|>{message.role}\n"), *said(message), Markup("<|im_end|>\n")]
    return pieces
