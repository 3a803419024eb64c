"""The fallback: a renderer derived from the tokenizer's own chat template.

Contents are rendered as markers and put in afterwards as plain text, so that they cannot become
control tokens; in all other text (names, descriptions, schemas, arguments) only look-alikes of
control tokens are. The tokens after an action are those that the template adds to a conversation
that ends with the action. Sample conversations prove at start-up, token by token, that earlier
turns stay as they are when a turn is added, that contents come out unchanged, that a turn ends with
a token, and that a rendered call can be read back. A template that does otherwise is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from agent_r1.config.section import NamedSection
from agent_r1.errors import ConfigError
from agent_r1.render.base import TurnRenderer
from agent_r1.render.calls import parse_hermes, parse_llama3
from agent_r1.render.encoding import Encoder, Markup
from agent_r1.types import Action, Message, ToolCall
from agent_r1.utils.text import describe

_MARKER = re.compile("\ue000(\\d+)\ue001")
_SAMPLES = ("What now?", ' Two "quoted"\nlines, {"a": [1]} & <b>.\n')
_SCHEMA = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look something up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
_CALL = ToolCall("look_up", {"word": "x"})


class ChatTemplate(TurnRenderer):
    """See the module's docstring; the methods are those of ``Renderer``."""

    class Settings(NamedSection):
        name: str = "template"

    def __init__(self, settings: Settings, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer.backend_tokenizer)
        self._control = re.compile(f"{self._encoder.control_pattern}|[\ue000\ue001]")
        self._suspect = _suspect(self._encoder.controls)
        if not getattr(tokenizer, "chat_template", None):
            raise _refused("the tokenizer has none")
        self._strips = False
        try:
            self._closing, self._end = self._find_end()
            self._parse = self._find_parser()
            if not self._holds():
                self._strips = True
                if not self._holds():
                    raise _refused(
                        "it renders earlier turns or contents anew when a turn is added, so that "
                        "what was sampled would not stay what it was"
                    )
        except ConfigError:
            raise
        except Exception as error:  # whatever a template's code raises
            what = describe(error)
            raise _refused(f"it fails on a sample conversation: {what:.300}") from error
        self.stop_token_ids = tuple({self._end, tokenizer.eos_token_id} - {None})

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[int, ...]:
        return self._encoder.encode(self._render(messages, tools, opening=True))

    def observation(self, messages: Sequence[Message], action: Action) -> tuple[int, ...]:
        ids = self._encoder.encode(self._after(messages))
        return ids[1:] if action.token_ids[-1:] == (self._end,) else ids

    def read(self, text: str) -> Message:
        return self._parse(text)

    def encode_message(self, message: Message) -> tuple[int, ...]:
        user = Message("user", _SAMPLES[0])
        before = self._text(self._render([user], [], opening=True))
        both = self._render([user, message], [], opening=False)
        ids = self._encoder.encode(_minus(both, before))
        closing = self._encoder.encode([Markup(self._closing)])
        return ids[: len(ids) - len(closing) + 1]

    def encode_action(self, text: str) -> tuple[int, ...]:
        end = self._encoder.decode([self._end])
        return self._encoder.encode([Markup(text + end)])

    # How the template is asked -----------------------------------------------------------------

    def _render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, opening: bool
    ) -> list[str | Markup]:
        """The conversation as the template renders it, contents apart from markup.

        Raises:
            ConfigError: A tool's name or description, or a call, would become a control token,
                because the template joins or changes texts.
        """
        pieces = self._marked(messages, tools, opening=opening)
        written = [call for m in messages for call in m.tool_calls if isinstance(call, ToolCall)]
        if (odd := self._odd([*tools, *({c.name: c.arguments} for c in written)])) is None:
            return pieces
        tame = [
            replace(
                message,
                tool_calls=tuple(
                    ToolCall(self._tame(call.name), self._tame(call.arguments))
                    if isinstance(call, ToolCall)
                    else call
                    for call in message.tool_calls
                ),
            )
            for message in messages
        ]
        expected = self._marked(tame, self._tame(list(tools)), opening=opening)
        if self._controls(pieces) != self._controls(expected):
            raise ConfigError(
                f"renderer 'template': {odd!r:.200}, in a tool or a call, becomes a control token "
                "by what this chat template does with it; name it otherwise, or use the renderer "
                "of the model's own format (chatml, gemma3, llama3)"
            )
        return pieces

    def _odd(self, value: Any) -> str | None:
        """The first string or key in a JSON value that a template could turn into a control token,
        or ``None``.
        """
        if isinstance(value, str):
            return value if self._suspect.search(value.casefold()) else None
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        if not isinstance(inner, list):
            return None
        return next(filter(None, map(self._odd, inner)), None)

    def _tame(self, value: Any) -> Any:
        """A JSON value with letters ``x`` in place of every string that ``_odd`` finds."""
        if isinstance(value, str):
            return "x" * len(value) if self._odd(value) else value
        if isinstance(value, dict):
            return {
                f"{self._tame(key)}{n if self._odd(key) else ''}": self._tame(item)
                for n, (key, item) in enumerate(value.items())
            }
        return [*map(self._tame, value)] if isinstance(value, list) else value

    def _controls(self, pieces: Sequence[str | Markup]) -> list[int]:
        return [i for i in self._encoder.encode(pieces) if self._encoder.is_control(i)]

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, opening: bool
    ) -> list[str | Markup]:
        plain: list[str] = []

        def marked(text: str) -> str:
            plain.append(text)
            return f"\ue000{len(plain) - 1}\ue001"

        contents = [m.content.strip() if self._strips else m.content for m in messages]
        rows = _rows(messages, [marked(content) if content else "" for content in contents])
        for row in rows:
            if "tool_calls" in row:
                row["tool_calls"] = self._harmless(row["tool_calls"], marked)
        text = self._apply(rows, self._harmless(list(tools), marked), opening=opening)
        parts = _MARKER.split(text)
        return [plain[int(part)] if index % 2 else Markup(part) for index, part in enumerate(parts)]

    def _harmless(self, value: Any, marked: Callable[[str], str]) -> Any:
        """A JSON value whose strings and keys have markers in place of control tokens and marker
        characters.
        """
        if isinstance(value, str):
            return self._control.sub(lambda found: marked(found[0]), value)
        if isinstance(value, dict):
            return {
                self._harmless(key, marked): self._harmless(item, marked)
                for key, item in value.items()
            }
        return [self._harmless(i, marked) for i in value] if isinstance(value, list) else value

    def _apply(self, rows: list[Any], tools: Sequence[dict[str, Any]], *, opening: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                rows, tools=list(tools) or None, add_generation_prompt=opening, tokenize=False
            )
        )

    @staticmethod
    def _text(pieces: Sequence[str | Markup]) -> str:
        return "".join(piece.text if isinstance(piece, Markup) else piece for piece in pieces)

    def _before(self, messages: Sequence[Message]) -> list[Message]:
        """A short conversation that ``messages`` can follow."""
        tools = [message for message in messages if message.role == "tool"]
        calls = (_CALL,) * len(tools) if messages and messages[0].role == "tool" else ()
        content = "" if calls else _SAMPLES[0]
        return [Message("user", _SAMPLES[0]), Message("assistant", content, calls)]

    def _after(self, messages: Sequence[Message]) -> list[str | Markup]:
        """From the end of an action to the opening of the next: its end token first."""
        before = self._before(messages)
        text = self._text(self._render(before, [_SCHEMA], opening=False))
        whole = self._render([*before, *messages], [_SCHEMA], opening=True)
        return [Markup(self._closing), *_minus(whole, text)]

    # What is found out and proven at start-up --------------------------------------------------

    def _find_end(self) -> tuple[str, int]:
        """The text that the template writes after an action, and that text's first token."""
        opened = self._text(self._render([Message("user", "A")], [], opening=True))
        both = [Message("user", "A"), Message("assistant", "B")]
        whole = self._text(self._render(both, [], opening=False))
        if not whole.startswith(opened + "B"):
            raise _refused("an assistant's turn does not begin as the generation prompt does")
        closing = whole[len(opened) + 1 :]
        first = self._encoder.encode([Markup(closing)])[:1]
        if not first or not self._encoder.is_control(first[0]):
            raise _refused(f"a turn does not end with a token of its own but with {closing!r}")
        return closing, first[0]

    def _find_parser(self) -> Callable[[str], Message]:
        """The parser that understands calls as the template writes them."""
        user = Message("user", _SAMPLES[0])
        opened = self._text(self._render([user], [_SCHEMA], opening=True))
        called = [user, Message("assistant", "", (_CALL,))]
        text = self._text(self._render(called, [_SCHEMA], opening=False))
        if "look_up" not in opened:
            raise _refused("it does not show tools to the model")
        written = text[len(opened) :].removesuffix(self._closing)
        for parse in (parse_hermes, parse_llama3):
            if text.startswith(opened) and parse(written).tool_calls == (_CALL,):
                return parse
        raise _refused(f"its tool calls are in a format that is not known here: {written!r:.100}")

    def _holds(self) -> bool:
        """Whether rendering turn by turn equals the template's own, on several conversations."""
        call = Message("assistant", "", (_CALL,))
        for system, result, reply in itertools.product((False, True), _SAMPLES, (False, True)):
            conversation = [Message("system", _SAMPLES[1])] if system else []
            conversation.append(Message("user", result))
            ids = self.prompt(conversation, [_SCHEMA])
            turns = [(call, Message("tool", result)), (call, Message("tool", _SAMPLES[0]))]
            if reply:
                turns.append((Message("assistant", "Which one?"), Message("user", result)))
            for action, answer in turns:
                said = self.encode_message(action)
                zeros = (0.0,) * len(said)
                observed = self.observation([answer], Action(said, zeros, zeros, (), "stop"))
                ids += said + observed
                conversation += [action, answer]
                rows = _rows(conversation, [message.content for message in conversation])
                whole = self._apply(rows, [_SCHEMA], opening=True)
                if list(ids) != self._tokenizer.encode(whole, add_special_tokens=False):
                    return False
        return True


