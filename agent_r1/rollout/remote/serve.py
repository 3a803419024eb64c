"""The native engine as a server that understands what the engine ``vllm`` says, and that alone.

For models that vLLM does not have, for sampling on another machine, and as the tests' server. There
is no check of who asks: it is for networks that one trusts.
"""

from __future__ import annotations

import asyncio
import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent_r1.errors import ConfigError
from agent_r1.model.load import load_policy
from agent_r1.model.policy import Policy
from agent_r1.model.settings import ModelSettings
from agent_r1.rollout.engine import Sampling, Session
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.padded import PaddedEngine
from agent_r1.rollout.remote.wire import MODEL
from agent_r1.utils.text import describe

MAX_SESSIONS = 512
"""Conversations whose cache is kept; of more, those that were used longest ago are forgotten."""
UNKNOWN = "default"
"""Version of weights that nobody gave a name."""


class RefusedRequestError(Exception):
    """The request cannot be served; the message is the answer."""


class EngineServer:
    """An engine behind HTTP routes, see ``routes``."""

    def __init__(self, model: ModelSettings, policy: Policy) -> None:
        self._model, self._policy = model, policy
        self._engine = _engine_of(policy)
        self._adapters: dict[str, NativeEngine | PaddedEngine] = {}
        self._versions = [UNKNOWN]
        self._new: Policy | None = None
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()
        self._busy: set[tuple[str, str]] = set()
        self._loading = asyncio.Lock()
        self._may_go_on = asyncio.Event()
        self._may_go_on.set()
        self._number = 0

    def routes(self) -> list[Route]:
        return [
            Route("/health", self._health),
            Route("/server_info", self._facts),
            Route("/weight_info", self._version),
            Route("/inference/v1/generate", self._generate, methods=["POST"]),
            Route("/pause", self._pause, methods=["POST"]),
            Route("/resume", self._resume, methods=["POST"]),
            Route("/reset_prefix_cache", self._nothing, methods=["POST"]),
            Route("/collective_rpc", self._load, methods=["POST"]),
            Route("/update_weight_version", self._name, methods=["POST"]),
            Route("/v1/load_lora_adapter", self._load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._unload_adapter, methods=["POST"]),
        ]

    # What it tells -----------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _nothing(self, request: Request) -> Response:
        """Whatever changes weights forgets what was computed with the old ones."""
        return Response()

    async def _facts(self, request: Request) -> Response:
        config = self._policy.base.config
        dtype = str(self._policy.base.dtype).removeprefix("torch.")
        model = {"max_model_len": self._longest, "dtype": dtype, "model_type": config.model_type}
        return JSONResponse({"vllm_config": {"model_config": model}})

    @property
    def _longest(self) -> int | None:
        return getattr(self._policy.base.config, "max_position_embeddings", None)

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"weight_version": self._versions[-1]})

    # Sampling ----------------------------------------------------------------------------------

    async def _generate(self, request: Request) -> Response:
        try:
            body = await request.json()
            prefix, sampling, seed = self._asked(body)
        except (LookupError, TypeError, ValueError, RefusedRequestError) as error:
            return JSONResponse({"error": {"message": describe(error)}}, 400)
        await self._may_go_on.wait()
        adapter, name = body.get("model", MODEL), request.headers.get("x-session-id", "")
        if adapter != MODEL and adapter not in self._adapters:
            return JSONResponse({"error": {"message": f"no model {adapter!r} here"}}, 404)
        try:
            with self._session(adapter, name) as session:
                action = await session.generate(prefix, sampling, seed)
        except Exception as error:  # e.g. weights that are damaged
            return JSONResponse({"error": {"message": describe(error)}}, 500)
        entries = [{"token": f"token_id:{i}"} for i in action.token_ids]
        for entry, logprob in zip(entries, action.logprobs, strict=True):
            entry["logprob"] = logprob  # type: ignore[assignment]
        spans = [
            {"version": self._versions[version], "start": start, "end": end}
            for version, start, end in action.versions
        ]
        choice = {
            "index": 0,
            "token_ids": list(action.token_ids),
            "logprobs": {"content": entries},
            "finish_reason": action.stop,
            "weight_versions": spans,
        }
        return JSONResponse({"choices": [choice]})

    def _asked(self, body: dict[str, Any]) -> tuple[list[int], Sampling, int]:
        """The prefix, how to sample, and the seed."""
        asked, prefix = body["sampling_params"], [int(i) for i in body["token_ids"]]
        size = self._policy.base.config.get_text_config().vocab_size
        if not prefix or not all(0 <= i < size for i in prefix):
            raise RefusedRequestError(f"token_ids: some, each below {size}")
        count = int(asked["max_tokens"])
        if self._longest is not None and len(prefix) + count > self._longest:
            raise RefusedRequestError(
                f"{len(prefix)} tokens and {count} to be sampled are more than {self._longest}"
            )
        sampling = Sampling(
            count,
            tuple(asked.get("stop_token_ids") or ()),
            tuple(asked.get("stop") or ()),
            float(asked.get("temperature", 1.0)),
            float(asked.get("top_p", 1.0)),
            int(asked.get("top_k", 0)),
        )
        return prefix, sampling, int(asked["seed"])

    def _session(self, adapter: str, name: str) -> _Used:
        """The conversation of that name, or a new one for this request alone; the padded engine
        would wait for all that are open.
        """
        self._number += 1
        key, engine = (adapter, name), self._adapters.get(adapter, self._engine)
        if not name or key in self._busy or isinstance(engine, PaddedEngine):
            return _Used(engine.session(self._number), None)
        while len(self._sessions) >= MAX_SESSIONS:
            old = next((n for n in self._sessions if n not in self._busy), None)
            if old is None:
                break
            self._sessions.pop(old).close()
        session = self._sessions.pop(key, None) or engine.session(self._number)
        self._sessions[key] = session
        self._busy.add(key)
        return _Used(session, functools.partial(self._busy.discard, key))

    # Weights -----------------------------------------------------------------------------------

    async def _pause(self, request: Request) -> Response:
        if request.query_params.get("mode") != "keep":
            return JSONResponse({"error": "mode=keep is the only one here"}, 400)
        self._may_go_on.clear()
        if isinstance(self._engine, NativeEngine):  # the other samples actions whole
            await self._engine.pause()
        return Response()

    async def _resume(self, request: Request) -> Response:
        self._may_go_on.set()
        if isinstance(self._engine, NativeEngine):
            self._engine.resume()
        return Response()

    async def _load(self, request: Request) -> Response:
        """Loads weights, which sample from the next name on: between the two there is no moment
        at which a token would have the wrong one.
        """
        body = await request.json()
        if body.get("method") != "reload_weights":
            return JSONResponse({"error": f"no method {body.get('method')!r} here"}, 400)
        path = Path(body["kwargs"]["weights_path"])
        model = self._model.model_copy(update={"path": str(path)})
        async with self._loading:  # one that nobody waits for any more must not come last
            try:
                self._new = await _loaded(model, path)
            except Exception as error:  # a folder that is not whole
                return JSONResponse({"error": {"message": describe(error)}}, 500)
        return JSONResponse({"results": [None]})

    async def _name(self, request: Request) -> Response:
        self._versions.append(str((await request.json())["new_version"]))
        self._policy, self._new = self._new or self._policy, None
        await self._engine.sync(self._policy, len(self._versions) - 1)
        return Response()

    async def _load_adapter(self, request: Request) -> Response:
        """One adapter more, with an engine of its own: requests that name another go on with it."""
        body = await request.json()
        path = Path(body["lora_path"])
        try:
            policy = await _loaded(self._model, path, checkpoint=path)
        except Exception as error:
            return JSONResponse({"error": {"message": describe(error)}}, 500)
        self._forget(body["lora_name"])
        self._adapters[body["lora_name"]] = _engine_of(policy)
        return Response()

    async def _unload_adapter(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if name not in self._adapters:
            return JSONResponse({"error": {"message": f"no adapter {name!r} here"}}, 404)
        self._forget(name)
        return Response()

    def _forget(self, adapter: str) -> None:
        """Forgets an adapter; requests that are at work on it end with it."""
        self._adapters.pop(adapter, None)
        for key in [key for key in self._sessions if key[0] == adapter]:
            del self._sessions[key]


async def _loaded(model: ModelSettings, folder: Path, checkpoint: Path | None = None) -> Policy:
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder} on this machine")
    return await asyncio.to_thread(load_policy, model, checkpoint=checkpoint)


def _engine_of(policy: Policy) -> NativeEngine | PaddedEngine:
    if policy.unpackable is not None:
        return PaddedEngine(PaddedEngine.Settings(), policy)
    # Sessions that think hold nobody up.
    return NativeEngine(NativeEngine.Settings(patience=0.0), policy)


class _Used:
    """A session while one request uses it; without ``done`` it is closed after that."""

    def __init__(self, session: Session, done: functools.partial[None] | None) -> None:
        self._session, self._done = session, done

    def __enter__(self) -> Session:
        return self._session

    def __exit__(self, *_: object) -> None:
        if self._done is None:
            self._session.close()
        else:
            self._done()


def make_app(model: ModelSettings) -> Starlette:
    """The server's application; loads the model."""
    return Starlette(routes=EngineServer(model, load_policy(model)).routes())


def serve(model: ModelSettings, *, host: str, port: int) -> None:
    """Serves a model until Ctrl-C."""
    app = make_app(model)
    print(f"{model.path} at http://{host}:{port} (Ctrl-C ends it)", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", lifespan="off")
