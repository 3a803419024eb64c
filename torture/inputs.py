"""Recipes, data, environments, run folders and models as nobody should write or find them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from torture.common import ENV, RECIPE, Ended, Tally, cli, forked, numbers, project, scratch

ODD_VALUES = [
    "", "x", "0", "-1", "1e999", "nan", "inf", "true", "[]", "{}", '""', '"x"', "[1, 2]",
    '{ name = "x" }', "99999999999999999999", "1e-320", '"\\ud83d"', '"a\\u0000b"', '"../.."',
    "1979-05-27", "[[[[[[]]]]]]", '"' + "y" * 5000 + '"', "9" * 5000, "0x10", "'''a\nb'''",
]  # fmt: skip
"""What somebody may write behind an equals sign."""
ODD_KEYS = [
    "seed",
    "name",
    "tasks",
    "path",
    "every",
    "lr",
    "kl",
    "loss",
    "",
    "a.b.c",
    '"é"',
    "start",
]
SECTIONS = [
    "model", "limits", "train", "learner", "evaluation", "checkpoint", "env", "algorithm", "credit",
    "engine", "renderer", "model.lora", "algorithm.kl", "env.mcp.x", "env.noise", "nowhere",
]  # fmt: skip
KNOWN = {
    "train": ["iterations", "tasks", "attempts", "temperature", "concurrency", "seconds"],
    "limits": ["turns", "tokens_per_turn", "tokens", "seconds"],
    "learner": ["lr", "warmup", "schedule", "betas", "weight_decay", "max_grad_norm", "epochs",
                "minibatches", "micro_batch_tokens"],
    "evaluation": ["every", "tasks", "test_tasks", "top_p", "top_k"],
    "checkpoint": ["every", "keep", "metric"],
    "model": ["path", "device", "dtype", "lora"],
    "algorithm": ["name", "clip_low", "clip_high", "aggregation", "kl", "entropy_coef"],
    "credit": ["name", "weights", "gamma", "compare"],
    "engine": ["name", "cache_gib", "patience"],
}  # fmt: skip


def recipe_texts() -> st.SearchStrategy[str]:
    """The small recipe with a few things wrong with it."""
    lines = RECIPE.splitlines()
    values = st.one_of(st.sampled_from(ODD_VALUES), st.text(max_size=12).map(json.dumps))

    def keys(section: str) -> st.SearchStrategy[str]:
        return st.sampled_from(KNOWN.get(section, []) + ODD_KEYS)

    added = st.sampled_from(SECTIONS).flatmap(
        lambda name: st.builds(lambda key, value: f"[{name}]\n{key} = {value}", keys(name), values)
    )
    changed = st.builds(lambda index, value: (index, value), st.integers(0, len(lines) - 1), values)

    def apply(
        changes: list[tuple[int, str]], more: list[str], cut: int, noise: str, at: int
    ) -> str:
        text = list(lines)
        for index, value in changes:
            key, equals, _ = text[index].partition(" = ")
            text[index] = f"{key} = {value}" if equals else value
        whole = "\n".join([*text, *more])
        whole = whole[: len(whole) - cut] if cut else whole
        return whole[:at] + noise + whole[at:]

    return st.builds(
        apply,
        st.lists(changed, max_size=2),
        st.lists(added, max_size=2),
        st.one_of(st.just(0), st.integers(0, 200)),
        st.one_of(st.just(""), st.just(""), st.text(max_size=4)),
        st.integers(0, 300),
    )


def _each(strategy: st.SearchStrategy[Any], count: int, number: int, work: Any) -> None:
    """Calls ``work`` with that many examples."""

    @seed(number)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def run(example: Any) -> None:
        work(example)

    run()


def recipes(tally: Tally, count: int, number: int) -> None:
    """What ``check`` says of them."""
    with scratch() as folder:
        recipe = project(folder)
        whole = recipe.read_text()

        def work(text: str) -> None:
            recipe.write_text(
                text.replace("{model}", str(folder / "model")), "utf-8", "surrogatepass"
            )
            ended = cli("check", recipe)
            tally.note("recipes", _screen(ended), text, ended.text)

        _each(recipe_texts(), count, number, work)
        recipe.write_text(whole)
        rng = random.Random(number)
        for _ in range(count // 10):
            key = rng.choice(SECTIONS) + "." + rng.choice(ODD_KEYS + KNOWN["train"])
            words = [f"--{key}", rng.choice(ODD_VALUES).replace("\0", "")]
            ended = cli("check", recipe, *words)
            tally.note("overrides", _screen(ended), words, ended.text)


def _screen(ended: Ended) -> str:
    """A message longer than a screen is none."""
    return "traceback" if ended.verdict == "clear" and len(ended.text) > 4000 else ended.verdict


HOSTILE = {
    "value error": "raise ValueError('no')",
    "key error": "raise KeyError",
    "odd text": "raise RuntimeError('\\ud83d \\x00')",
    "broken str": "raise type('E', (Exception,), {'__str__': lambda s: 1 / 0})()",
    "base exception": "raise type('B', (BaseException,), {})('base')",
    "exit": "import sys; sys.exit(0)",
    "exit words": "raise SystemExit('bye')",
    "generator exit": "raise GeneratorExit",
    "cancelled": "import asyncio; raise asyncio.CancelledError",
    "stop": "raise StopIteration",
    "recursion": "f = lambda f: f(f); f(f)",
    "none": "return None",
    "bytes": "return b'\\xff'",
    "cycle": "a = []; a.append(a); return a",
    "nan": "return float('nan')",
    "object": "return object()",
    "coroutine": "async def c(): return 1\n{indent}return c()",
    "huge": "return 'x' * 3_000_000",
    "surrogate": "return '\\ud83d\\x00'",
    "deep": "a = []\n{indent}for _ in range(9000): a = [a]\n{indent}return a",
    "print": "print('hello'); import os; os.write(1, b'raw')",
    "chdir": "import os; os.chdir('/')",
    "loop": "\n{indent}while True: pass",
    "swallow": "\n{indent}import time\n{indent}while True:\n{indent}    try: time.sleep(0.1)\n"
    "{indent}    except BaseException: pass",
    "memory": "return [0] * 10_000_000",
    "warn": "import warnings; warnings.warn('odd \\ud83d')",
    "chained": "\n{indent}try: 1 / 0\n{indent}except Exception as e: raise OSError(5, 'io') from e",
}
"""Statements for the body of a method of an environment."""
HOOKS = {
    "tasks": ("    @classmethod\n    def tasks(cls, settings, split):\n        {body}\n", 8),
    "start": ("    def start(self):\n        self.said = ''\n        {body}\n", 8),
    "prompt": ("    def prompt(self):\n        {body}\n", 8),
    "reply": ("    def reply(self, message):\n        {body}\n", 8),
    "async reply": ("    async def reply(self, message):\n        {body}\n", 8),
    "interpret": ("    def interpret(self, results):\n        {body}\n", 8),
    "score": ("    def score(self, answer):\n        {body}\n", 8),
    "async score": ("    async def score(self, answer):\n        {body}\n", 8),
    "gold": ("    def gold(self):\n        {body}\n", 8),
    "close": ("    def close(self):\n        {body}\n", 8),
    "init": ("    def __init__(self, settings=None):\n        super().__init__(settings)\n"
             "        {body}\n", 8),
    "tool": ("    @tool(timeout=0.5)\n    def look(self, number: int):\n        '''Look.'''\n"
             "        {body}\n", 8),
    "async tool": ("    @tool(timeout=0.5)\n    async def look(self, number: int):\n"
                   "        '''Look.'''\n        {body}\n", 8),
    "schemas": ("    @property\n    def schemas(self):\n        {body}\n", 8),
}  # fmt: skip
CALLS = """
    def prompt(self):
        from agent_r1.types import Message
        return [Message("user", "look")]

    async def step(self, message):
        from agent_r1.types import ToolCall
        import dataclasses
        if not message.tool_calls and not getattr(self, "_looked", False):
            self._looked = True
            message = dataclasses.replace(message, tool_calls=(ToolCall("look", {"number": 1}),))
        return await super().step(message)
