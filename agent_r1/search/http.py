"""Search by a server elsewhere, with the interface of Search-R1's retriever:

POST {"queries": ["..."], "topk": 3, "return_scores": true}
{"result": [[{"document": {"id": "7", "contents": "\\"Title\\"\\nText"}, "score": 9.5}]]}
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from agent_r1.config.section import NamedSection
from agent_r1.errors import ConfigError
from agent_r1.search import Passage
from agent_r1.search.batching import Answer, BatchedSearcher, Query
from agent_r1.search.corpus import split_contents

if TYPE_CHECKING:
    import httpx


MAX_BODY_BYTES = 20_000_000
GRACE_SECONDS = 0.5
"""Extra time for an answer that began within the time limit but comes slowly."""


class Http(BatchedSearcher):
    """Asks a server; queries of the same time go into one request, and requests do not wait for
    each other. The corpus is the server's own.
    """

    one_at_a_time = False

    class Settings(NamedSection):
        """``url``: of the server, usually ``http://HOST:8000/retrieve``; ``timeout``: seconds per
        request.
        """

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
        numbers = sorted({k for _, k in queries})  # the results may depend on k
        parts = [[query for query in queries if query[1] == k] for k in numbers]
        client = self._httpx.AsyncClient(
            timeout=self._settings.timeout, verify=self._certificates
        )  # a client belongs to one event loop, so a new one
        async with client:
            asks = (
                self._ask(client, [text for text, _ in part], k)
                for part, k in zip(parts, numbers, strict=True)
            )
            found = await asyncio.gather(*asks)
        answers: dict[Query, Answer] = {}
        for part, given in zip(parts, found, strict=True):
            answers.update(zip(part, given, strict=True))
        return [answers[query] for query in queries]

    async def _ask(self, client: httpx.AsyncClient, texts: list[str], k: int) -> list[Answer]:
        """The server's answers; an exception in place of each that failed."""
        url, seconds = self._settings.url, self._settings.timeout
        body = {"queries": texts, "topk": k, "return_scores": True}
        try:
            async with asyncio.timeout(seconds + GRACE_SECONDS):  # httpx's own is for each read
                status, content = await self._post(client, body)
        except TimeoutError:
            return [ConnectionError(f"{url}: no whole answer in {seconds:g} seconds")] * len(texts)
        except (self._httpx.HTTPError, ValueError) as error:
            return [ConnectionError(f"{url}: {type(error).__name__} {error}")] * len(texts)
        if status < 300:
            try:
                return list(_passages(json.loads(content), len(texts), k))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                start = content[:100].decode("utf-8", "replace")
                wrong = ValueError(f"{url}: not the answer of a retriever: {error!r}: {start!r}")
                return [wrong] * len(texts)
        if len(texts) > 1:  # a query that the server rejects must not fail others
            alone = await asyncio.gather(*(self._ask(client, [text], k) for text in texts))
            return [answer for answers in alone for answer in answers]
        start = content[:200].decode("utf-8", "replace")
        return [ConnectionError(f"{url}: status {status}: {start}")]

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, bytes]:
        """Status and body, which has a limit."""
        content = bytearray()
        async with client.stream("POST", self._settings.url, json=body) as response:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > MAX_BODY_BYTES:
                    raise ValueError(f"the answer has more than {MAX_BODY_BYTES:,} bytes")
        return response.status_code, bytes(content)


def _passages(answer: Any, number: int, k: int) -> list[list[Passage]]:
    lists = answer["result"]
    if len(lists) != number:
        raise ValueError(f"{len(lists)} results for {number} queries")
    return [[_passage(row.get("document", row)) for row in rows[:k]] for rows in lists]


def _passage(document: dict[str, Any]) -> Passage:
    if "contents" in document:
        title, text = split_contents(document["contents"])
        title = document.get("title") or title
    else:
        title, text = document.get("title") or "", document["text"]
    if not isinstance(text, str):
        raise TypeError(f"a passage's text is {text!r:.60}")
    return Passage(str(document.get("id", title)), title, text)
