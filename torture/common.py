"""One case in a process of its own, how it ended, and the tally of all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Verdict = str
VERDICTS = ("clear", "accepted", "traceback", "hang", "silent")
FAULTS = VERDICTS[2:]
SECONDS = 60.0
"""After which a case hangs."""
UNFORESEEN = "(--debug shows more)"
"""Ends the message of an error that nothing but the last net caught."""


@dataclass
class Ended:
    """How a case ended.

    Attributes:
        code: Exit status; negative for a signal, ``None`` if it was stopped for taking too long.
        text: All that it printed.
    """

    code: int | None
    text: str

    @property
    def verdict(self) -> Verdict:
        if self.code is None:
            return "hang"
        if "Traceback (most recent call last)" in self.text or UNFORESEEN in self.text:
            return "traceback"
        if self.code == 0:
            return "accepted"
        return "clear" if self.code in (1, 2) else "traceback"


@dataclass
class Tally:
    """What was tried, by kind."""

    faults_folder: Path
    counts: dict[str, Counter[Verdict]] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)

    def note(self, kind: str, verdict: Verdict, case: Any, text: str = "") -> None:
        """``case``: what reproduces it, as JSON."""
        self.counts.setdefault(kind, Counter())[verdict] += 1
        if verdict not in FAULTS:
            return
        fault = {"kind": kind, "verdict": verdict, "case": case, "text": text[-3000:]}
        self.faults.append(fault)
        self.faults_folder.mkdir(parents=True, exist_ok=True)
        file = self.faults_folder / f"{len(self.faults):03d}-{kind}-{verdict}.json"
        file.write_text(json.dumps(fault, indent=2, default=repr) + "\n")

    def table(self) -> dict[str, dict[str, int]]:
        rows = {
            kind: {v: count[v] for v in VERDICTS} | {"all": count.total()}
            for kind, count in self.counts.items()
        }
        return rows


def forked(work: Callable[[], int | None], seconds: float = SECONDS) -> Ended:
    """Runs ``work`` in a child of this process, which has all libraries loaded already."""
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            code = 70
            try:
                code = work() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        deadline = time.monotonic() + seconds
        status: int | None = None
        while time.monotonic() < deadline:
            pid, status_word = os.waitpid(child, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(status_word)
                break
            time.sleep(0.005)
        _kill_all(child)
        if status is None:
            os.waitpid(child, 0)
        output.seek(0)
        return Ended(status, output.read().decode("utf-8", "replace"))


def _kill_all(session: int) -> None:
    """The child and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def cli(*arguments: Any, seconds: float = SECONDS, cwd: Path | None = None) -> Ended:
    """An ``agent-r1`` command."""

    def work() -> int:
        from agent_r1.cli import main
        from agent_r1.utils import blocked

        blocked.MAX_SECONDS = 2.0  # two minutes are for people
        if cwd is not None:
            os.chdir(cwd)
        return main([str(argument) for argument in arguments])

    return forked(work, seconds)


@contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        yield folder
    finally:
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)


ENV = '''
from agent_r1 import Task, ToolCall, ToolEnv, Transition, tool

class Tiny(ToolEnv):
    """Say the word that the tool tells."""

    system = "Look, then say it."
    reward_parts = ("looked",)

    @classmethod
    def tasks(cls, settings, split):
        return [Task(f"{split}{n}", f"word {n}?", f"w{n}") for n in range(8)]

    @tool
    def look(self, number: int) -> str:
        """Look up a word."""
        return f"w{number}"

    def gold(self):
        yield ToolCall("look", {"number": 1})
        yield self.task.answer

    def interpret(self, results):
        return self.show(results, looked=0.1)

    def start(self):
        self.said = ""

    def reply(self, message):
        self.said = message.content  # of a tiny model all is cut short
        return Transition(done=True)

    def score(self, answer):
        return float(answer == self.task.answer) + (sum(map(ord, self.said)) % 5) / 10
'''

RECIPE = """\
env = "tiny.py:Tiny"
threads = 1

[model]
path = "{model}"

[limits]
turns = 2
tokens_per_turn = 6
tokens = 400
seconds = 2.0

[train]
iterations = 3
tasks = 2
attempts = 2

[evaluation]
every = 2
tasks = 2
"""


def tiny_model(folder: Path) -> Path:
    """A random model of one thin layer with the tokenizer of the package's own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    from agent_r1.model.places import OURS

    base = OURS["hopworld-base"]()
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def project(folder: Path, env: str = ENV, recipe: str = RECIPE) -> Path:
    """A folder with an environment, a model and a recipe; the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not model.exists():
        tiny_model(model)
    (folder / "tiny.py").write_text(env)
    (folder / "recipe.toml").write_text(recipe.replace("{model}", str(model)))
    return folder / "recipe.toml"


def numbers(run: Path) -> Any:
    """What must be the same however often a run was stopped: metrics and trajectories less times,
    and the last weights.
    """
    import dataclasses

    from agent_r1.model.checkpoint_folder import model_folder
    from agent_r1.run.folder import RunFolder

    def untimed(data: Any) -> Any:
        if isinstance(data, dict):
            out = (
                "seconds",
                "tokens_per_second",
                "memory_gib",
                "advice",
            )  # advice names the folder
            return {k: untimed(v) for k, v in data.items() if not any(word in k for word in out)}
        return [untimed(item) for item in data] if isinstance(data, list) else data

    folder = RunFolder(run)
    rows = folder.metrics()
    episodes = [
        untimed(dataclasses.asdict(group))
        for row in rows[1:]
        for group in folder.trajectories(row["iteration"])
    ]
    weights = (model_folder(run, "last") / "model.safetensors").read_bytes()
    return [untimed(row) for row in rows], episodes, weights
