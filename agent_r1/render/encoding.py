"""Text to token ids such that text of users and tools can never become a control token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

from agent_r1.errors import ConfigError


class HuggingFaceTokenizer(Protocol):
    """What renderers need of a fast tokenizer of transformers."""

    backend_tokenizer: Tokenizer


BLANK = re.compile(r"[\s▁]+")
"""Added tokens that count as text: Gemma has some for runs of line ends, tabs, spaces."""


@dataclass(frozen=True, slots=True)
class Markup:
    """Text of the chat format itself: added tokens in it are meant as such."""

    text: str


class Encoder:
    """Encodes pieces of markup (``Markup``) and of plain text (``str``) as one string.

    The result equals what the tokenizer gives for the joined text, except that an added token,
    special or not, can come out of markup only. Runs of text between added tokens are encoded in
    one go, because a tokenizer may merge across the joint of two pieces. Added tokens that are in
    the model's own vocabulary too, not special, and match ``words``, count as text.
    """

    def __init__(self, tokenizer: Tokenizer, words: re.Pattern[str] = BLANK) -> None:
        spec = json.loads(tokenizer.to_str())
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        text: list[dict[str, Any]] = []
        control: list[dict[str, Any]] = []
        for token in spec["added_tokens"]:
            word = words.fullmatch(token["content"]) and token["content"] in vocabulary
            (text if word and not token["special"] else control).append(token)
        self._added = {token["content"]: int(token["id"]) for token in control}
        self._control_ids = frozenset(self._added.values())
        longest_first = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        # The same tokenizer without those tokens: `encode_special_tokens` alone would still
        # let the added tokens through that are not special, such as Qwen's <tool_call>.
        self._plain = Tokenizer.from_str(
            json.dumps({**spec, "added_tokens": text, "post_processor": None})
        )
        self._tokenizer = tokenizer

    @property
    def control_pattern(self) -> str:
        """Regular expression that matches every added token."""
        return self._pattern.pattern

    @property
    def controls(self) -> Iterable[str]:
        """The texts of the added tokens that are no plain text."""
        return self._added.keys()

    def id_of(self, control: str) -> int | None:
        """The id of an added token, or ``None`` if this tokenizer has none of that name."""
        return self._added.get(control)

    def is_control(self, token_id: int) -> bool:
        """Whether the id is an added token's, which no plain text contains."""
        return token_id in self._control_ids

    def encode(self, pieces: Iterable[str | Markup]) -> tuple[int, ...]:
        runs: list[str | int] = [""]
        for piece in pieces:
            parts = self._pattern.split(piece.text) if isinstance(piece, Markup) else [piece]
            for part in parts:
                if isinstance(piece, Markup) and part in self._added:
                    runs += [self._added[part], ""]
                else:
                    runs[-1] = str(runs[-1]) + part
        ids: list[int] = []
        for run in runs:
            ids.extend([run] if isinstance(run, int) else self._text(run))
        return tuple(ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _text(self, text: str) -> list[int]:
        if not text:
            return []
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no encoding
        encoded = self._plain.encode(text, add_special_tokens=False)
        ids: list[int] = encoded.ids
        if self._control_ids.isdisjoint(ids):
            return ids
        # The vocabulary holds the token as plain text, too: cut the text inside the token.
        spans = zip(ids, encoded.offsets, strict=True)
        start, end = next(span for token, span in spans if token in self._control_ids)
        if end - start < 2:
            raise ConfigError(
                f"the text {text[start:end]!r} is a control token of this tokenizer wherever it "
                "stands; a model with such a tokenizer cannot be used"
            )
        middle = (start + end) // 2
        return self._text(text[:middle]) + self._text(text[middle:])
