"""Experiments: the file, the jobs, the statistics, and a real one end to end."""

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from agent_r1.bench.experiment import load_experiment
from agent_r1.bench.statistics import ratio_of_means, steps_to, trailing_mean, two_level_bootstrap
from agent_r1.bench.tables import speed_tables, write_tables
from agent_r1.bench.worker import set_file
from agent_r1.errors import ConfigError
from tests import ROOT

EXPERIMENTS = ROOT / "experiments"

SMALL = """
recipe = "hopworld"
seeds = [0, 1]

[override]
threads = 1
train = { iterations = 2, tasks = 2, attempts = 2 }
limits = { turns = 2, tokens_per_turn = 32, tokens = 400 }
evaluation = { every = 0, test_tasks = 0 }

[[arm]]
name = "base"
train = false

[[arm]]
name = "RLOO"
override = { algorithm = "rloo" }

[[arm]]
name = "step"
against = "RLOO"
override = { credit = { name = "step", weights = { format = 0.2 } } }

[[set]]
name = "one"
tasks = 6
override = { env.test_hops = [1] }

[[set]]
name = "two, greedy"
tasks = 4
temperature = 0.0
override = { env.test_hops = [2] }
"""


def written(tmp_path, text=SMALL):
    path = tmp_path / "small.toml"
    path.write_text(text)
    return path


def test_jobs_are_arms_by_seeds_with_their_recipes(tmp_path):
    experiment, jobs = load_experiment(written(tmp_path))
    assert [(job.arm, job.seed) for job in jobs] == [
        ("base", 0), ("RLOO", 0), ("step", 0), ("base", 1), ("RLOO", 1), ("step", 1),
    ]  # fmt: skip
    rloo = jobs[4]
    assert rloo.recipe.seed == 1
    assert rloo.recipe.algorithm.name == "rloo"
    assert rloo.recipe.train.tasks == 2
    assert rloo.sets[0][1].env.test_hops == (1,)
    assert rloo.recipe.env.test_hops == (1, 2, 3), "sets do not reach training"
    assert len({job.folder for job in jobs}) == 6
    assert load_experiment(written(tmp_path))[1][4].folder == rloo.folder
    assert experiment.seeds == (0, 1)
    with pytest.raises(ConfigError, match=r"small\.toml: there is no section \[quick\]"):
        load_experiment(written(tmp_path), quick=True)


def test_quick_comes_last_and_a_name_stands_for_its_section(tmp_path):
    text = SMALL.replace("[override]", "[quick]\noverride.train.iterations = 1\n[override]", 1)
    text = text.replace('algorithm = "rloo"', "algorithm.clip_high = 0.5, train.iterations = 9")
    text = text.replace("threads = 1", 'threads = 1\nalgorithm = "dapo"')
    jobs = load_experiment(written(tmp_path, text))[1]
    assert {job.recipe.algorithm.name for job in jobs} == {"dapo"}
    assert jobs[1].recipe.algorithm.clip_high == 0.5
    assert jobs[1].recipe.train.iterations == 9
    start = '[[start]]\nname = "s"\narm.RLOO.train.iterations = 5\n'
    jobs = load_experiment(written(tmp_path, text.replace("[override]", start + "[override]", 1)))[
        1
    ]
    assert [job.recipe.train.iterations for job in jobs[:3]] == [2, 5, 2]
    quick = load_experiment(written(tmp_path, text), quick=True)[1]
    assert {job.recipe.train.iterations for job in quick} == {1}