"""
"""Has the tool called whatever the agent says."""


def environments(tally: Tally, count: int, number: int) -> None:
    """One hostile statement in one method; a run that ends well must have scored what it shows."""
    # What tasks() takes as long as it likes is the user's to interrupt: data may be large.
    cases = [(h, w) for h in HOOKS for w in HOSTILE if h != "tasks" or w not in ("loop", "swallow")]
    random.Random(number).shuffle(cases)
    with scratch() as folder:
        for case, (hook, what) in enumerate(cases[:count]):
            text, width = HOOKS[hook]
            body = HOSTILE[what].replace("{indent}", " " * width)
            env = ENV + (CALLS if hook != "prompt" else "") + text.replace("{body}", body)
            recipe = project(folder, env)
            command = "check" if case % 3 == 0 else "train"
            run = ["--run", folder / f"run{case}"] if command == "train" else []
            few = ["--train.iterations", "1", "--limits.seconds", "1.0"]
            ended = cli(command, recipe, *few, *run, seconds=90)
            verdict = _screen(ended)
            if command == "train" and verdict == "accepted":
                verdict = _scored(folder / f"run{case}")
            tally.note("environments", verdict, [hook, what, command], ended.text)


def _scored(run: Path) -> str:
    """Whether a finished run has figures for each iteration."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return "silent"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    done = [row for row in rows if row["iteration"]]
    return (
        "accepted" if done and all(r["figures"]["success"] is not None for r in done) else "silent"
    )


