"""The engine ``sglang`` against a server that is strict about SGLang's published interface (0.5.23)
and has the native engine behind it. SGLang itself needs a GPU and was not run.
"""

import asyncio
from typing import Literal

import httpx
import pytest
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent_r1.errors import ConfigError
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.remote.sglang import SGLangEngine
from tests.rollout.remote.policies import (
    adapted,
    changed,
    check,
    played,
    sampled_across,
    sampled_by_each,
)
from tests.rollout.remote.serving import InThread

PROMPT = list(range(5, 60))


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Parameters(Strict):
    """``SamplingParams``: those that an engine for training may set."""

    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    sampling_seed: int | None = None


class Generate(Strict):
    """``GenerateReqInput``, one request."""

    input_ids: list[int]
    sampling_params: Parameters
    return_logprob: bool = False
    stream: bool = False
    lora_path: str | None = None


class Pause(Strict):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class Version(Strict):
    new_version: str
    abort_all_requests: bool = False


class Update(Strict):
    model_path: str
    weight_version: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False


class LoadAdapter(Strict):
    lora_name: str
    lora_path: str
    pinned: bool = False


class UnloadAdapter(Strict):
    lora_name: str


class Double(InThread):
    """Speaks SGLang to the front and vLLM's subset to the native engine's server."""

    def __init__(self, behind):
        self.behind, self.info = behind, {"dtype": "float32", "context_length": 2048}
        self.is_paused, self.fails_to_load, self.tells_versions = False, False, True
        post = {
            "/generate": self.generate,
            "/pause_generation": self.pause,
            "/update_weight_version": self.name,
            "/update_weights_from_disk": self.update,
            "/continue_generation": self.go_on,
            "/load_lora_adapter": self.load_adapter,
            "/unload_lora_adapter": self.unload_adapter,
        }
        routes = [Route(path, self.strict(call), methods=["POST"]) for path, call in post.items()]
        routes += [Route("/health", lambda r: Response()), Route("/get_server_info", self.tell)]
        super().__init__(Starlette(routes=routes))

    def strict(self, call):
        async def answer(request):
            try:
                return await call(await request.json())
            except ValidationError as error:
                return JSONResponse({"error": {"message": str(error)}}, 422)

        return answer

    async def ask(self, path, body=None):
        async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
            return await client.post(self.behind + path, json=body)

    async def tell(self, request):
        return JSONResponse(self.info)

    async def generate(self, body):
        asked = Generate.model_validate(body)
        parameters = asked.sampling_params
        assert parameters.sampling_seed < 2**31 and parameters.top_k == -1
        said = await self.ask(
            "/inference/v1/generate",
            {
                "model": asked.lora_path or "policy",
                "token_ids": asked.input_ids,
                "sampling_params": {
                    "max_tokens": parameters.max_new_tokens,
                    "temperature": parameters.temperature,
                    "stop": parameters.stop,
                    "stop_token_ids": parameters.stop_token_ids,
                    "seed": parameters.sampling_seed,
                },
            },
        )
        if said.status_code == 404:
            message = f"The following requested LoRA adapters are not loaded: {asked.lora_path}"
            return JSONResponse({"error": {"message": message}}, 400)
        choice = said.json()["choices"][0]
        ids = choice["token_ids"]
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        info = {
            "id": "r",
            "finish_reason": {"type": choice["finish_reason"], "length": len(ids)},
            "completion_tokens": len(ids),
            "weight_version": choice["weight_versions"][-1]["version"],
            "output_token_logprobs": [[p, i, None] for p, i in zip(logprobs, ids, strict=True)],
        }
        if self.tells_versions:
            info["weight_versions"] = choice["weight_versions"]
        return JSONResponse({"text": "", "output_ids": ids, "meta_info": info})

    async def pause(self, body):
        assert Pause.model_validate(body).mode == "retract"  # what is cached can be flushed then
        await self.ask("/pause?mode=keep")
        self.is_paused = True
        return JSONResponse({"status": "ok"})

    async def name(self, body):
        await self.ask("/update_weight_version", Version.model_validate(body).model_dump())
        return JSONResponse({"success": True})

    async def update(self, body):
        asked = Update.model_validate(body)
        assert asked.flush_cache and self.is_paused
        if self.fails_to_load:
            self.fails_to_load = False
            return JSONResponse({"success": False, "message": "no such file"})
        kwargs = {"weights_path": asked.model_path}
        await self.ask("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
        await self.ask("/update_weight_version", {"new_version": asked.weight_version})
        return JSONResponse({"success": True, "message": "", "num_paused_requests": 0})

    async def load_adapter(self, body):
        return await self.passed_on("load", LoadAdapter.model_validate(body))

    async def unload_adapter(self, body):
        return await self.passed_on("unload", UnloadAdapter.model_validate(body))

    async def passed_on(self, verb, asked):
        said = await self.ask(f"/v1/{verb}_lora_adapter", asked.model_dump())
        is_done = said.status_code == 200
        told = {"success": is_done, "error_message": "" if is_done else said.text}
        return JSONResponse(told, 200 if is_done else 400)

    async def go_on(self, body):
        await self.ask("/resume")
        self.is_paused = False
        return JSONResponse({"status": "ok"})


@pytest.fixture
def double(served):
    with Double(served) as double:
        yield double


def engine_of(double, policy):
    return SGLangEngine(SGLangEngine.Settings(urls=(double.address,)), policy)


def test_weights_change_under_a_running_action(double, base_policy):
    async def scenario(engine):
        long = Sampling(600, (), temperature=0.8)
        _, given = await sampled_across(engine, PROMPT, long, [base_policy, changed(1.02)])
        words = await engine.session().generate(PROMPT, Sampling(300, (), ("e",)), 5)
        return words, given, engine.report()

    words, given, figures = played(engine_of(double, base_policy), scenario)
    check(given, PROMPT, words)
    assert words.stop == "stop" and figures["repeated"] == 0


def test_weights_that_it_could_not_load_are_given_again(double, base_policy):
    policies = [base_policy, changed(1.02)]

    async def scenario(engine):
        double.fails_to_load = True
        await engine.sync(policies[1], 1)
        action = await engine.session().generate(PROMPT, Sampling(20, ()), 5)
        return action, engine.report()

    action, figures = played(engine_of(double, base_policy), scenario)
    check(policies, PROMPT, action)
    assert [span.version for span in action.versions] == [1] and figures["repairs"] == 1


def test_every_version_of_an_adapter_has_a_name_of_its_own(double):
    policies = adapted(3)
    found, figures, num_adapters = played(engine_of(double, policies[0]), sampled_by_each(policies))
    for action in found:
        check(policies, PROMPT, action, 0.8)
    assert [a.versions[0].version for a in found] == [0, 0, 1, 1, 2, 2]
    assert len({action.token_ids for action in found}) == 3
    assert figures["repeated"] == 0 and num_adapters == 2


def test_an_adapter_that_a_server_has_lost_is_given_again(double):
    policies = adapted(1)

    async def scenario(engine):
        (server,) = engine._started.result()[0].servers
        await server.post("/unload_lora_adapter", {"lora_name": server.adapters[0]}, seconds=10)
        return await engine.session().generate(PROMPT, Sampling(20, ()), 5), engine.report()

    action, figures = played(engine_of(double, policies[0]), scenario)
    check(policies, PROMPT, action)
    assert figures["repairs"] == figures["repeated"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"info": {"dtype": "bfloat16"}}, "--dtype float32"),
        ({"info": {"context_length": 512}}, "--context-length 1024"),
        ({"tells_versions": False}, "does not tell which weights"),
    ],
)
def test_a_wrong_set_up_is_refused(double, base_policy, change, message):
    for name, value in change.items():
        setattr(double, name, value)
    with pytest.raises(ConfigError, match=message):
        played(engine_of(double, base_policy), lambda engine: asyncio.sleep(0))