@pytest.mark.parametrize("absolute", [True, False])
def test_jobs_with_sections_of_a_users_own_reach_other_processes(tmp_path, absolute):
    (tmp_path / "mine.py").write_text(
        "from agent_r1.algorithms.grpo import GRPO\n"
        "class Mine(GRPO):\n"
        "    class Settings(GRPO.Settings):\n"
        "        size: int = 3\n"
    )
    name = f"{tmp_path}/mine.py:Mine" if absolute else "mine.py:Mine"
    text = SMALL.replace('algorithm = "rloo"', f'algorithm = {{ name = "{name}", size = 4 }}')
    job = load_experiment(written(tmp_path, text))[1][1]
    code = (
        "import pickle, sys; job = pickle.load(sys.stdin.buffer); print(job.recipe.algorithm.size)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, input=pickle.dumps(job), capture_output=True, check=True)
    assert result.stdout.strip() == b"4"


def test_code_that_was_changed_is_not_done_before(tmp_path):
    text = SMALL.replace('algorithm = "rloo"', 'algorithm = "mine.py:mine"')
    folders = set()
    for body in ("[0.0 for _ in returns]", "list(returns)"):
        (tmp_path / "mine.py").write_text(
            f"from agent_r1 import advantage\n@advantage\ndef mine(returns):\n    return {body}\n"
        )
        folders.add(load_experiment(written(tmp_path, text))[1][1].folder)
    assert len(folders) == 2


def test_a_start_made_anew_is_another_start(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    folders = set()
    for weights in (b"one", b"two"):
        (model / "model.safetensors").write_bytes(weights)
        text = SMALL.replace("threads = 1", f'threads = 1\nmodel.path = "{model}"')
        folders.add(load_experiment(written(tmp_path, text))[1][1].folder)
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("old", "new", "cure"),
    [
        ('algorithm = "rloo"', 'algorithm = "rlo"', "did you mean 'rloo'"),
        ("tasks = 6", "task = 6", "did you mean 'tasks'"),
        ('against = "RLOO"', 'against = "base"', "the trained arms are RLOO, step"),
        ('name = "step"\nagainst', 'name = "RLOO"\nagainst', "given twice"),
        ("env.test_hops = [1]", "env.test_hop = [1]", "did you mean 'test_hops'"),
        ("format = 0.2", "formt = 0.2", "did you mean 'format'"),
        ("[0, 1]", "[0, 0]", "stands there twice"),
        ("[override]", "[[start]]\narm.RLO.seed = 1\n[override]", "no arm 'RLO'"),
        ("env.test_hops = [1]", "learner.lr = 1.0", "has no effect on a test"),
    ],
)
def test_what_is_wrong_in_the_file_is_said_before_anything_runs(tmp_path, old, new, cure):
    assert old in SMALL
    with pytest.raises(ConfigError, match=r"small\.toml") as error:
        load_experiment(written(tmp_path, SMALL.replace(old, new)))
    assert cure in str(error.value)


COLUMNS = """
recipe = "hopworld"
seeds = [0]
columns = ["success", "f1"]

[[arm]]
name = "base"
train = false

[[arm]]
name = "other"
train = false
override.threads = 1

[[set]]
name = "one"
override.env.test_hops = [1]

[[set]]
name = "two"
override.env.test_hops = [2]

[[pair]]
arm = "other"
against = "base"
sets = ["one", "two"]

[[pair]]
arm = "other"
against = "base"
sets = ["two"]
metrics = ["f1", "success"]
"""


def test_columns_and_pairs_by_hand(tmp_path):
    experiment, jobs = load_experiment(
        written(tmp_path, COLUMNS), overrides=[("limits.turns", 3), ("credit", "step")]
    )
    assert {(job.recipe.limits.turns, job.recipe.credit.name) for job in jobs} == {(3, "step")}
    solved = {("base", "one"): 10, ("base", "two"): 0, ("other", "one"): 20, ("other", "two"): 40}
    for job in jobs:
        for test_set, recipe in job.sets:
            number = solved[job.arm, test_set.name]
            lost = 99 if job.arm == "base" else 98  # an episode of each that failed
            outcomes = {
                str(n): {"success": float(n < number), "f1": 0.5} for n in range(100) if n != lost
            }
            file = set_file(tmp_path / job.folder, test_set, recipe)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"outcomes": outcomes, "total": {"faults": 0}}))
    write_tables(experiment, jobs, tmp_path, tmp_path)
    rows = table(tmp_path / "table.csv")
    assert list(rows[0]) == ["method", "set", "n", "success", "success_low", "success_high", "f1"]
    means = {(row["method"], row["set"]): float(row["success"]) for row in rows}
    assert means == {key: round(number / 99, 4) for key, number in solved.items()}
    assert {(row["n"], row["f1"]) for row in rows} == {("99", "0.5")}
    assert float(rows[0]["success_low"]) == pytest.approx(0.10 - 1.96 * 0.030, abs=0.01)
    pair, of_f1, of_success = table(tmp_path / "pairs.csv")
    assert (pair["metric"], of_f1["metric"], of_f1["n"]) == ("success", "f1", "98")
    assert (of_success["metric"], of_success["difference"]) == ("success", str(round(40 / 98, 4)))
    assert {of_f1[key] for key in ("difference", "low", "high")} == {"0.0"}
    assert (pair["method"], pair["against"], pair["n"]) == ("other", "base", "196")
    assert float(pair["difference"]) == round(50 / 196, 4)
    half = 1.96 * (0.25 * 0.75 / 200) ** 0.5  # 50 of 200 pairs differ, all one way
    assert float(pair["low"]) == pytest.approx(0.255 - half, abs=0.01)
    assert float(pair["high"]) == pytest.approx(0.255 + half, abs=0.01)
    assert (
        "| other | base | one + two | success | 196 | 0.2551 |"
        in (tmp_path / "table.md").read_text()
    )
    with pytest.raises(ConfigError, match=r"columns = 'em', but the environment gives success"):
        wrong = load_experiment(written(tmp_path, COLUMNS.replace('"f1"]', '"em"]')))[0]
        write_tables(wrong, jobs, tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"pair\.metrics = 'em', but the environment gives"):
        wrong = load_experiment(written(tmp_path, COLUMNS.replace('= ["f1", ', '= ["em", ')))[0]
        write_tables(wrong, jobs, tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"pair: there is no set 'three'"):
        load_experiment(written(tmp_path, COLUMNS.replace('["one", "two"]', '["three"]')))


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.toml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_the_experiments_that_ship_are_well_formed(path, quick):
    assert load_experiment(path, quick=quick)[1]


