"""The command line, as a user types it."""

import json
import subprocess
import sys

import pytest

from tests.commands import agent_r1

QUICK = [
    "--train.iterations=1",
    "--train.tasks=2",
    "--train.attempts=2",
    "--limits.tokens_per_turn=24",
    "--evaluation.every=1",
    "--evaluation.tasks=3",
    "--evaluation.test_tasks=6",
    "--threads=1",
]


run = agent_r1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = run("train", "hopworld", "--run", folder, *QUICK)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_train_prints_plain_lines_a_table_two_episodes_and_what_next(finished):
    folder, output = finished
    assert "\x1b" not in output
    for expected in (
        "validation success",
        "1/1  success",
        "entropy",
        "tok/s",
        "left 0:00",
        "Before training",
        "After training",
        "category",
        f"curve:        {folder / 'curve.png'}",
        f" eval {folder} --show 3",
    ):
        assert expected in output
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "result.json").read_text())
    assert set(result["before"]) == set(result["after"]) == {"1", "2", "3"}
    assert result["tasks"] == 2
    assert result["seconds"].keys() == {"train", "eval"}


def test_eval_of_a_run_and_of_a_recipe(finished):
    folder, _ = finished
    result = run("eval", folder, "--tasks", 4, "--json")
    figures = json.loads(result.stdout)
    assert figures["total"]["tasks"] == 4
    assert 0 <= figures["total"]["low"] <= figures["total"]["success"] <= figures["total"]["high"]
    result = run("eval", "hopworld", "--tasks", 3, "--show", 1, "--limits.tokens_per_turn", 24)
    assert "[agent]" in result.stdout
    assert "all" in result.stdout
    assert run("eval", folder, "--seed", 1).returncode == 2


def test_export_writes_a_model_folder_once(finished, tmp_path):
    folder, _ = finished
    out = tmp_path / "model"
    result = run("export", folder, out, "--checkpoint", "last", "--json")
    assert json.loads(result.stdout) == {"model": str(out)}
    weights = (folder / "checkpoints" / "last" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == weights
    assert (out / "tokenizer.json").exists()
    again = run("export", folder, out)
    assert again.returncode == 2
    assert "is there already" in again.stderr


def test_train_json_is_json_alone(tmp_path):
    result = run("train", "hopworld", "--run", tmp_path / "run", *QUICK, "--json")
    assert json.loads(result.stdout)["last"]["iteration"] == 1


def test_check_shows_tokens_by_kind_rewards_and_memory():
    result = run("check", "hopworld")
    assert result.returncode == 0, result.stderr
    for expected in (
        "--- observation",
        "--- action",
        "<|im_start|>assistant",
        "'reached'",
        "MiB",
        "deterministic under a seed",
        "recorded, not trained on",
        "its outcome: reward 1, success 1",
    ):
        assert expected in result.stdout
    result = run("check", "hopworld", "--limits.turns", 1, "--limits.tokens", 100, "--json")
    warnings = " ".join(json.loads(result.stdout)["warnings"])
    assert "limits.turns is 1" in warnings
    assert "limits.tokens is 100" in warnings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "hopwrld"], "did you mean 'hopworld'?"),
        (["train"], "train needs a recipe"),
        (["train", "hopworld", "--train.iteratons", "3"], "did you mean 'iterations'?"),
        (["train", "hopworld", "extra"], "unexpected argument 'extra'"),
        (["train", "hopworld", "--resume", "x"], "train needs a recipe"),
        (["train", "--resume", "nowhere"], "nowhere holds no run"),
        (["train", "hopworld", "--model.path", "./none"], "there is no such folder"),
        (["train", "multihop-smollm2"], "env.path = 'data/multihop'"),
        (["check", "no.toml"], "there is no file no.toml"),
        (["check", "hopworld", "--model.path", "/"], "no model can be loaded from there"),
        (["eval", "hopworld", "--tasks", "0"], "must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, arguments, message):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))


def test_help_is_light():
    code = (
        "import sys\nfrom agent_r1.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_options_and_overrides_come_in_any_order(tmp_path):
    quick = ["--train.iterations", "1", "--train.tasks=1", "--train.attempts", "2"]
    more = ["--limits.turns", "1", "--limits.tokens_per_turn", "8", "--evaluation.every", "0"]
    folder = tmp_path / "run"
    words = ["train", *quick, "--json", *more, "hopworld", "--evaluation.test_tasks", "0"]
    done = run("train", *words[1:], "--run", str(folder))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["last"]["iteration"] == 1
    longer = run("train", "--train.iterations", "2", "--resume", str(folder), "--json")
    assert json.loads(longer.stdout)["last"]["iteration"] == 2
    refused = run("train", "--resume", str(folder), "--learner.lr", "1")
    assert refused.returncode == 2
    assert "only --train.iterations may be raised, not learner.lr" in refused.stderr


def test_letters_that_changed_places_are_recognised():
    wrong = run("train", "hopworld", "--algorithm", "gpro")
    assert "did you mean 'grpo'" in wrong.stderr
