"""An MCP server that is killed in the middle of a rollout: figures before, during, after.

    python examples/mcp_server.py questions > examples/mcp_questions.jsonl
    python benchmarks/mcp_kill.py --out benchmarks/results/mcp_kill.json

The tiny base plays ``examples/mcp.toml``, 64 episodes a batch; in the third batch the server's
process gets SIGKILL. Once without retries, so that the agent sees what happened, once with one.
"""

import argparse
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from agent_r1.api import Agent
from agent_r1.run.recipe import load_recipe
from agent_r1.tools.mcp.connection import connect
from agent_r1.utils.scope import run_async, scope

EXAMPLE = Path(__file__).parent.parent / "examples"


def batch(agent: Agent, seed: int) -> dict[str, Any]:
    """One rollout of 64 episodes."""
    start = time.perf_counter()
    work = agent.rollout.run(agent.tasks("train")[:64], attempts=1, temperature=1.0, seed=seed)
    episodes = [t for group in run_async(work) for t in group.trajectories]
    events = Counter(event for t in episodes for step in t.steps for event in step.events)
    return {
        "success": sum(t.outcome.success for t in episodes if t.outcome) / len(episodes),
        "calls": sum(len(step.message.tool_calls) for t in episodes for step in t.steps),
        "faults": {name: n for name, n in sorted(events.items()) if name.startswith("fault/")},
        "excluded": sum(t.outcome is None for t in episodes),
        "seconds": time.perf_counter() - start,
    }


def kill_server(after: float) -> None:
    """Kills the process that serves, from a thread, some seconds from now."""

    def work() -> None:
        time.sleep(after)
        for child in psutil.Process().children(recursive=True):
            if "mcp_server.py" in " ".join(child.cmdline()):
                child.kill()

    threading.Thread(target=work, daemon=True).start()


def measure(retries: int) -> dict[str, Any]:
    name = f"facts{retries}"
    server = {"command": [sys.executable, str(EXAMPLE / "mcp_server.py"), "stdio"]}
    overrides = {
        "env.tasks": str(EXAMPLE / "mcp_questions.jsonl"),
        "env.mcp": {name: server},
        "env.failure": {"search": {"retries": retries}},
    }
    recipe, _ = load_recipe(EXAMPLE / "mcp.toml", list(overrides.items()))
    with scope():
        agent = Agent(recipe)
        before = [batch(agent, seed) for seed in (1, 2)]
        kill_server(after=before[-1]["seconds"] / 3)
        during = batch(agent, 3)
        after = [batch(agent, seed) for seed in (4, 5)]
        (connection,) = connect(recipe.env.mcp)
    return {"before": before, "during": during, "after": after, "starts": connection.num_starts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures = {f"retries {retries}": measure(retries) for retries in (0, 1)}
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
