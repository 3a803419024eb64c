"""Every key of a recipe has a meaning, and what the reference says of it is true."""

import ast
import json
import subprocess
import sys

import pytest

from agent_r1 import train
from agent_r1.analysis.keys import all_keys, keys_of, known_metrics, pattern_of
from agent_r1.errors import ConfigError
from agent_r1.run.figures import flat_figures
from agent_r1.run.folder import flat_settings
from agent_r1.run.recipe import SECTIONS, load_recipe, shipped_recipes
from tests import ROOT
from tests.commands import agent_r1


def test_every_key_has_a_meaning():
    assert [key for key in all_keys() if not key.meaning.strip()] == []


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_every_key_of_a_recipe_is_told(recipe):
    names = [key.name for key in all_keys()]
    patterns = {name.replace(".NAME.", ".*.") for name in names}
    for key, _ in flat_settings(load_recipe(recipe)[0].model_dump(mode="json")):
        owners = {key, f"{key}.name", key.rpartition(".")[0], ".".join(key.split(".")[:2])}
        assert owners & (set(names) | patterns), key


def test_every_name_of_a_section_is_told():
    for section, registry in SECTIONS.items():
        (told,) = (key for key in all_keys() if key.name == f"{section}.name")
        assert all(name in told.meaning for name in registry.table)


@pytest.mark.parametrize("name", ["grpo", "ppo", "dapo"])
def test_the_defaults_that_are_told_are_the_real_ones(name):
    told = {key.name: key for key in keys_of(name)}
    section = load_recipe({"env": "hopworld", "algorithm": name})[0].algorithm
    for key, value in section.model_dump().items():
        if f"algorithm.{key}" in told and told[f"algorithm.{key}"].type != "table":
            assert ast.literal_eval(told[f"algorithm.{key}"].default) == value, key
    assert "algorithm.clip_low" in told


def test_a_section_a_name_and_a_key_can_be_asked_for():
    assert {key.name for key in keys_of("train")} >= {"train.iterations", "train.seconds"}
    assert [key.name for key in keys_of("learner.lr")] == ["learner.lr"]
    assert {"env.memory.turns", "env.memory.name"} <= {key.name for key in keys_of("env.memory")}
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        keys_of("trian")


def test_the_command_tells_them():
    told = agent_r1("keys", "train")
    assert told.returncode == 0 and "train.iterations = 100" in told.stdout
    assert "Rounds of rollout and update." in told.stdout
    listed = json.loads(agent_r1("keys", "--json").stdout)
    assert len(listed) == len(all_keys())
    assert "train.iterations 5" in agent_r1("train", "--help").stdout
    assert "agent-r1 keys" in agent_r1("train", "--help").stdout.replace("\n", " ")


def test_the_reference_is_what_the_code_tells():
    """``python scripts/reference.py`` writes it anew."""
    for name in ("keys", "metrics"):
        words = [sys.executable, ROOT / "scripts" / "reference.py", name]
        written = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        assert (ROOT / "docs" / f"{name}.md").read_text() == written


def test_a_metric_can_be_asked_for():
    assert known_metrics("success")[0]["unit"]
    assert known_metrics("stop/max_turns")
    assert pattern_of("process/PART").match("process/format")
    with pytest.raises(ConfigError):
        known_metrics("sucess")
    told = agent_r1("keys", "--metrics", "entropy")
    assert told.returncode == 0 and "nats" in told.stdout


def test_new_writes_an_environment_that_runs(tmp_path):
    made = agent_r1("new", "my-first_shop", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "my-first_shop"
    assert sorted(f.name for f in folder.iterdir()) == ["env.py", "recipe.toml", "test_env.py"]
    assert "class MyFirstShop(ToolEnv)" in (folder / "env.py").read_text()
    checked = agent_r1("check", "recipe.toml", cwd=folder)
    assert checked.returncode == 0 and "ok: deterministic" in checked.stdout, checked.stderr
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    assert subprocess.run(words, cwd=folder).returncode == 0
    small = ("--train.iterations=1", "--train.tasks=2", "--train.attempts=2", "--threads=1")
    quick = (*small, "--evaluation.every=0", "--limits.tokens_per_turn=24")
    warm = agent_r1("sft", "recipe.toml", "--run", "warm", *quick[:2], *quick[3:], cwd=folder)
    assert warm.returncode == 0, warm.stderr
    trained = agent_r1("train", "recipe.toml", "--run", "first", *quick, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    again = agent_r1("new", "my-first_shop", cwd=tmp_path)
    assert again.returncode == 2 and "is there already" in again.stderr
    assert agent_r1("new", "7", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_can_complete(shell, tmp_path):
    script = agent_r1("completion", shell)
    assert script.returncode == 0 and "diagnose" in script.stdout
    if shell == "bash":
        (tmp_path / "c.sh").write_text(script.stdout)
        code = (
            f"source {tmp_path / 'c.sh'}; COMP_WORDS=(agent-r1 dia); COMP_CWORD=1; "
            "_shtab_agent_r1; echo ${COMPREPLY[@]}"
        )
        found = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
        assert found.stdout.split() == ["diagnose"], found.stderr


def test_every_metric_of_a_run_is_told(tmp_path):
    small = {"train.iterations": 1, "train.tasks": 2, "train.attempts": 2, "threads": 1}
    small |= {"evaluation.tasks": 2, "evaluation.every": 1}
    runs = {
        "hopworld-noise": {"algorithm": "ppo", "credit": "outcome"},
        "hopworld": {"algorithm": {"name": "grpo", "kl": {"coef": 0.01}}, "limits.turns": 2},
        "hopworld-user": {"engine": "padded"},
    }
    patterns = [pattern_of(metric["name"]) for metric in known_metrics()]
    for recipe, more in runs.items():
        metrics = train(recipe, run=tmp_path / recipe, overrides=small | more).metrics
        for name in {name for row in metrics for name in flat_figures(row)}:
            assert any(pattern.match(name) for pattern in patterns), name
    for metric in known_metrics():
        assert metric.keys() == {"name", "unit", "meaning", "watch"} and metric["meaning"], metric


def test_a_key_is_found_by_a_part_of_its_name():
    assert {key.name for key in keys_of("lr")} == {"learner.lr"}
    assert "model.lora.rank" in {key.name for key in keys_of("lora.rank")}
    with pytest.raises(ConfigError, match="no section or key 'NAME'"):
        keys_of("NAME")