# Statistics --------------------------------------------------------------------------------------


def test_the_bootstrap_of_one_run_is_that_of_its_tasks():
    """For 200 successes in 400 the normal interval is .5 +- .049."""
    interval = two_level_bootstrap([[1.0, 0.0] * 200])
    assert interval.mean == 0.5
    assert interval.low == pytest.approx(0.451, abs=0.004)
    assert interval.high == pytest.approx(0.549, abs=0.004)


def test_the_bootstrap_knows_that_runs_differ():
    runs = [[0.2] * 50, [0.4] * 50, [0.6] * 50]
    interval = two_level_bootstrap(runs)
    assert interval.mean == pytest.approx(0.4)
    # All of 27 equally likely draws: the least and the greatest have one chance each.
    assert interval.low == pytest.approx(0.2)
    assert interval.high == pytest.approx(0.6)
    excluded = two_level_bootstrap([[1.0, 1.0], [0.0, float("nan")]])
    assert excluded.mean == 0.5, "runs weigh alike, and a missing task is no failure"


def test_more_runs_on_the_same_tasks_are_not_more_tasks():
    one = two_level_bootstrap([[1.0, 0.0] * 100])
    three = two_level_bootstrap([[1.0, 0.0] * 100] * 3)
    assert three.high - three.low == pytest.approx(one.high - one.low, abs=0.01)


def test_steps_and_ratios_by_hand():
    curve = trailing_mean([0.0, 0.0, 0.6, 0.9], 3)
    assert curve == pytest.approx([0.0, 0.0, 0.2, 0.5])
    assert steps_to(curve, 0.2 - 1e-9) == 3
    assert steps_to(curve, 0.51) is None
    assert steps_to([0.0, 0.0], 0.0) is None, "nothing was learned, nothing was reached"
    ratio = ratio_of_means([2, 4], [8, 8])
    assert ratio.mean == pytest.approx(6 / 16)
    assert (ratio.low, ratio.high) == pytest.approx((0.25, 0.5))