DAMAGE = {
    "delete": lambda path, rng: path.unlink(),
    "empty": lambda path, rng: path.write_bytes(b""),
    "cut": lambda path, rng: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flip": lambda path, rng: _flip(path, rng),
    "zeros": lambda path, rng: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path, rng: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "list": lambda path, rng: path.write_text("[1, 2, 3]\n"),
    "folder": lambda path, rng: (path.unlink(), path.mkdir()),
    "garbage": lambda path, rng: path.write_bytes(rng.randbytes(300)),
    "deep": lambda path, rng: path.write_text("[" * 50_000),
}


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))


def run_folders(tally: Tally, count: int, number: int) -> None:
    """A finished run with one file damaged. What is shown or gone on with must be what it was."""
    rng = random.Random(number)
    with scratch() as folder:
        recipe = project(folder / "p")
        whole = folder / "whole"
        ended = cli("train", recipe, "--run", whole, "--evaluation.every", 1)
        assert ended.code == 0, ended.text
        longer = folder / "longer"
        shutil.copytree(whole, longer, symlinks=True)
        ended = cli("train", "--resume", longer, "--train.iterations", 4)
        assert ended.code == 0, ended.text
        expected = numbers(longer)
        shown = {
            "explain": ("explain", whole),
            "eval": ("eval", whole, "--json", "--tasks", 2),
        }
        good = {name: _figures(cli(*words).text, name) for name, words in shown.items()}
        files = sorted(
            p.relative_to(whole) for p in whole.rglob("*")
            if p.is_file() and not any(q.is_symlink() for q in (p, *p.parents))
            and p.name not in (".lock", "curve.png")
        )  # fmt: skip
        for _ in range(count):
            name, damage = rng.choice(files), rng.choice([*DAMAGE])
            command = rng.choice(["explain", "eval", "resume", "export"])
            run = folder / "run"
            shutil.rmtree(run, ignore_errors=True)
            shutil.rmtree(folder / "out", ignore_errors=True)
            shutil.copytree(whole, run, symlinks=True)
            DAMAGE[damage](run / name, rng)
            case = [str(name), damage, command]
            if command == "resume":
                ended = cli("train", "--resume", run, "--train.iterations", 4)
            elif command == "export":
                ended = cli("export", run, folder / "out")
            else:
                words = [run if word == whole else word for word in shown[command]]
                ended = cli(*words)
            verdict = _screen(ended)
            if verdict == "accepted" and command == "resume":
                # What went before is not read again, but for its place.
                told = name.name == "recipe.json" and "recipe.json" in ended.text
                told |= name.name == "metrics.jsonl" and "metrics.jsonl is not" in ended.text
                told |= name.parts[0] == "trajectories"
                same = _same_or_none(run, expected)
                verdict = "accepted" if same or told else "silent"
            elif verdict == "accepted" and command in good:
                same = _figures(ended.text, command) == good[command]
                verdict = "accepted" if same else "silent"
            tally.note("run folders", verdict, case, ended.text)


def _same_or_none(run: Path, expected: Any) -> bool:
    try:
        return bool(numbers(run) == expected)
    except Exception:
        return False


def _figures(text: str, command: str) -> Any:
    """What a command says, less what may differ: times, and the folder's name."""
    if command != "eval":
        return text
    line = next((line for line in text.splitlines() if line.startswith("{")), "{}")
    figures = json.loads(line)
    return {k: v for k, v in figures.items() if "seconds" not in k and k != "run"}


def models(tally: Tally, count: int, number: int) -> None:
    """A model's folder with one file damaged, evaluated; figures must be those of the whole."""
    rng = random.Random(number)
    with scratch() as folder:
        recipe = project(folder)
        model, kept = folder / "model", folder / "kept"
        model.rename(kept)
        files = sorted(path.name for path in kept.iterdir())
        for _ in range(count):
            shutil.rmtree(model, ignore_errors=True)
            shutil.copytree(kept, model)
            name, damage = rng.choice(files), rng.choice([*DAMAGE])
            DAMAGE[damage](model / name, rng)
            ended = cli("check" if rng.random() < 0.3 else "eval", recipe)
            tally.note("models", _screen(ended), [name, damage], ended.text)


