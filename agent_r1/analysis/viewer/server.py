"""The server of ``agent-r1 view``: pages and JSON, for this machine alone, read-only."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send
from tokenizers import Tokenizer

from agent_r1 import __version__
from agent_r1.analysis.diagnose import diagnose
from agent_r1.analysis.episode_index import NUMBERS, WORDS, Query, as_json, parse_range
from agent_r1.analysis.explain import explain
from agent_r1.analysis.viewer.episode import episode_data, group_data, stored_group, tokenizer_of
from agent_r1.analysis.viewer.library import Library, View
from agent_r1.errors import ConfigError
from agent_r1.utils.local_server import headers_of, is_foreign
from agent_r1.utils.log import LOG
from agent_r1.utils.text import describe

STATIC = Path(__file__).parent / "static"
PAGE = 100
MAX_PAGE = 1000
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class OnlyThisPage:
    """Refuses what does not come from this page itself: another site in the same browser can send
    requests to this machine, under a name of its own too, and must see nothing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = headers_of(scope)
        is_link = scope["path"] == "/" and headers.get("sec-fetch-dest") == "document"
        if is_foreign(headers, follows_link=is_link):  # the page itself holds nothing yet
            refused = "this window answers its own page alone, at 127.0.0.1"
        elif scope["method"] not in ("GET", "HEAD"):
            refused = "this window only reads"
        else:
            refused = ""

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(n.encode(), value.encode()) for n, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        answer = Response(refused, 403) if refused else self._app
        await answer(scope, receive, with_headers)


