"""Search over passages, by name: BM25 or embeddings here, or a server elsewhere.

[env.search]
name = "bm25"        # the default; or "dense", "http", "my_search.py:MySearch"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import BeforeValidator, SerializeAsAny

from agent_r1.config.registry import Registry
from agent_r1.config.section import NamedSection
from agent_r1.utils.scope import shared

SEARCHES: Registry[Searcher] = Registry(
    "search",
    {
        "bm25": "agent_r1.search.bm25:BM25",
        "dense": "agent_r1.search.dense:Dense",
        "http": "agent_r1.search.http:Http",
    },
    default="bm25",
)
SearchSection = Annotated[SerializeAsAny[NamedSection], BeforeValidator(SEARCHES.section)]


@dataclass(frozen=True)
class Passage:
    """One searchable text."""

    id: str
    title: str
    text: str


class Searcher(Protocol):
    """Finds passages. The class is built as ``Class(settings, corpus)``; all episodes of a run
    share one searcher, in one event loop. A ``close()``, plain or asynchronous, is called at the
    end of the run if there is one. Settings whose ``brings_passages`` is true need no corpus.
    """

    async def search(self, query: str, k: int) -> list[Passage]:
        """At most ``k`` passages, best first; concurrent queries must not change the result."""
        ...

    def report(self) -> dict[str, float]:
        """Figures since the last report: ``queries``, and ``p50_ms`` and ``p99_ms`` of
        their latency if there were any.
        """
        ...


def open_search(settings: NamedSection, corpus: Sequence[Path]) -> Searcher:
    """The run's searcher of these settings over these files, made on first use.

    Raises:
        ConfigError: A file, a library, a model or an index is missing or not as it should be.
    """
    files = [path.expanduser().resolve() for path in corpus]
    key = ("search", settings.model_dump_json(), *files)
    return shared(key, lambda: SEARCHES.make(settings, files))
