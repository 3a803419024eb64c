"""A rollout whose engine is a server that lies, fails and is killed: is an action ever wrong?

    agent-r1 engine install vllm --cpu
    python benchmarks/engine_faults.py --faults 100 --kills 20 \\
        --out benchmarks/results/engine_faults.json

Two parts. First a proxy stands before `agent-r1 engine serve` and spoils answers, another kind each
time; then vLLM's own processes get SIGKILL while they sample. The tiny base plays HopWorld with new
weights before every rollout, and every token's log-probability is computed again by a plain forward
pass of the weights that its span names.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import uvicorn
from first_light import machine
from peers.compare import commit
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent_r1.model.load import load_policy
from agent_r1.model.logprobs import token_logprobs
from agent_r1.model.policy import Policy
from agent_r1.model.settings import ModelSettings
from agent_r1.render.chatml import ChatML
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.remote.server import free_port
from agent_r1.rollout.remote.vllm import VLLMEngine
from agent_r1.rollout.rollout import Rollout
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.types import Group, StopReason
from agent_r1.utils.scope import run_async, scope

GENERATE = "/inference/v1/generate"
LIMITS = Limits(turns=4, tokens_per_turn=64, tokens=1024, seconds=600.0)
TASKS, ATTEMPTS = 4, 4
SHARE = 0.15
"""Of the answers that are spoiled."""


# Faults ------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], tuple[int, bytes]]:
    """A fault that changes the answer's choice."""

    def spoil(content: bytes) -> tuple[int, bytes]:
        said = json.loads(content)
        change(said["choices"][0])
        return 200, json.dumps(said).encode()

    return spoil


def first_entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda choice: choice["logprobs"]["content"][0].update(values)


