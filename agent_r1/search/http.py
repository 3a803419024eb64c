"""Search by a server elsewhere, with the interface of Search-R1's retriever:

POST {"queries": ["..."], "topk": 3, "return_scores": true}
{"result": [[{"document": {"id": "7", "contents": "\\"Title\\"\\nText"}, "score": 9.5}]]}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from agent_r1.config import ConfigError, NamedSection
from agent_r1.search import Passage
from agent_r1.search.batching import Answer, BatchedSearcher, Query
from agent_r1.search.corpus import split_contents

if TYPE_CHECKING:
    import httpx


class Http(BatchedSearcher):
    """Asks a server; what it is asked at the same time goes into one request. The corpus is the
    server's own.
    """

    class Settings(NamedSection):
        """``url``, usually ``http://HOST:8000/retrieve``; ``timeout``: seconds per request."""

        name: str = "http"
        brings_passages: ClassVar[bool] = True
        url: str = Field(pattern="^https?://")
        timeout: float = Field(10.0, gt=0)

    def __init__(self, settings: Any, corpus: Sequence[Path]) -> None:
        super().__init__()
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise ConfigError("search 'http' needs 'httpx': pip install httpx") from error
        self._httpx = httpx
        self._settings = settings
        self._certificates = httpx.create_ssl_context()  # slow to read, so once

    async def answer(self, queries: Sequence[Query]) -> list[Answer]:
        answers: dict[Query, Answer] = {}
        client = self._httpx.AsyncClient(
            timeout=self._settings.timeout, verify=self._certificates
        )  # a client belongs to one event loop, so a new one
        async with client:
            for k in sorted({k for _, k in queries}):  # what is found may depend on it
                asked = [query for query in queries if query[1] == k]
                found = await self._ask(client, [text for text, _ in asked], k)
                answers.update(zip(asked, found, strict=True))
        return [answers[query] for query in queries]

    async def _ask(self, client: httpx.AsyncClient, texts: list[str], k: int) -> list[Answer]:
        url = self._settings.url
        body = {"queries": texts, "topk": k, "return_scores": True}
        try:
            response = await client.post(url, json=body)
        except self._httpx.HTTPError as error:
            return [ConnectionError(f"{url}: {type(error).__name__} {error}")] * len(texts)
        if response.is_success:
            try:
                return list(_passages(response.json(), len(texts), k))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                return [ValueError(f"{url}: not the answer of a retriever: {error!r}")] * len(texts)
        if len(texts) > 1:  # one that the server cannot bear must not fail the others
            return [answer for text in texts for answer in await self._ask(client, [text], k)]
        return [ConnectionError(f"{url}: status {response.status_code}: {response.text:.200}")]


def _passages(answer: Any, number: int, k: int) -> list[list[Passage]]:
    lists = answer["result"]
    if len(lists) != number:
        raise ValueError(f"{len(lists)} results for {number} queries")
    return [[_passage(row.get("document", row)) for row in rows[:k]] for rows in lists]


def _passage(document: dict[str, Any]) -> Passage:
    if "contents" in document:
        title, text = split_contents(document["contents"])
        title = document.get("title", title)
    else:
        title, text = document.get("title", ""), document["text"]
    return Passage(str(document.get("id", title)), title, text)
