"""The gateway's HTTP side, on this machine alone: whose key is known leads an episode."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
import socket
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from agent_r1.errors import ConfigError
from agent_r1.gateway.call import MAX_DEPTH, Call, Dialect, RefusedCallError, depth_of, event
from agent_r1.gateway.dialects.chat import Chat
from agent_r1.gateway.dialects.messages import Messages
from agent_r1.gateway.dialects.responses import Responses
from agent_r1.gateway.session import Asked, ClientSession
from agent_r1.rollout.conversation import Conversation
from agent_r1.utils.local_server import headers_of, is_foreign
from agent_r1.utils.text import describe

MAX_BYTES = 16 * 2**20
"""Largest request."""
PING_SECONDS = 5.0
"""A stream whose turn is being sampled says this often that it lives."""
KEEP_ALIVE_SECONDS = 600
"""An agent may think so long between two calls by the same connection."""
DIALECTS: Mapping[str, tuple[str, Dialect]] = {
    "/v1/chat/completions": ("chat", Chat()),
    "/v1/responses": ("responses", Responses()),
    "/v1/messages": ("messages", Messages()),
}
MODEL = "policy"
"""The one model; requests may call it anything."""


class Listener(Protocol):
    """Who answers the calls of one key; see ``ClientSession``."""

    def ask(self, call: Call, *, dialect: str, name: str, is_repeated: bool) -> Asked: ...

    def count(self, call: Call) -> int: ...

    def reward(self, value: Any, name: str | None, success: Any, metrics: Any) -> None: ...

    async def close(self) -> None: ...


class Gateway:
    """A server that lives as long as the run that uses it.

    Attributes:
        url: Base address for clients, e.g. ``http://127.0.0.1:40123/v1``.
    """

    def __init__(self, port: int = 0) -> None:
        """``port`` 0 takes any that is free."""
        self._sessions: dict[str, Listener] = {}
        try:
            self._socket = socket.create_server(("127.0.0.1", port), backlog=2048)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port {port}: {error}; 0 takes any that is free") from error
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        routes = [Route(path, self._speak, methods=["POST"]) for path in DIALECTS]
        routes += [
            Route(path, self._reward, methods=["POST"]) for path in ("/reward", "/v1/reward")
        ]
        routes.append(Route("/v1/messages/count_tokens", self._count, methods=["POST"]))
        routes.append(Route("/v1/models", self._models))
        app = Starlette(routes=routes, middleware=[Middleware(OnlyThisMachine)])
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Makes the server answer; does nothing if it does."""
        if self._serving is None:
            self._serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._serving.done():
                await self._serving
                raise RuntimeError("the gateway's server has ended")
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        """Ends the server and whatever it is asked for."""
        for session in [*self._sessions.values()]:
            await session.close()
        self._server.should_exit = self._server.force_exit = True
        if self._serving is not None:
            await asyncio.gather(self._serving, return_exceptions=True)
        self._socket.close()

    @contextlib.asynccontextmanager
    async def session(self, conversation: Conversation) -> AsyncIterator[tuple[str, ClientSession]]:
        """A key, and the side of a conversation that its owner leads until the end of this."""
        key = f"r1-{secrets.token_urlsafe(24)}"
        session = ClientSession(conversation)
        self.open(key, session)
        try:
            yield key, session
        finally:
            del self._sessions[_hidden(key)]
            await session.close()

    def open(self, key: str, listener: Listener) -> None:
        """Whoever has the key is heard by the listener."""
        self._sessions[_hidden(key)] = listener

    # Routes ------------------------------------------------------------------------------------

    async def _speak(self, request: Request) -> Response:
        dialect, speaks = DIALECTS[request.url.path]
        try:
            session = self._session_of(request)
            raw = await _body_of(request)
            body = _object_of(raw)
            call = _read(speaks, body)
            key = request.headers.get("idempotency-key")
            asked = session.ask(
                call,
                dialect=dialect,
                name=hashlib.blake2b(raw + f"{request.url.path} {key}".encode()).hexdigest(),
                is_repeated=bool(key) or _count_of_retries(request) > 0,
            )
        except RefusedCallError as error:
            return _refused(error, speaks)
        return await _answered(_Exchange(request, speaks, body, call, asked))

    async def _count(self, request: Request) -> Response:
        dialect = DIALECTS["/v1/messages"][1]
        try:
            session = self._session_of(request)
            body = _object_of(await _body_of(request))
            return JSONResponse({"input_tokens": session.count(_read(dialect, body))})
        except RefusedCallError as error:
            return _refused(error, dialect)

    async def _reward(self, request: Request) -> Response:
        chat = DIALECTS["/v1/chat/completions"][1]
        try:
            session = self._session_of(request)
            body = _object_of(await _body_of(request))
            session.reward(
                body.get("reward"), body.get("name"), body.get("success"), body.get("metrics")
            )
        except RefusedCallError as error:
            return _refused(error, chat)
        return JSONResponse({"ok": True})

    async def _models(self, request: Request) -> Response:
        chat = DIALECTS["/v1/chat/completions"][1]
        try:
            self._session_of(request)
        except RefusedCallError as error:
            return _refused(error, chat)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "agent-r1"}
        return JSONResponse({"object": "list", "data": [model]})

    def _session_of(self, request: Request) -> Listener:
        given = request.headers.get("authorization", "")
        key = given[7:] if given[:7].lower() == "bearer " else request.headers.get("x-api-key", "")
        session = self._sessions.get(_hidden(key.strip()))
        if session is None:
            raise RefusedCallError(
                "no open episode has this key: it is made for each episode and ends with it",
                status=401,
                code="invalid_api_key",
            )
        return session