FAULTS: dict[str, Callable[[bytes], tuple[int, bytes]]] = {
    "status 500": lambda content: (500, b"CUDA error"),
    "status 502": lambda content: (502, b"bad gateway"),
    "status 429": lambda content: (429, b"busy"),
    "half a body": lambda content: (200, content[: len(content) // 2]),
    "no body": lambda content: (200, b""),
    "not JSON": lambda content: (200, b"<html>"),
    "a token less": changed(lambda choice: choice["token_ids"].pop()),
    "a log-probability less": changed(lambda choice: choice["logprobs"]["content"].pop()),
    "a token that does not exist": changed(lambda choice: choice["token_ids"].append(10**7)),
    "a log-probability above 0": changed(first_entry(logprob=0.7)),
    "no log-probability": changed(first_entry(logprob=None)),
    "unknown weights": changed(lambda choice: choice["weight_versions"][0].update(version="x")),
    "no versions": changed(lambda choice: choice.update(weight_versions=None)),
    "versions too short": changed(lambda choice: choice["weight_versions"][-1].update(end=0)),
    "late": lambda content: (200, content),
}
LATE_SECONDS = 4.0
TIMEOUT = 2.0


class Proxy:
    """Passes requests on and spoils some answers while ``rng`` is set, the rarest faults first."""

    def __init__(self, behind: str) -> None:
        self._behind, self.done = behind, Counter[str]()
        self.rng: random.Random | None = None
        self.address = f"http://127.0.0.1:{free_port()}"
        route = Route("/{path:path}", self._pass_on, methods=["GET", "POST"])
        port = int(self.address.rpartition(":")[2])
        config = uvicorn.Config(
            Starlette(routes=[route]), port=port, log_level="critical", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    async def _pass_on(self, request: Request) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
            answer = await client.request(
                request.method,
                self._behind + request.url.path + query,
                content=await request.body(),
            )
        if request.url.path == GENERATE and self.rng and self.rng.random() < SHARE:
            name = min(FAULTS, key=lambda name: self.done[name])
            self.done[name] += 1
            if name == "late":
                await asyncio.sleep(LATE_SECONDS)
            status, content = FAULTS[name](answer.content)
            return Response(content, status)
        return Response(answer.content, answer.status_code)

    def __enter__(self) -> Proxy:
        self._thread.start()
        answers(self.address)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)


def answers(address: str) -> None:
    """Returns when a server answers."""
    for _ in range(600):
        try:
            return urllib.request.urlopen(f"{address}/health", timeout=2).close()
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{address} does not answer")


# Rollouts ----------------------------------------------------------------------------------------


class Checked:
    """Rollouts with an engine, each with new weights, every action checked."""

    def __init__(self, engine: VLLMEngine, policy: Policy) -> None:
        self.engine, self._policies = engine, [policy, other(policy)]
        self._renderer = ChatML(ChatML.Settings(), policy.tokenizer)
        settings = HopWorld.Settings()
        self._tasks = HopWorld.tasks(settings, "train")
        self._rollout = Rollout(
            functools.partial(HopWorld, settings), engine, self._renderer, LIMITS
        )
        self.version, self.figures = 0, Counter[str]()
        self.worst = 0.0

    async def run(self, beside: Callable[[], Awaitable[None]] | None = None) -> None:
        """One rollout, with something that happens meanwhile."""
        if self.version:
            await self.engine.sync(self._policies[self.version % 2], self.version)
        drawn = [self._tasks[(TASKS * self.version + i) % len(self._tasks)] for i in range(TASKS)]
        task = asyncio.ensure_future(beside()) if beside else None
        groups = await self._rollout.run(
            drawn, attempts=ATTEMPTS, temperature=1.0, seed=self.version
        )
        if task:
            await task
        self._check(groups)
        self.figures["rollouts"] += 1
        for name, value in self.engine.report().items():
            self.figures[name] += round(value)
        self.version += 1

    def _check(self, groups: list[Group]) -> None:
        for trajectory in (t for group in groups for t in group.trajectories):
            self.figures["episodes"] += 1
            self.figures["lost episodes"] += trajectory.stop is StopReason.FAULT
            path = list(trajectory.prompt_ids)
            for step in trajectory.steps:
                self.figures["actions"] += 1
                self.figures["wrong actions"] += not self._is_right(path, step.action)
                path += [*step.action.token_ids, *step.observation_ids]

    def _is_right(self, path: list[int], action: Any) -> bool:
        """Whether numbers and versions are what the weights say."""
        ids = torch.tensor([[*path, *action.token_ids]])
        covered = 0
        for version, start, end in action.versions:
            covered += end - start
            with torch.inference_mode():
                logits = self._policies[version % 2].model(ids).logits[0, len(path) - 1 : -1]
            expected = token_logprobs(logits, ids[0, len(path) :], 1.0)[0]
            found = torch.tensor(action.logprobs)
            self.worst = max(self.worst, (found - expected)[start:end].abs().max().item())
            if version != self.version or (found - expected)[start:end].abs().max() > 1e-4:
                return False
        return covered == len(action.token_ids)

    def as_dict(self) -> dict[str, Any]:
        return {**self.figures, "largest log-probability error": self.worst}


def other(policy: Policy) -> Policy:
    """The same model with other weights."""
    made = load_policy(ModelSettings())
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.ndim == 2:
                parameter *= 1.02
    return made


async def with_faults(count: int, policy: Policy) -> dict[str, Any]:
    """Rollouts until so many answers were spoiled."""
    address = f"http://127.0.0.1:{free_port()}"
    serve = [sys.executable, "-m", "agent_r1.cli", "engine", "serve", "hopworld-base"]
    process = subprocess.Popen([*serve, "--port", address.rpartition(":")[2]])
    try:
        await asyncio.to_thread(answers, address)
        with Proxy(address) as proxy:
            engine = VLLMEngine(VLLMEngine.Settings(urls=(proxy.address,), timeout=TIMEOUT), policy)
            await engine.start(LIMITS.tokens)
            proxy.rng = random.Random(0)
            checked = Checked(engine, policy)
            while proxy.done.total() < count:
                await checked.run()
            await engine.close()
            return {"faults": dict(proxy.done), **checked.as_dict()}
    finally:
        process.terminate()
        process.wait(20)


async def with_kills(count: int, policy: Policy) -> dict[str, Any]:
    """Rollouts during each of which the server's processes are killed."""
    engine = VLLMEngine(VLLMEngine.Settings(), policy)
    await engine.start(LIMITS.tokens)
    checked, rng, seconds = Checked(engine, policy), random.Random(0), []

    async def kill() -> None:
        fleet = engine._fleet()
        assert fleet is not None
        before = fleet.num_repairs
        await asyncio.sleep(rng.uniform(0.2, 1.5))
        (server,) = fleet.servers
        assert server.process is not None
        for child in psutil.Process(server.process._keeper.pid).children(recursive=True):
            child.send_signal(signal.SIGKILL)
        start = time.perf_counter()
        while fleet.num_repairs == before:  # also where no action was asked for any more
            await engine.session().generate([5, 6, 7], Sampling(1, ()), 0)
            await asyncio.sleep(0.1)
        seconds.append(time.perf_counter() - start)

    for _ in range(count):
        await checked.run(kill)
    left = [process.pid for process in psutil.Process().children(recursive=True)]
    await engine.close()
    alive = [pid for pid in left if psutil.pid_exists(pid)]
    return {
        "kills": count,
        "seconds until it samples again": sorted(seconds)[len(seconds) // 2],
        "processes left": len(alive),
        **checked.as_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"commit": commit(), "machine": machine()}
    policy = load_policy(ModelSettings())
    for name, work, count in (
        ("spoiled answers", with_faults, arguments.faults),
        ("killed servers", with_kills, arguments.kills),
    ):
        if count:
            with scope():
                report[name] = run_async(work(count, policy))
            print(json.dumps({name: report[name]}, indent=2), flush=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