class Readers:
    """Threads that read episodes into the indexes, one for each run that is looked at."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at_work: dict[str, int] = {}

    def read_on(self, view: View) -> int:
        """Has a run's new episodes read in the background; iterations that are missing."""
        with self._lock:
            if view.name in self._at_work:
                return self._at_work[view.name]
            if not (missing := view.index.missing()):
                return 0
            self._at_work[view.name] = len(missing)
        work = functools.partial(self._read, view, missing)
        threading.Thread(target=work, name=f"index {view.name}", daemon=True).start()
        deadline = time.monotonic() + 0.2  # a few files are read at once
        while (left := self._at_work.get(view.name, 0)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return left

    def _read(self, view: View, missing: list[int]) -> None:
        try:
            for number in missing:
                view.index.read(number)
                with self._lock:
                    self._at_work[view.name] -= 1
        except Exception as error:  # the disk is full, the run was deleted
            LOG.warning(f"{view.run.path}: its episodes cannot be indexed: {describe(error)}")
        finally:
            with self._lock:
                del self._at_work[view.name]


class Pages:
    """The answers, as plain data."""

    def __init__(self, library: Library) -> None:
        self.library, self._readers = library, Readers()
        self._tokenizers: weakref.WeakKeyDictionary[View, Tokenizer | None] = (
            weakref.WeakKeyDictionary()
        )

    def runs(self, request: Request) -> Any:
        views = self.library.views()
        summaries = []
        for view in views:
            try:
                summaries.append(view.summary())
            except Exception as error:  # whatever this one holds, the others are shown
                summaries.append(view.broken(describe(error)))
        return {
            "version": __version__,
            "folders": [str(folder) for folder in self.library.folders],
            "runs": summaries,
            "differences": self.library.differences(views),
        }

    def run(self, request: Request) -> Any:
        view = self._view(request)
        left = self._readers.read_on(view)
        return {
            **view.summary(),
            "recipe": view.recipe()[0],
            "result": view.result(),
            "facets": view.index.facets(),
            "unread": left,
            "damaged": view.index.damaged(),
            "numbers": NUMBERS,
        }

    def curves(self, request: Request) -> Any:
        return self._view(request).curves()

    def episodes(self, request: Request) -> Any:
        view = self._view(request)
        left = self._readers.read_on(view)
        query = query_of(dict(request.query_params))
        query = dataclasses.replace(query, limit=min(query.limit, MAX_PAGE))
        total, rows = view.index.find(query)
        return {"total": total, "rows": rows, "unread": left}

    def group(self, request: Request) -> Any:
        view, (iteration, number) = self._view(request), self._place(request)[:2]
        group, known = stored_group(view.run, iteration, number)
        following = Query(
            {"iteration": (iteration, iteration), "group": (number + 1, None)}, limit=0
        )
        is_last = not view.index.missing() and not view.index.find(following)[0]
        return {**group_data(group, known, self._tokenizer(view)), "is_last": is_last}

    def episode(self, request: Request) -> Any:
        view, (iteration, number, attempt) = self._view(request), self._place(request)
        group, known = stored_group(view.run, iteration, number)
        return episode_data(group, known, attempt, self._tokenizer(view))

    def explanation(self, request: Request) -> Any:
        view, place = self._view(request), self._place(request)
        return explain(view.run, "/".join(map(str, place))).as_dict()

    def diagnosis(self, request: Request) -> Any:
        view = self._view(request)
        left = self._readers.read_on(view)
        return {"findings": [f.as_dict() for f in diagnose(view.run, view.index)], "unread": left}

    def _view(self, request: Request) -> View:
        name = request.path_params["run"]
        if (view := self.library.view(name)) is None:
            raise HTTPException(404, f"there is no run {name!r} here")
        return view

    def _place(self, request: Request) -> list[int]:
        """Iteration, group, attempt; those that the path has."""
        names = ("iteration", "group", "attempt")
        return [request.path_params[name] for name in names if name in request.path_params]

    def _tokenizer(self, view: View) -> Tokenizer | None:
        if self._tokenizers.get(view) is None:
            self._tokenizers[view] = tokenizer_of(view.run)
        return self._tokenizers[view]


def query_of(given: dict[str, str]) -> Query:
    """A query from names and texts: ``sort``, ``order``, ``offset``, ``limit``, ``text``,
    ``event``, a figure or part of the reward (a range), a word (exact).

    Raises:
        ConfigError: There is no such name, or a text is no range.
    """
    given = {name: value for name, value in given.items() if value}
    sort = given.pop("sort", "iteration")
    descending = given.pop("order", "descending") != "ascending"
    text, event = given.pop("text", ""), given.pop("event", "")
    try:
        offset, limit = int(given.pop("offset", 0)), int(given.pop("limit", PAGE))
    except ValueError as error:
        raise ConfigError(f"offset and limit are whole numbers: {error}") from error
    equal = {name: given.pop(name) for name in WORDS if name in given}
    ranges = {name: parse_range(value) for name, value in given.items()}
    offset, limit = min(max(0, offset), 1 << 40), min(max(0, limit), 1 << 40)
    return Query(ranges, equal, event, text, sort, descending, offset, limit)


def make_app(library: Library) -> Starlette:
    """The whole application."""
    pages = Pages(library)
    place = "{iteration:int}/{group:int}"
    routes = [
        Route("/api/runs", _answer(pages.runs)),
        # A run's name may hold slashes, so that what is asked of it comes first.
        Route("/api/run/{run:path}", _answer(pages.run)),
        Route("/api/curves/{run:path}", _answer(pages.curves)),
        Route("/api/episodes/{run:path}", _answer(pages.episodes)),
        Route("/api/diagnosis/{run:path}", _answer(pages.diagnosis)),
        Route(f"/api/group/{place}/{{run:path}}", _answer(pages.group)),
        Route(f"/api/episode/{place}/{{attempt:int}}/{{run:path}}", _answer(pages.episode)),
        Route(f"/api/explanation/{place}/{{attempt:int}}/{{run:path}}", _answer(pages.explanation)),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(OnlyThisPage)])


def _answer(make: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that answers with JSON, made in a thread; what cannot be read is told."""

    async def endpoint(request: Request) -> Response:
        status = 200
        try:
            data = await run_in_threadpool(make, request)
        except HTTPException as error:
            status, data = error.status_code, {"error": error.detail}
        except ConfigError as error:
            status, data = 400, {"error": str(error)}
        except Exception as error:  # a file that went away or holds something else
            LOG.warning(f"{request.url.path}: {describe(error)}")
            status, data = 500, {"error": describe(error)}
        headers = {"cache-control": "no-store"}
        return Response(as_json(data), status, headers, media_type="application/json")

    return endpoint