class OnlyThisMachine:
    """Refuses what a page of another site sends by way of a browser on this machine."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_foreign(headers_of(scope)):
            await Response("the gateway answers programs of this machine alone", 403)(
                scope, receive, send
            )
            return
        await self._app(scope, receive, send)


class _Server(uvicorn.Server):
    """Leaves signals to the program that it is a part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True, slots=True)
class _Exchange:
    """A request that was understood, and the turns that will answer it."""

    request: Request
    dialect: Dialect
    body: dict[str, Any]
    call: Call
    asked: Asked

    def answer(self) -> dict[str, Any]:
        """The answer's JSON; raises ``RefusedCallError`` if there were no turns."""
        if self.asked.turns.cancelled():
            raise RefusedCallError("the episode is over", status=409, code="episode_over")
        return self.dialect.answer(self.body, self.call, self.asked.turns.result())


async def _answered(exchange: _Exchange) -> Response:
    """The response, once the turn is whole, or as a stream that begins before."""
    asked, is_stream = exchange.asked, bool(exchange.body.get("stream"))
    asked.num_listening += 1
    gone = asyncio.ensure_future(_until_gone(exchange.request))
    try:
        awaited: set[asyncio.Future[Any]] = {asked.turns, gone}
        await asyncio.wait(
            awaited,
            timeout=PING_SECONDS if is_stream else None,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if is_stream and not gone.done() and not asked.turns.done():
            asked.num_listening += 1
            return StreamingResponse(_late(exchange), media_type="text/event-stream")
        if not asked.turns.done():
            return Response(status_code=499)  # nobody reads it
        answer = exchange.answer()
    except RefusedCallError as error:
        return _refused(error, exchange.dialect)
    finally:
        gone.cancel()
        asked.leave()
    events = exchange.dialect.events(exchange.body, answer) if is_stream else [json.dumps(answer)]
    kind = "text/event-stream" if is_stream else "application/json"
    return StreamingResponse(_heard(asked, events), media_type=kind)


async def _late(exchange: _Exchange) -> AsyncIterator[str]:
    """A stream whose turn is still being sampled."""
    try:
        while not (await asyncio.wait({exchange.asked.turns}, timeout=PING_SECONDS))[0]:
            yield ": the turn is being sampled\n\n"
        events = exchange.dialect.events(exchange.body, exchange.answer())
        async for text in _heard(exchange.asked, events):
            yield text
    except RefusedCallError as error:
        yield event(exchange.dialect.refusal(error), "error")
    finally:
        exchange.asked.leave()


async def _heard(asked: Asked, texts: Iterable[str]) -> AsyncIterator[str]:
    """The texts of an answer, which a client has heard when it took the last."""
    for text in texts:
        yield text
    asked.is_heard = True


def _hidden(key: str) -> str:
    """A key as it is looked up: the time that takes tells nothing about others."""
    return hmac.new(b"agent-r1", key.encode(), hashlib.sha256).hexdigest()


async def _body_of(request: Request) -> bytes:
    parts, size = [], 0
    stream = request.stream()
    while True:
        try:
            part = await anext(stream)
        except StopAsyncIteration:
            break
        except ClientDisconnect as error:
            raise RefusedCallError("the client has hung up", status=499) from error
        size += len(part)
        if size > MAX_BYTES:
            raise RefusedCallError(
                f"a request has at most {MAX_BYTES:,} bytes", status=413, code="too_large"
            )
        parts.append(part)
    return b"".join(parts)


def _object_of(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RefusedCallError(f"the request is no JSON: {error!s:.200}") from error
    if not isinstance(body, dict):
        raise RefusedCallError("the request must be a JSON object")
    if depth_of(body) > MAX_DEPTH:
        raise RefusedCallError(f"the request is nested deeper than {MAX_DEPTH}")
    return body


def _read(dialect: Dialect, body: dict[str, Any]) -> Call:
    try:
        return dialect.read(body)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"a value of the request has another type than it must have: {describe(error)}"
        raise RefusedCallError(why) from error


def _count_of_retries(request: Request) -> int:
    count = request.headers.get("x-stainless-retry-count", "0")
    return int(count) if count.isdecimal() and len(count) < 9 else 0


async def _until_gone(request: Request) -> None:
    """Returns when the client has hung up; its request has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refused(error: RefusedCallError, dialect: Dialect) -> Response:
    headers = {"x-should-retry": "false"} if error.is_final else {"retry-after": "1"}
    return JSONResponse(dialect.refusal(error), error.status, headers)
