"""What the pages show is true: commands of ours are taken by the command line's own parser, recipes
have no key that there is none of, and Python that stands for itself runs. A block that cannot be
checked has a comment above it that says why: ``<!-- not checked: it needs a server -->``.
"""

import re
import shlex
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import agent_r1
from agent_r1.analysis.keys import all_keys
from agent_r1.cli.boundary import _parted
from agent_r1.cli.parser import make_parser
from agent_r1.config.overrides import parse_overrides
from agent_r1.run.recipe import Recipe
from tests import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(<!-- not checked: (?P<why>[^>]+) -->\n+)?^```(?P<kind>\w+)\n(?P<text>.*?)^```", re.M | re.S
)
KEYS = {re.sub(r"\.NAME\b", ".*", key.name) for key in all_keys()}


@dataclass(frozen=True)
class Block:
    page: str
    number: int
    kind: str
    text: str
    why: str | None

    def __str__(self):
        return f"{self.page} {self.kind} {self.number}"


BLOCKS = [
    Block(str(page.relative_to(ROOT)), number, found["kind"], found["text"], found["why"])
    for page in PAGES
    for number, found in enumerate(BLOCK.finditer(page.read_text()), 1)
]


def blocks(*kinds):
    found = [block for block in BLOCKS if block.kind in kinds and block.why is None]
    return pytest.mark.parametrize("block", found, ids=str)


def test_blocks_are_found():
    assert sum(block.kind == "sh" for block in BLOCKS) > 20
    assert sum(block.kind == "toml" for block in BLOCKS) > 10
    assert {block.kind for block in BLOCKS} <= {"sh", "toml", "python", "text"}


@blocks("sh")
def test_commands_are_known(block, capsys):
    for line in re.split(r"\n|&&", block.text.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        if words[:1] != ["agent-r1"]:
            continue
        parser, commands = make_parser()
        own, rest = _parted(words[1:], commands)
        try:
            _, unknown = parser.parse_known_args(own)
        except SystemExit as end:
            assert not end.code, f"{line}\n{capsys.readouterr().err}"
            continue
        assert not unknown, line
        for key, _ in parse_overrides(rest):
            assert is_known(key), f"{line}: {key}"


def is_known(key):
    """Whether some recipe may have a key; below tables of names anything may stand."""
    parts = key.split(".")
    beginnings = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    tables = {k.removesuffix(".name") for k in KEYS if k.endswith(".name")}
    free = {"credit.weights", "env.kwargs", "env.config", "env.reset", "algorithm.require"}
    return (
        key in KEYS | tables
        or any(re.fullmatch(re.escape(k).replace(r"\*", "[^.]+"), key) for k in KEYS if "*" in k)
        or bool(beginnings & free)
        or any(k.startswith(f"{key}.") for k in KEYS)
    )


def flat(table, before=""):
    for name, value in table.items():
        key = f"{before}{name}"
        if isinstance(value, dict):
            yield from flat(value, f"{key}.")
        else:
            yield key


@blocks("toml")
def test_recipes_have_keys_that_exist(block):
    """Keys alone: the environments that the pages name are the reader's own."""
    table = tomllib.loads(block.text)
    if "arm" in table or "recipe" in table or "set" in table or "pair" in table:
        return  # an experiment, whose own test reads it
    for key in flat(table):
        top = key.partition(".")[0]
        assert top in Recipe.model_fields, key
        if not str(table.get("env", "")).find(".py:") >= 0:
            assert is_known(key), key


EXAMPLES = [
    file.read_text()
    for folder in ("examples", "agent_r1/assets/new")
    for file in (ROOT / folder).glob("*.py*")
]
SMALL = {
    "model.path": "hopworld-base",
    "train.iterations": 1,
    "train.tasks": 2,
    "train.attempts": 2,
    "limits.tokens_per_turn": 8,
    "evaluation.every": 0,
    "threads": 1,
}


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    return agent_r1.train("hopworld", run=tmp_path_factory.mktemp("runs") / "one", overrides=SMALL)


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.kind == "python"}))
def test_python_runs(page, a_run, tmp_path, monkeypatch):
    """Each block by itself, in a folder with runs of the names that the pages use; trainings at a
    smaller size; environments are checked. Parts of an example are run by the example's test.
    """
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    for name in ("quickstart", "mine"):
        shutil.copytree(a_run.run.path, f"runs/{name}", symlinks=True)
    train = agent_r1.train

    def smaller(recipe, run=None, overrides=None):
        assert all(is_known(key) for key in overrides or {}), overrides
        return train(recipe, run=run, overrides=SMALL)

    monkeypatch.setattr(agent_r1, "train", smaller)
    for block in BLOCKS:
        if (block.page, block.kind, block.why) != (page, "python", None):
            continue
        if any(block.text.rstrip() in example for example in EXAMPLES):
            continue
        module = ModuleType("a_block")
        exec(compile(block.text, str(block), "exec"), vars(module))
        for value in vars(module).values():
            is_own = isinstance(value, type) and value.__module__ == "a_block"
            if is_own and "gold" in vars(value):
                assert agent_r1.check_env(value)
