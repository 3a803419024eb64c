"""BM25 over title and text, by the library bm25s: English stop words, Snowball stems, the library's
parameters. The index is on disk, and memory-mapped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from agent_r1.config.section import NamedSection
from agent_r1.errors import ConfigError
from agent_r1.search import Passage
from agent_r1.search.batching import BatchedSearcher, Query
from agent_r1.search.corpus import read_corpus
from agent_r1.search.store import PassageStore, store
from agent_r1.utils.cache_folder import cache_folder, make_folder

FORMAT = 1
"""Version of the index folder; increased when its files or the tokens change."""
Progress = Callable[[str, int], None]
"""Called with the stage and the number of passages read."""


class BM25(BatchedSearcher):
    """Finds passages that share words with the query; none if no word is indexed."""

    class Settings(NamedSection):
        """``index``: a folder that ``agent-r1 index --out`` wrote, in place of the corpus."""

        name: str = "bm25"
        index: str | None = None

        @property
        def brings_passages(self) -> bool:
            return self.index is not None

    def __init__(self, settings: Any, corpus: Sequence[Path]) -> None:
        super().__init__()
        self._library, self._stemmer = _libraries()
        if settings.index is None:
            folder = build_index(corpus)
        else:
            folder = Path(settings.index).expanduser()
            _check(folder, f"env.search.index = {settings.index!r}")
        self.passages = PassageStore(folder)
        self._bm25 = self._library.BM25.load(folder, mmap=True)
        scores = self._bm25.scores
        # Plain arrays over the same map: slices of a memmap cost more than the sums.
        scores.update({key: np.asarray(scores[key]) for key in ("data", "indices", "indptr")})

    def look_up(self, queries: Sequence[Query]) -> list[list[Passage]]:
        words = self._library.tokenize(
            [text for text, _ in queries],
            stopwords="en",
            stemmer=self._stemmer,
            return_ids=False,
            show_progress=False,
        )
        return [self._find(own, k) for own, (_, k) in zip(words, queries, strict=True)]

    def _find(self, words: list[str], k: int) -> list[Passage]:
        if not (ids := self._bm25.get_tokens_ids(words)):
            return []
        positions = best(self._bm25.get_scores_from_ids(ids), k)
        return [self.passages[position] for position in positions]


def best(scores: np.ndarray[Any, Any], k: int) -> list[int]:
    """Positions of the ``k`` highest scores above zero; of equal scores the first come first.

    The library's own selection leaves the order of equal scores open.
    """
    k = min(k, len(scores))
    least = np.partition(scores, -k)[-k]
    found = np.flatnonzero((scores >= least) & (scores > 0))
    order = np.argsort(-scores[found], kind="stable")[:k]
    positions: list[int] = found[order].tolist()
    return positions


def build_index(
    corpus: Sequence[Path], out: Path | None = None, progress: Progress | None = None
) -> Path:
    """The folder of the corpus's index: ``out``, which must be new, or one in the cache, which is
    made if it is not there yet.
    """
    bm25s, stemmer = _libraries()
    if not corpus:
        raise ConfigError("search 'bm25' needs a corpus, or env.search.index = 'FOLDER'")
    if out is not None and out.exists():
        raise ConfigError(f"--out {out}: is there already; name a new folder")
    libraries = [f"{name} {version(name)}" for name in ("bm25s", "PyStemmer")]
    folder = out or cache_folder("index", corpus, f"bm25 {FORMAT}", *libraries)
    if folder.exists():
        return folder
    tell = progress or (lambda stage, number: None)

    def build(folder: Path) -> None:
        number = 0

        def texts() -> Iterator[str]:
            nonlocal number
            for number, passage in enumerate(store(read_corpus(corpus), folder), 1):
                if number % 256 == 0:
                    tell("reading", number)
                yield f"{passage.title} {passage.text}"

        tokens = bm25s.tokenize(texts(), stopwords="en", stemmer=stemmer, show_progress=False)
        tell("indexing", number)
        if not tokens.vocab:
            raise ConfigError(f"corpus {corpus[0]}: no word in it that could be searched for")
        index = bm25s.BM25()
        index.index(tokens, show_progress=False)
        index.save(folder, show_progress=False)
        about = {"format": FORMAT, "passages": number, "libraries": libraries}
        (folder / "index.json").write_text(json.dumps(about) + "\n")

    return make_folder(folder, build)


def _check(folder: Path, setting: str) -> None:
    try:
        found = json.loads((folder / "index.json").read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{setting}: holds no index; make one: agent-r1 index CORPUS --out FOLDER"
        ) from error
    if found != FORMAT:
        raise ConfigError(
            f"{setting}: has format {found}, not {FORMAT}; "
            "make it again: agent-r1 index CORPUS --out FOLDER"
        )


def _libraries() -> tuple[Any, Any]:
    try:
        import bm25s
        import Stemmer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"search 'bm25' needs {error.name!r}: pip install 'agent-r1[multihop]'"
        ) from error
    return bm25s, Stemmer.Stemmer("english")