def test_speed_is_measured_against_the_better_final(tmp_path):
    """Two seeds: the reference ends at .5 and .3, the other arm at 1 twice, so the mark is .9."""
    text = SMALL.replace("[override]", "[speed]\nwindow = 1\n[override]", 1)
    text = text.replace("iterations = 2", "iterations = 3").split("[[set]]")[0]
    experiment, jobs = load_experiment(written(tmp_path, text))
    curves = {
        ("RLOO", 0): [0.1, 0.3, 0.5], ("RLOO", 1): [0.1, 0.2, 0.3],
        ("step", 0): [0.1, 1.0, 1.0], ("step", 1): [0.1, 0.5, 1.0],
    }  # fmt: skip
    for job in jobs:
        if job.train:
            folder = tmp_path / job.folder
            folder.mkdir()
            rows = [
                {"iteration": i, "seconds": {"total": 1.0}, "figures": {"success": s, "turns": 1}}
                for i, s in enumerate(curves[job.arm, job.seed], 1)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    per_run, (row,) = speed_tables(experiment, jobs, tmp_path)
    assert row["start"] == pytest.approx(0.1)
    assert (row["steps_process"], row["steps_outcome"]) == (2.5, 3.0)
    assert (row["capped_process"], row["capped_outcome"]) == (0, 2)
    assert row["ratio"] == pytest.approx(2.5 / 3, abs=1e-4)
    assert [r["steps"] for r in per_run] == [2, 3, "", ""]
    write_tables(experiment, jobs, tmp_path, tmp_path)
    header = (tmp_path / "summary.csv").read_text().splitlines()[0]
    assert header == "start,credit,steps_outcome,steps_process,ratio,low,high"


# For real ----------------------------------------------------------------------------------------


def bench(*arguments, **options):
    command = [sys.executable, "-m", "agent_r1.cli", "bench", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_killed_experiment_goes_on_and_ends_with_all_its_tables(tmp_path):
    path, runs, out = written(tmp_path), tmp_path / "runs", tmp_path / "out"
    arguments = (path, "--runs", runs, "--out", out)
    ended = bench(*arguments)
    while not list(runs.glob("*/metrics.jsonl")):
        assert ended.poll() is None, ended.communicate()
        time.sleep(0.1)
    ended.terminate()  # it does not wait for the runs at work
    assert ended.wait(10) == 143
    ended.communicate()
    killed = bench(*arguments)
    while not list(runs.glob("rloo-s0-*/metrics.jsonl")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.1)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    process = bench(*arguments)
    text, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "6 runs" in text
    rows = table(out / "table.csv")
    assert list(rows[0]) == ["method", "set", "seeds", "mean", "low", "high"]
    assert {(row["method"], row["set"]) for row in rows} == {
        (arm, s) for arm in ("base", "RLOO", "step") for s in ("one", "two, greedy")
    }
    assert all(float(r["low"]) <= float(r["mean"]) <= float(r["high"]) for r in rows)
    _, jobs = load_experiment(path)
    scores = []
    for job in jobs:
        if job.arm == "RLOO":
            test_set, recipe = job.sets[0]
            result = json.loads(set_file(runs / job.folder, test_set, recipe).read_text())
            assert len(result["outcomes"]) == 6
            scores.append(np.mean([o["success"] for o in result["outcomes"].values()]))
            metrics = (runs / job.folder / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["iteration"] for line in metrics] == [0, 1, 2]
    (row,) = (r for r in rows if (r["method"], r["set"]) == ("RLOO", "one"))
    assert float(row["mean"]) == pytest.approx(np.mean(scores), abs=1e-4)
    for name in (
        "summary.csv",
        "runs.csv",
        "curves.csv",
        "table.md",
        "curves.png",
        "training.png",
        "bars.png",
    ):
        assert (out / name).stat().st_size > 0, name
    again = bench(*arguments, "--json")
    text, errors = again.communicate()
    assert "6 done before" in errors
    assert str(out / "table.csv") in json.loads(text)["files"]


def test_a_job_that_fails_is_named_and_the_others_go_on(tmp_path):
    (tmp_path / "broken.py").write_text(
        "from agent_r1.algorithms.grpo import GRPO\n"
        "class Broken(GRPO):\n"
        "    def advantages(self, groups, credit):\n"
        "        raise RuntimeError('no idea')\n"
    )
    text = SMALL.split("[[set]]")[0].replace("seeds = [0, 1]", "seeds = [0]")
    text = text.replace('algorithm = "rloo"', f'algorithm = "{tmp_path}/broken.py:Broken"')
    process = bench(written(tmp_path, text), "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "no idea" in errors
    assert "rloo-s0" in errors
    step = next((tmp_path / "runs").glob("step-s0-*"))
    assert json.loads((step / "metrics.jsonl").read_text().splitlines()[-1])["iteration"] == 2
    assert not (tmp_path / "out" / "table.md").exists()


def test_the_main_experiment_in_its_quick_form(tmp_path):
    process = bench(
        EXPERIMENTS / "hopworld.toml", "--quick", "--runs", tmp_path / "runs", "--out", tmp_path
    )
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    rows = table(tmp_path / "table.csv")
    methods = ["Base Tool Call", "Naive RAG", "PPO", "GRPO", "REINFORCE++",
               "REINFORCE++-baseline", "RLOO"]  # fmt: skip
    assert list(dict.fromkeys(row["method"] for row in rows)) == methods
    assert len({row["set"] for row in rows}) == 3
