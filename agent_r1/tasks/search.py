"""BM25 over passages in memory, by the library bm25s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent_r1.config import ConfigError


@dataclass(frozen=True)
class Passage:
    """One searchable text."""

    id: str
    title: str
    text: str


class PassageIndex:
    """Title and text indexed, English stop words, Porter stems; BM25 with the library's
    defaults.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        try:
            import bm25s
            import Stemmer
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"searching passages needs {error.name!r}: pip install 'agent-r1[multihop]'"
            ) from error
        self.passages = passages
        self._tokenize = bm25s.tokenize
        self._stemmer = Stemmer.Stemmer("english")
        self._bm25 = bm25s.BM25()
        texts = [f"{passage.title} {passage.text}" for passage in passages]
        self._bm25.index(self._tokens(texts), show_progress=False)

    def search(self, query: str, k: int) -> list[Passage]:
        """The k best passages, best first; none if the query has no word that is indexed."""
        k = min(k, len(self.passages))
        found, scores = self._bm25.retrieve(self._tokens([query]), k=k, show_progress=False)
        ranked = zip(found[0].tolist(), scores[0].tolist(), strict=True)
        return [self.passages[index] for index, score in ranked if score > 0]

    def _tokens(self, texts: list[str]) -> object:
        return self._tokenize(texts, stopwords="en", stemmer=self._stemmer, show_progress=False)
