"""Servers that fail, lie, hang and come back: between the engine and a real server stands a proxy
that spoils answers. No action is ever wrong, and every fault is a figure.
"""

import asyncio
import errno
import functools

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent_r1.errors import ConfigError, RunError
from agent_r1.render.chatml import ChatML
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.remote.fleet import Fleet
from agent_r1.rollout.remote.server import free_port
from agent_r1.rollout.remote.vllm import VLLMEngine, VLLMWire
from agent_r1.rollout.remote.weights import WeightFolders
from agent_r1.rollout.rollout import Rollout
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.types import StopReason
from tests.rollout.remote.policies import changed, check, played
from tests.rollout.remote.serving import InThread

PROMPT = list(range(5, 60))
SHORT = Sampling(30, (), temperature=0.8)
LONG = Sampling(400, (), temperature=0.8)
GENERATE = "/inference/v1/generate"


class Proxy(InThread):
    """Passes everything on; ``faults`` holds, by path, what spoils the next answers."""

    def __init__(self, behind):
        self.behind, self.faults, self.seen = behind, {}, []
        routes = [Route("/{path:path}", self.pass_on, methods=["GET", "POST"])]
        super().__init__(Starlette(routes=routes))

    async def pass_on(self, request):
        path = request.url.path
        self.seen.append(path)
        async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
            url = self.behind + path + (f"?{request.url.query}" if request.url.query else "")
            content = await request.body()
            answer = await client.request(request.method, url, content=content)
        waiting = self.faults.get(path)
        if waiting:
            return await waiting.pop(0)(answer)
        return Response(answer.content, answer.status_code)


@pytest.fixture
def proxy(served):
    with Proxy(served) as proxy:
        yield proxy


def status(code, headers=None, text="no"):
    async def spoil(answer):
        return Response(text, code, headers)

    return spoil


def choice(**changes):
    """The answer with some parts of its choice replaced; a function gets the old part."""

    async def spoil(answer):
        said = answer.json()
        part = said["choices"][0]
        for name, value in changes.items():
            part[name] = value(part[name]) if callable(value) else value
        return JSONResponse(said)

    return spoil


def model(**changes):
    async def spoil(answer):
        said = answer.json()
        said["vllm_config"]["model_config"] |= changes
        return JSONResponse(said)

    return spoil


