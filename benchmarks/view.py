"""How fast the window answers on a run of 20,000 episodes: seconds of the first look (the page and
the list of runs, before anything is indexed), of reading all episodes into the index, of filters
afterwards, and the memory of the server.

    python benchmarks/view.py [--episodes 20000] [--out benchmarks/results/view.json]
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

import agent_r1
from agent_r1.run.folder import RunFolder
from agent_r1.types import Action, CallResult, Estimates, Group, Message, Step, ToolCall

QUERIES = {
    "the first page": "",
    "by iteration": "iteration=100..110",
    "not solved": "success=0",
    "by stop": "stop=max_turns",
    "by event": "event=mistake/malformed_call",
    "by part of the reward": "part/format=..0.5",
    "by text": "text=amber+fox",
    "sorted by tokens": "sort=tokens",
    "sorted by part of the reward": "sort=part/format&order=ascending",
    "all at once": "success=0&event=mistake&text=amber&turns=3..&sort=reward",
    "the last page": "offset=19900",
}
WORDS = [
    f"{a}{b}" for a in ("amber", "blue", "fox", "pine", "lake") for b in ("", "ly", "er", "ish")
]


def a_run(folder: Path, episodes: int, *, tasks: int = 8, attempts: int = 8) -> RunFolder:
    """A run with episodes of four turns and about 700 tokens, without training."""
    rng = random.Random(0)
    run = RunFolder.create(folder, agent_r1.load_recipe("hopworld")[0])

    def words(count):
        return " ".join(rng.choices(WORDS, k=count))

    def step(last):
        ids = tuple(rng.randrange(500) for _ in range(40))
        call = () if last else (ToolCall("search", {"query": words(3)}),)
        found = words(60)
        return Step(
            Action(
                ids, tuple(-rng.random() for _ in ids), tuple(rng.random() for _ in ids), (), "stop"
            ),
            Message("assistant", words(20), call),
            () if last else (Message("tool", found),),
            () if last else tuple(rng.randrange(500) for _ in range(120)),
            {"format": rng.choice((0.0, 0.5, 1.0))},
            None,
            ("mistake/malformed_call",) if rng.random() < 0.2 else (),
            results=() if last else (CallResult("search", found),),
        )

    iterations = -(-episodes // (tasks * attempts))
    for number in range(1, iterations + 1):
        groups, known = [], Estimates()
        for index in range(tasks):
            trajectories = [
                agent_r1.Trajectory(
                    f"task-{rng.randrange(2000)}",
                    str(rng.randrange(3)),
                    attempt,
                    (Message("system", "Search."), Message("user", words(12))),
                    tuple(range(200)),
                    [step(turn == 3) for turn in range(4)],
                    rng.choice((agent_r1.StopReason.DONE, agent_r1.StopReason.MAX_TURNS)),
                    agent_r1.Outcome(float(rng.random() < 0.5), rng.random() < 0.5),
                )
                for attempt in range(attempts)
            ]
            group = Group(agent_r1.Task("t", "q"), trajectories, index)
            groups.append(group)
            for key, a_step in group.steps():
                known.advantages[key] = tuple(rng.gauss(0, 1) for _ in a_step.action.token_ids)
                known.ratios[key] = (1.0,) * len(a_step.action.token_ids)
        run.write_trajectories(number, groups, known)
        run.append_metrics({"iteration": number, "figures": {"success": rng.random()}})
    return run


def asked(address: str) -> tuple[float, bytes]:
    start = time.perf_counter()
    with urllib.request.urlopen(address) as answer:
        body = answer.read()
    return time.perf_counter() - start, body


def measured(run: RunFolder) -> dict:
    command = [sys.executable, "-P", "-m", "agent_r1.cli", "view", str(run.path), "--no-browser"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(run.path.parent / "cache")}
    server = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        start = time.perf_counter()
        line = server.stdout.readline()
        started = time.perf_counter() - start
        address = "http://" + line.partition("http://")[2].partition("/")[0]
        first = {place: asked(address + place)[0] for place in ("/", "/view.js", "/api/runs")}
        first["the run's page"] = asked(f"{address}/api/run/{run.path.name}")[0]
        first["episodes, the newest first"] = asked(f"{address}/api/episodes/{run.path.name}")[0]
        start = time.perf_counter()
        while json.loads(asked(f"{address}/api/episodes/{run.path.name}?limit=1")[1])["unread"]:
            time.sleep(0.1)
        indexed = time.perf_counter() - start
        filters = {}
        for name, query in QUERIES.items():
            tries = [asked(f"{address}/api/episodes/{run.path.name}?{query}") for _ in range(7)]
            filters[name] = {
                "seconds": round(statistics.median(seconds for seconds, _ in tries), 4),
                "found": json.loads(tries[0][1])["total"],
            }
        middle = run.trajectory_iterations()[len(run.trajectory_iterations()) // 2]
        last = {
            "an episode": asked(f"{address}/api/episode/{middle}/8/8/{run.path.name}")[0],
            "a group": asked(f"{address}/api/group/{middle}/8/{run.path.name}")[0],
            "the diagnosis": asked(f"{address}/api/diagnosis/{run.path.name}")[0],
            "the run's page": asked(f"{address}/api/run/{run.path.name}")[0],
            "the curves": asked(f"{address}/api/curves/{run.path.name}")[0],
        }
        memory = psutil.Process(server.pid).memory_info()
        index = next((run.path.parent / "cache").rglob("index.sqlite"))
        return {
            "seconds until the server listens": round(started, 3),
            "first look, seconds": {name: round(value, 4) for name, value in first.items()},
            "seconds until all episodes are indexed": round(indexed, 2),
            "afterwards, seconds": {name: round(value, 4) for name, value in last.items()},
            "filters": filters,
            "server MiB": round(memory.rss / 2**20, 1),
            "index MiB": round(index.stat().st_size / 2**20, 1),
        }
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--episodes", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = a_run(Path(folder) / "run", given.episodes)
        size = sum(f.stat().st_size for f in (run.path / "trajectories").iterdir())
        figures = {"episodes": given.episodes, "trajectories MiB": round(size / 2**20, 1)}
        figures |= {"cores": os.cpu_count(), "machine": processor(), **measured(run)}
    text = json.dumps(figures, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")


if __name__ == "__main__":
    main()
