"""The gateway under load: agents at once that think for seconds between their turns. How long does
the gateway itself take for a request, what does an open episode weigh, how idle is the engine?

    python benchmarks/gateway.py                     # 256 agents; two minutes
    python benchmarks/gateway.py --agents 16         # a small part of it
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil
from first_light import machine

from agent_r1.gateway.agent import AgentEnv
from agent_r1.gateway.server import Gateway
from agent_r1.model.load import load_policy
from agent_r1.model.settings import ModelSettings
from agent_r1.render.chatml import ChatML
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.native.engine import NativeEngine
from agent_r1.rollout.rollout import Rollout
from agent_r1.types import Task
from agent_r1.utils.scope import scope

TURNS = 8
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the facts.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    },
}


def tasks(split: str) -> list[Task]:
    return [Task(f"{split}-{n}", f"Who is the rival of number {n}?") for n in range(4096)]


async def run(task: Task, base_url: str, api_key: str) -> float:
    """Eight turns, each after a thought of two seconds in the median; long contexts."""
    rng = random.Random(task.id)
    head = {"authorization": f"Bearer {api_key}"}
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"{task.question} " * 20}]
    async with httpx.AsyncClient(headers=head, timeout=600, verify=False, trust_env=False) as http:
        for _ in range(TURNS):
            await asyncio.sleep(min(rng.lognormvariate(0.7, 0.8), 20))
            body = {"messages": messages, "tools": [SEARCH]}
            reply = (await http.post(f"{base_url}/chat/completions", json=body)).json()
            said = reply["choices"][0]["message"]
            messages += [said, {"role": "user", "content": "Look again, and say why. " * 6}]
    return 1.0


class Watched(Gateway):
    """Notes how long each request took, and how much of that was the gateway's own."""

    whole: ClassVar[list[float]] = []
    own: ClassVar[list[float]] = []
    most_memory = 0

    async def _speak(self, request: Any) -> Any:
        session: Any = self._session_of(request)
        start = time.perf_counter()
        answer = await super()._speak(request)
        seconds = time.perf_counter() - start
        self.whole.append(seconds)
        self.own.append(seconds - session.conversation.trajectory.steps[-1].generate_seconds)
        Watched.most_memory = max(Watched.most_memory, psutil.Process().memory_info().rss)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--agents", type=int, default=256)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import agent_r1.gateway.agent as module

    module.Gateway = Watched  # type: ignore[misc]
    policy = load_policy(ModelSettings())
    settings = AgentEnv.Settings(run=f"{__file__}:run", tasks=f"{__file__}:tasks")
    engine = NativeEngine(NativeEngine.Settings(), policy)
    limits = Limits(turns=TURNS, tokens_per_turn=32, tokens=2048, seconds=1200)
    rollout = Rollout(
        lambda: AgentEnv(settings),
        engine,
        ChatML(ChatML.Settings(), policy.tokenizer),
        limits,
        concurrency=arguments.agents,
    )
    with scope() as here:
        here.run(rollout.run(tasks("warm")[:4], attempts=1, temperature=1.0, seed=0))
        Watched.whole.clear()
        Watched.own.clear()
        engine.report()
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        groups = here.run(
            rollout.run(tasks("load")[: arguments.agents], attempts=1, temperature=1.0, seed=0)
        )
        seconds, report = time.perf_counter() - start, engine.report()
    steps = [step for group in groups for t in group.trajectories for step in t.steps]
    faults = [t.fault for group in groups for t in group.trajectories if t.fault]
    found = {
        "agents": arguments.agents,
        "turns": len(steps),
        "faults": len(faults),
        "seconds": round(seconds, 1),
        "request_seconds": {
            "p50": statistics.median(Watched.whole),
            "p99": statistics.quantiles(Watched.whole, n=100)[98],
        },
        "gateway_seconds": {
            "p50": statistics.median(Watched.own),
            "p99": statistics.quantiles(Watched.own, n=100)[98],
        },
        "memory_mib_per_episode": (Watched.most_memory - before) / arguments.agents / 2**20,
        "shared_tokens": 1
        - sum(len(s.action.token_ids) + len(s.observation_ids) for s in steps)
        / max(1, sum(_context(t) for g in groups for t in g.trajectories)),
        "engine": {key: value for key, value in report.items() if "seconds" in key},
        **machine(),
    }
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def _context(trajectory: Any) -> int:
    """Tokens that a server without memory would have read: each turn's whole context."""
    total, length = 0, len(trajectory.prompt_ids)
    for step in trajectory.steps:
        length += len(step.action.token_ids)
        total += length
        length += len(step.observation_ids)
    return total


if __name__ == "__main__":
    main()