def _suspect(controls: Iterable[str]) -> re.Pattern[str]:
    """Matches, in lower case, the characters that control tokens begin and end with, and the words
    between them.
    """
    marks: set[str] = set()
    words: set[str] = set()
    for control in map(str.casefold, controls):
        if match := re.fullmatch(r"\s*([^\w\s]*)(.*?)([^\w\s]*)\s*", control, re.DOTALL):
            marks |= {*match[1], *match[3]}
            words |= {match[2]} - {""}
    chosen = [re.escape(mark) for mark in marks] + [rf"\b{re.escape(word)}\b" for word in words]
    return re.compile("|".join(sorted(chosen)) or r"(?!)")


def _rows(messages: Sequence[Message], contents: Sequence[str]) -> list[dict[str, Any]]:
    """Messages in the form that templates expect; a tool's answers its call by an id."""
    rows: list[dict[str, Any]] = []
    num_answers = 0
    for message, content in zip(messages, contents, strict=True):
        row: dict[str, Any] = {"role": message.role, "content": content}
        calls = [call for call in message.tool_calls if isinstance(call, ToolCall)]
        if calls:
            row["tool_calls"] = [
                {
                    "id": f"call{number:05d}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for number, call in enumerate(calls)
            ]
        if message.role == "tool":
            row |= {"tool_call_id": f"call{num_answers:05d}", "name": _CALL.name}
        num_answers = num_answers + 1 if message.role == "tool" else 0
        rows.append(row)
    return rows


def _minus(whole: list[str | Markup], before: str) -> list[str | Markup]:
    """The pieces without the text ``before`` at their start."""
    rest: list[str | Markup] = []
    for piece in whole:
        text = piece.text if isinstance(piece, Markup) else piece
        cut = min(len(before), len(text))
        if before[:cut] != text[:cut]:
            raise _refused("it renders earlier turns anew when a turn is added")
        before = before[cut:]
        kept = text[cut:]
        rest.append(Markup(kept) if isinstance(piece, Markup) else kept)
    return rest


def _refused(reason: str) -> ConfigError:
    return ConfigError(
        f"renderer 'template': this chat template cannot be used turn by turn: {reason}; "
        "choose 'chatml', 'gemma3' or 'llama3', or write a renderer ('my_format.py:MyFormat')"
    )