ROWS = [
    b'{"id": "a", "question": "q?", "answer": "x", "supporting_titles": ["T"]}',
    b'{"question": "q?", "answers": ["x", "y"]}',
    b'{"question": "q?", "answer": null}', b'{"question": 3, "answer": "x"}', b"[1]", b"", b"{",
    b'{"question": "\\ud83d", "answer": "x"}', b'{"question": "\xff", "answer": "x"}', b"null",
    b'{"question": "q\\u0000", "answer": ""}', b'{"question": "q", "answer": {"a": 1}}',
    b'{"question": "' + b"z" * 200_000 + b'", "answer": "x"}', b"\xef\xbb\xbf{}", b'"text"',
    b'{"id": "a", "question": "other", "answer": "x"}', b'{"question": "q", "answer": NaN}',
    b"[" * 5000, b'{"question": "q", "answer": "x", "sql": "SELECT"}', b"\x00\x00\x00",
    b'{"title": "T", "text": "words"}', b'{"contents": "T\\nwords"}', b'{"title": 1, "text": null}',
]  # fmt: skip


def data(tally: Tally, count: int, number: int) -> None:
    """Questions, passages and databases in files."""
    rng = random.Random(number)
    with scratch() as folder:
        project(folder)
        (folder / "tools.py").write_text(
            "from agent_r1 import tool\n\n@tool\ndef look(x: str) -> str:\n    '''Look.'''\n"
            "    return x\n"
        )
        for _ in range(count):
            names = ["q.jsonl", "p.jsonl"]
            for name in names:
                rows = [ROWS[0].replace(b'"a"', b'"%d"' % n) for n in range(12)]
                if name == "p.jsonl":
                    rows = [b'{"title": "T%d", "text": "words %d"}' % (n, n) for n in range(12)]
                for _ in range(rng.randint(1, 3)):
                    rows[rng.randrange(12)] = rng.choice(ROWS)
                (folder / name).write_bytes(b"\n".join(rows))
            if rng.random() < 0.2:
                (folder / "q.jsonl").write_bytes(
                    rng.choice([b"", b"\n", rng.randbytes(200), b"[]"])
                )
            kind = rng.choice(["tools", "multihop", "database"])
            bad_rows = rng.choice(["error", "skip", "leave out"])
            env = {
                "tools": f'name = "tools"\ntools = ["{folder}/tools.py:look"]\n'
                f'tasks = "{folder}/q.jsonl"',
                "multihop": f'name = "multihop"\nquestions = "{folder}/q.jsonl"\n'
                f'corpus = "{folder}/p.jsonl"',
                "database": f'name = "database"\npath = "{folder}/db.sql"\n'
                f'questions = "{folder}/q.jsonl"',
            }[kind]
            (folder / "db.sql").write_text(
                rng.choice(["CREATE TABLE t (a);", "CREATE", "", "ATTACH '/tmp/x' AS y;", "\x00"])
            )
            if rng.random() < 0.3:
                env += f'\nbad_rows = "{bad_rows}"'
            text = RECIPE.replace('env = "tiny.py:Tiny"', 'renderer = "chatml"')
            text = text.replace("{model}", str(folder / "model")) + f"\n[env]\n{env}\n"
            (folder / "recipe.toml").write_text(text)
            ended = cli("check", folder / "recipe.toml")
            stored = {name: (folder / name).read_bytes()[:3000].decode("latin-1") for name in names}
            verdict = _screen(ended)
            tally.note("data", verdict, [kind, env, stored], ended.text)


def texts(tally: Tally, count: int, number: int) -> None:
    """What a model may write, read by every format; an answer or a call, and nothing raised."""
    pieces = [
        "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', "{", "}", "[" * 300, "\\u",
        '"name"', "<|python_tag|>", "<think>", "</think>", '{"name": "f", "parameters": {"a": 1}}',
        "\n", "é\ud83d", "\x00", "null", ";", ",", '"', "9" * 400, '{"a": ' * 200,
    ]  # fmt: skip
    rng = random.Random(number)
    cases = ["".join(rng.choices(pieces, k=rng.randint(0, 12))) for _ in range(count)]

    def work() -> int:
        from agent_r1.render.calls import parse_hermes, parse_llama3
        from agent_r1.types import Message

        for text in cases:
            for parse in (parse_hermes, parse_llama3):
                assert isinstance(parse(text), Message), text
        return 0

    ended = forked(work)
    for text in cases:
        tally.note("texts", ended.verdict, text if ended.code else None, ended.text)