async def half(answer):
    return Response(answer.content[: len(answer.content) // 2])


async def slow(answer):
    await asyncio.sleep(5)
    return Response(answer.content)


async def hang(answer):
    await asyncio.sleep(12)
    return Response(answer.content)


def renamed(spans):
    return [{**span, "version": "default"} for span in spans]


def cut(spans):
    return [{**span, "end": span["end"] - 1} for span in spans]


def engine_of(proxy, policy, **settings):
    return VLLMEngine(VLLMEngine.Settings(urls=(proxy.address,), **settings), policy)


FAULTS = {
    "status 500": status(500),
    "status 429": status(429, {"retry-after": "1"}),
    "status 503": status(503),
    "not JSON": status(200, text="<html>"),
    "half a body": half,
    "nothing": status(200, text=""),
    "one token too few": choice(token_ids=lambda ids: ids[:-1]),
    "cut in the middle": choice(
        token_ids=lambda ids: ids[:5],
        logprobs=lambda said: {"content": said["content"][:5]},
        weight_versions=[{"version": "1", "start": 0, "end": 5}],
    ),
    "a token that does not exist": choice(token_ids=lambda ids: [*ids[:-1], 10**6]),
    "a token that is no number": choice(token_ids=lambda ids: [*ids[:-1], "5"]),
    "no log-probabilities": choice(logprobs=None),
    "a log-probability above 0": choice(
        logprobs=lambda said: {"content": [{"logprob": 0.5}, *said["content"][1:]]}
    ),
    "minus infinity": choice(
        logprobs=lambda said: {"content": [{"logprob": -9999.0}, *said["content"][1:]]}
    ),
    "no versions": choice(weight_versions=None),
    "versions that end too early": choice(weight_versions=cut),
    "weights that nobody gave": choice(weight_versions=renamed),
    "given up": choice(finish_reason="abort", token_ids=[], logprobs={"content": []}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_answer_is_asked_for_again(proxy, base_policy, name):
    engine = engine_of(proxy, base_policy)

    async def scenario(engine):
        right = await engine.session().generate(PROMPT, SHORT, 7)
        proxy.faults[GENERATE] = [FAULTS[name]]
        again = await engine.session().generate(PROMPT, SHORT, 7)
        figures = engine.report()
        return right, again, figures, [*engine.advice({**figures, "repairs": 1.0}, 1.0)]

    right, again, figures, advice = played(engine, scenario)
    assert again == right
    check([base_policy], PROMPT, again, 0.8)
    assert figures["requests"] == 2 and figures["repeated"] == 1
    assert proxy.address in advice[0]


def test_a_server_that_fails_again_and_again_gets_the_weights_anew(proxy, base_policy):
    engine = engine_of(proxy, base_policy)

    async def scenario(engine):
        proxy.faults[GENERATE] = [status(500)] * 3
        proxy.seen.clear()
        action = await engine.session().generate(PROMPT, SHORT, 7)
        return action, engine.report()

    action, figures = played(engine, scenario)
    check([base_policy], PROMPT, action, 0.8)
    assert figures["repeated"] == 3 and figures["repairs"] == 1
    assert "/collective_rpc" in proxy.seen


def test_a_server_that_hangs_is_left_and_comes_back(proxy, base_policy):
    engine = engine_of(proxy, base_policy, timeout=5.0)

    async def scenario(engine):
        proxy.faults[GENERATE] = [hang]
        action = await engine.session().generate(PROMPT, SHORT, 7)
        return action, engine.report()

    action, figures = played(engine, scenario)
    check([base_policy], PROMPT, action, 0.8)
    assert figures["repeated"] == figures["repairs"] == 1


def test_new_weights_that_did_not_arrive_are_given_again(proxy, base_policy):
    policies = [base_policy, changed(1.02)]
    engine = engine_of(proxy, base_policy)

    async def scenario(engine):
        proxy.faults["/collective_rpc"] = [status(500)]
        await engine.sync(policies[1], 1)
        action = await engine.session().generate(PROMPT, SHORT, 7)
        return action, engine.report()

    action, figures = played(engine, scenario)
    check(policies, PROMPT, action, 0.8)
    assert [span.version for span in action.versions] == [1]
    assert figures["repairs"] == 1


def test_a_full_disk_leaves_the_old_weights_and_in_the_end_is_an_error(
    proxy, base_policy, monkeypatch
):
    engine = engine_of(proxy, base_policy)
    new = changed(1.02)

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(new, "save", full)

    async def scenario(engine):
        await engine.sync(new, 1)
        action = await engine.session().generate(PROMPT, SHORT, 7)
        figures = engine.report()
        await engine.sync(new, 2)
        with pytest.raises(RunError, match=r"3 times in a row: .*No space left"):
            await engine.sync(new, 3)
        return action, figures

    action, figures = played(engine, scenario)
    check([base_policy], PROMPT, action, 0.8)
    assert [span.version for span in action.versions] == [0]
    assert figures["failed_syncs"] == 1


def test_without_any_server_the_run_ends_and_says_why(proxy, base_policy):
    engine = engine_of(proxy, base_policy, outage=1.5)

    async def scenario(engine):
        proxy.faults["/health"] = [status(500, text="out of order")] * 1000
        proxy.faults[GENERATE] = [status(500, text="CUDA error")] * 1000
        await engine.session().generate(PROMPT, SHORT, 7)

    with pytest.raises(RunError, match=r"no server .* for 1.5 s (.|\n)*CUDA error"):
        played(engine, scenario)


def test_what_a_server_refuses_ends_the_run_at_once(proxy, base_policy):
    async def scenario(engine):
        await engine.session().generate([1] * 5000, SHORT, 7)

    with pytest.raises(RunError, match="refuses: status 400"):
        played(engine_of(proxy, base_policy), scenario)


WRONG = {
    "float32": ("/server_info", model(dtype="bfloat16"), r"--dtype float32"),
    "context": ("/server_info", model(max_model_len=512), r"at most 512 .*--max-model-len 1024"),
    "seed": (GENERATE, None, r"the same seed gives other tokens"),
    "version": (GENERATE, choice(weight_versions=renamed), r"VLLM_SERVER_DEV_MODE"),
    "cut": (GENERATE, choice(token_ids=lambda ids: ids[:9]), r"9 tokens with 64"),
    "model": (
        GENERATE,
        choice(
            logprobs=lambda said: {
                "content": [{"logprob": e["logprob"] - 0.3 * (i % 2)} for i, e in
                            enumerate(said["content"])]
            }
        ),
        r"differ .* by 0\.15 .*another model",
    ),
    "truncation": (
        GENERATE,
        choice(
            logprobs=lambda said: {
                "content": [{"logprob": 0.7 * e["logprob"]} for e in said["content"]]
            }
        ),
        r"--generation-config vllm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_proof_at_start_up_names_what_to_change(proxy, base_policy, name):
    path, spoil, message = WRONG[name]
    shuffled = choice(token_ids=lambda ids: ids[::-1])
    proxy.faults[path] = [spoil] * 2 if spoil else [choice(), shuffled]
    engine = engine_of(proxy, base_policy)
    with pytest.raises(ConfigError, match=message):
        played(engine, lambda engine: asyncio.sleep(0))


def test_a_server_that_is_not_there_is_an_error_of_the_recipe(base_policy):
    nowhere = f"http://127.0.0.1:{free_port()}"
    engine = VLLMEngine(VLLMEngine.Settings(urls=(nowhere,), outage=0.5), base_policy)
    with pytest.raises(ConfigError, match=f"does not start: {nowhere}"):
        played(engine, lambda engine: asyncio.sleep(0))


def test_an_action_that_fails_again_and_again_ends_the_run_and_says_why(proxy, base_policy):
    async def scenario(engine):
        proxy.faults[GENERATE] = [status(500, text="poison"), choice()] * 50
        await asyncio.gather(*(engine.session().generate(PROMPT, SHORT, n) for n in range(2)))
        proxy.faults[GENERATE] = [status(500, text="poison")] * 2 * 50
        await engine.session().generate(PROMPT, SHORT, 7)

    with pytest.raises(RunError, match=r"(8 times one action|no server)(.|\n)*poison"):
        played(engine_of(proxy, base_policy, outage=10.0), scenario)


def test_an_episode_whose_time_is_over_while_the_engine_fails_does_not_count(proxy, base_policy):
    engine = engine_of(proxy, base_policy)
    limits = Limits(turns=2, tokens_per_turn=30, tokens=600, seconds=1.5)
    renderer = ChatML(ChatML.Settings(), base_policy.tokenizer)
    settings = HopWorld.Settings()
    rollout = Rollout(functools.partial(HopWorld, settings), engine, renderer, limits)
    tasks = HopWorld.tasks(settings, "train")[:1]

    async def scenario(engine):
        proxy.faults[GENERATE] = [status(429, {"retry-after": "9"})]
        (group,) = await rollout.run(tasks, attempts=1, temperature=1.0, seed=1)
        return group.trajectories[0]

    trajectory = played(engine, scenario)
    assert trajectory.stop is StopReason.FAULT and trajectory.outcome is None
    assert "engine: " in trajectory.fault and "status 429" in trajectory.fault


def test_one_engine_in_two_event_loops(proxy, base_policy):
    engine = engine_of(proxy, base_policy)

    async def sample():
        await engine.start(1024)
        return await engine.session().generate(PROMPT, SHORT, 7)

    assert asyncio.run(sample()) == asyncio.run(sample())


def test_the_time_of_loading_weights_is_not_that_of_requests(proxy, base_policy):
    policies = [base_policy, changed(1.02)]
    engine = engine_of(proxy, base_policy, timeout=60.0)

    async def scenario(engine):
        (server,) = engine._started.result()[0].servers
        proxy.faults["/collective_rpc"] = [slow]
        server._limit = 4.0
        running = asyncio.ensure_future(engine.session().generate(PROMPT, LONG, 7))
        await asyncio.sleep(0.3)
        assert server.asked.total() == 1
        syncing = asyncio.ensure_future(engine.sync(policies[1], 1))
        await asyncio.sleep(0.5)
        late = asyncio.ensure_future(engine.session().generate(PROMPT, SHORT, 7))
        await syncing
        server._limit = 60.0
        check([None, policies[1]], PROMPT, await late, 0.8)
        return await running, engine.report(), server.asked.total()

    action, figures, num_asked = played(engine, scenario, 2048)
    check(policies, PROMPT, action, 0.8)
    assert figures["repeated"] == figures["repairs"] == num_asked == 0
    assert [span.version for span in action.versions] == [0, 1]


def test_adapters_that_nobody_samples_with_are_forgotten(tmp_path):
    """Those of requests that are open are kept: a server may read them again."""
    fleet = Fleet(
        VLLMWire(),
        folders := WeightFolders(str(tmp_path)),
        urls=("http://127.0.0.1:9",),
        launch=lambda number: ("", None),
        count=1,
        outage=1.0,
        timeout=1.0,
        prove=lambda server: None,
        settled=asyncio.Lock(),
        is_learning=lambda: False,
    )
    for version in range(3):
        folders.path(version).mkdir()
    folders.present = 2
    asked = fleet.servers[0].asked
    asked[folders.name(0)], asked[folders.name(1)] = 1, 0
    folders.forget_old(fleet.in_use)
    assert [folders.path(version).exists() for version in range(3)] == [True, False, True]


def test_servers_are_not_to_blame_while_the_learner_is_at_work(proxy, base_policy):
    """A broken one is ready again as soon as it can be proven, however long that takes."""
    engine = engine_of(proxy, base_policy, outage=4.0)

    async def scenario(engine):
        await engine.pause()
        proxy.faults[GENERATE] = [status(500)] * 3
        session = engine.session()
        running = asyncio.ensure_future(session.generate(PROMPT, SHORT, 7))
        await asyncio.sleep(6)
        assert not running.done() and "status 500" in session.outage
        await engine.sync(base_policy, 1)
        return await running

    action = played(engine, scenario)
    check([None, base_policy], PROMPT, action, 0.8)


@pytest.mark.parametrize("url", ["gpu-2:8000", "localhost"])
def test_an_address_is_whole(url):
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        VLLMEngine.Settings(urls=(url,))
