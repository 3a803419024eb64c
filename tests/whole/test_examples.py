"""What the README tells people to copy works, and is as short as it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent_r1 import api, check_env
from agent_r1.config.registry import load_object
from agent_r1.errors import RunError
from tests import ROOT
from tests.commands import agent_r1
from tests.servers import openenv_example

EXAMPLES = ROOT / "examples"


def test_an_environment_of_ones_own_in_thirty_lines_trains(tmp_path):
    source = (EXAMPLES / "my_env.py").read_text().split('"""', 2)[2]
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
    env = load_object(f"{EXAMPLES / 'my_env.py'}:Shop", what="env")
    assert check_env(env)
    small = {"threads": 1, "limits.tokens_per_turn": 24}
    result = api.train(EXAMPLES / "my_env.toml", run=tmp_path / "run", overrides=small)
    assert [row["iteration"] for row in result.metrics] == [0, 1, 2]


def test_the_readme_shows_that_very_environment():
    source = (EXAMPLES / "my_env.py").read_text().split('"""', 2)[2].strip()
    assert source in (EXAMPLES.parent / "README.md").read_text()


TOOLS = '''
from agent_r1 import tool

@tool
def double(x: int) -> int:
    """Double a number."""
    return 2 * x

async def reward(task, answer):
    if task.data.get("down"):
        raise OSError("the scorer is down")
    return float(answer == task.answer)
'''


def test_questions_tools_and_a_reward_function_without_a_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_tools.py").write_text(TOOLS)
    rows = [{"id": n, "question": f"twice {n}?", "answer": 2 * n} for n in range(40)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "env": {
            "name": "tools",
            "tasks": "questions.jsonl",
            "tools": ["my_tools.py:double"],
            "reward": "my_tools.py:reward",
        },
        "limits": {"turns": 2, "tokens_per_turn": 8, "tokens": 400},
        "train": {"iterations": 1, "tasks": 2, "attempts": 2},
        "evaluation": {"every": 0},
        "threads": 1,
    }
    from agent_r1.run.recipe import load_recipe
    from agent_r1.tasks import ENVS

    section = load_recipe(recipe)[0].env
    assert check_env(ENVS.resolve("tools"), section)
    assert api.train(recipe, run="run").metrics[-1]["figures"]["success"] == 0.0

    for row in rows:
        row["down"] = True
    Path("down.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["env"]["tasks"] = "down.jsonl"
    with pytest.raises(RunError, match=r"not one of 4 .* OSError: the scorer is down"):
        api.train(recipe, run="run-down")


@pytest.mark.parametrize("name", ["above_median", "OnlyWhatWorked"])
def test_an_algorithm_of_ones_own(tmp_path, name):
    recipe = {
        "env": {"name": "hopworld", "train_hops": [1]},
        "algorithm": f"{EXAMPLES / 'my_algorithm.py'}:{name}",
        "limits": {"turns": 3, "tokens_per_turn": 48, "tokens": 400},
        "train": {"iterations": 1, "tasks": 4, "attempts": 6},
        "learner": {"lr": 1e-4},
        "evaluation": {"every": 0},
        "threads": 1,
    }
    figures = api.train(recipe, run=tmp_path / "run").metrics[-1]["figures"]
    assert figures["updates"] == 1
    assert figures["grad_norm"] > 0


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """What the examples' own words say to start or make first; gives overrides."""
    tmp_path = tmp_path_factory.mktemp("around")
    command = [sys.executable, str(EXAMPLES / "mcp_server.py"), "questions"]
    questions = tmp_path / "questions.jsonl"
    questions.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    with openenv_example() as (_, url):
        yield {"mcp.toml": ["--env.tasks", str(questions)], "openenv.toml": ["--env.url", url]}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_example_recipes_pass_their_check(path, around):
    result = agent_r1("check", path, *around.get(path.name, []), cwd=EXAMPLES.parent)
    assert result.returncode == 0, result.stderr


def test_a_chat_format_of_ones_own_is_checked_and_sampled_with(tmp_path):
    form = f"{EXAMPLES / 'search_tags.py'}:SearchTags"
    said = agent_r1("check", "hopworld", "--renderer", form).stdout
    assert "<search>" in said and "<tool_call>" not in said and "ok: the scorer accepts" in said
    small = {"renderer": form, "train.iterations": 1, "train.tasks": 1, "train.attempts": 2}
    small |= {"evaluation.every": 0, "limits.stop_strings": ["</search>"], "threads": 1}
    assert api.train("hopworld", run=tmp_path / "run", overrides=small).metrics


def test_an_environment_for_real_keeps_its_promises_and_its_recipe_is_taken():
    env = load_object(f"{EXAMPLES / 'plant.py'}:Plant", what="env")
    assert check_env(env)
    recipe, notes = api.load_recipe(EXAMPLES / "plant.toml")
    assert not notes and len(env.tasks(recipe.env, "validation")) == recipe.evaluation.tasks


def test_check_tries_an_estimator_and_names_what_is_wrong_with_it(tmp_path):
    own = f"{EXAMPLES / 'my_algorithm.py'}:above_median"
    said = agent_r1("check", "hopworld", "--algorithm", own).stdout
    assert "above_median: returns 1 0 0 1 become advantages 0.5 -0.5 -0.5 0.5" in said
    bad = tmp_path / "bad.py"
    bad.write_text("from agent_r1 import advantage\n@advantage\ndef short(returns): return [0.0]\n")
    wrong = agent_r1("check", "hopworld", "--algorithm", f"{bad}:short")
    assert "bad.py:short must give 4 finite advantages" in wrong.stderr
    assert "contextlib" not in wrong.stderr
