"""Two different runs, one after the other and side by side; what is left after each, as JSON."""

import gc
import json
import os
import sys
import threading
from pathlib import Path

import httpx
import mcp
import torch

import agent_r1
from agent_r1.model.load import load_policy
from agent_r1.model.settings import ModelSettings

HERE = Path(__file__).parent
FOLDER = Path(sys.argv[1])
COMMON = {
    "threads": 1,
    "limits": {"turns": 2, "tokens_per_turn": 8, "tokens": 500},
    "train": {"iterations": 2, "tasks": 2, "attempts": 2},
    "evaluation": {"every": 1, "tasks": 2, "test_tasks": 2},
}
LIBRARY = {
    "name": f"{HERE / 'library.py'}:Library",
    "cassette": {"path": str(FOLDER / "tape.jsonl"), "mode": "record"},
    "mcp": {"toy": {"command": [sys.executable, str(HERE / "server.py")]}},
}
USER = {"name": "model", "model": {"path": "hopworld-base"}, "max_tokens": 4}
ENVS = {"library": LIBRARY, "user": {"name": "hopworld-user", "user": USER}}


def state():
    """Threads, open files and sockets, and child processes by name."""
    gc.collect()
    files = []
    for descriptor in os.listdir("/proc/self/fd"):
        if os.path.exists(link := f"/proc/self/fd/{descriptor}") or os.path.islink(link):
            files.append(os.readlink(link).split(":")[0])
    tasks = Path("/proc/self/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    names = (thread.name for thread in threading.enumerate())
    threads = sorted(name for name in names if name != "tqdm_monitor")  # a progress bar's own
    return {"threads": threads, "files": sorted(files), "children": children}


def train(name, folder):
    result = agent_r1.train(COMMON | {"env": ENVS[name]}, run=FOLDER / folder)
    return [row["figures"] for row in result.metrics[1:]]


def side_by_side():
    found = {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: train(name, f"{name}-side")}))
        for name in ENVS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def main():
    rows = ({"id": word, "contents": f'"{word}"\n{word} text'} for word in ("one", "two"))
    (FOLDER / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert torch and httpx and mcp
    load_policy(ModelSettings(path="hopworld-base"))  # what libraries open once and keep
    states, alone = {"before": state()}, {}
    for name in ENVS:
        alone[name] = train(name, f"{name}-alone")
        states[name] = state()
    together = side_by_side()
    states["side by side"] = state()
    print(json.dumps({"states": states, "alone": alone, "together": together}))


if __name__ == "__main__":
    main()
