"""The run folder and resuming: killed for real, at any moment, and the numbers stay the same."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from agent_r1 import api
from agent_r1.errors import ConfigError
from agent_r1.learner.learner import Learner
from agent_r1.learner.settings import LearnerSettings
from agent_r1.run.checkpoint import Checkpoints, State
from agent_r1.run.folder import RunFolder
from agent_r1.run.recipe import load_recipe
from agent_r1.types import Group
from tests.commands import Command

SMALL = {
    "train.iterations": 4,
    "train.tasks": 3,
    "train.attempts": 4,
    "limits.tokens_per_turn": 64,
    "evaluation.every": 2,
    "evaluation.tasks": 8,
    "evaluation.test_tasks": 0,
    "checkpoint.every": 1,
    "learner.minibatches": 2,
    "learner.schedule": "cosine",
    "threads": 1,
}
ARGUMENTS = [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]


start = Command


def numbers(run):
    """Everything that must repeat: metrics less timings, trajectories less timings, weights."""
    folder = RunFolder(run)

    def untimed(data):
        if isinstance(data, dict):
            return {k: untimed(v) for k, v in data.items() if "seconds" not in k}
        return [untimed(item) for item in data] if isinstance(data, list) else data

    rows = [untimed(row) for row in folder.metrics()]
    for row in rows:
        row.pop("tokens_per_second", None)
        row.pop("env_seconds", None)
        row.pop("memory_gib", None)
    import dataclasses

    episodes = [
        untimed(dataclasses.asdict(group))
        for row in rows[1:]
        for group in folder.trajectories(row["iteration"])
    ]
    weights = (Path(run) / "checkpoints" / "last" / "model.safetensors").read_bytes()
    return rows, episodes, weights


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    process = start("train", "hopworld", "--run", run, *ARGUMENTS)
    assert process.wait() == 0, process.printed
    return run


def test_a_run_leaves_what_it_says(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"recipe.json", "metrics.jsonl", "trajectories", "checkpoints", "curve.png"} <= names
    rows = RunFolder(uninterrupted).metrics()
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    assert [("validation" in row) for row in rows] == [True, False, True, False, True]
    assert rows[1]["figures"]["logprob_error"] < 1e-4
    parts = {"rollout", "credit", "learner", "sync", "other", "total"}
    assert set(rows[1]["seconds"]) == {*parts, "engine_idle"}
    assert rows[1]["env_seconds"]["p50"] <= rows[1]["env_seconds"]["p99"]
    last = uninterrupted / "checkpoints" / "last"
    assert os.readlink(last) == "000004"
    assert (uninterrupted / "checkpoints" / "best").exists()


def test_the_checkpoint_is_a_plain_model(uninterrupted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = uninterrupted / "checkpoints" / "best"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert model.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]


def test_trajectories_say_everything_about_each_token(uninterrupted):
    pairs = list(RunFolder(uninterrupted).estimated(1))
    groups = [group for group, _ in pairs]
    assert all(isinstance(group, Group) for group in groups)
    assert [len(group.trajectories) for group in groups] == [4, 4, 4]
    for group, known in pairs:
        for key, step in group.steps():
            count = len(step.action.token_ids)
            assert len(step.action.logprobs) == len(step.action.entropies) == count
            assert len(known.advantages[key]) == count
            if known.ratios:
                assert len(known.ratios[key]) == count
            else:
                assert set(known.advantages[key]) == {0.0}
    assert any(known.ratios for _, known in pairs)


@pytest.mark.parametrize(
    ("wait_for", "extra"),
    [("trajectories/000003.jsonl.gz", 0.0), ("checkpoints/000002", 0.3), ("recipe.json", 0.0)],
    ids=["between record and checkpoint", "within an iteration", "before the first checkpoint"],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, uninterrupted, wait_for, extra):
    run = tmp_path / "killed"
    process = start("train", "hopworld", "--run", run, *ARGUMENTS)
    deadline = time.monotonic() + 120
    while not (run / wait_for).exists():
        assert process.poll() is None, process.printed
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(extra)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(RunFolder(run).metrics()) < 5, "killed too late to show anything"
    resumed = start("train", "--resume", run)
    assert resumed.wait() == 0, resumed.printed
    assert numbers(run) == numbers(uninterrupted)


def test_a_run_that_samples_ahead_goes_on_where_it_was_killed(tmp_path, uninterrupted):
    """With staleness: the same tasks in the same order, none lost, none twice; ages and idle times
    are told; no staleness repeats what was so before there was any (``uninterrupted``).
    """
    run = tmp_path / "ahead"
    ahead = [*ARGUMENTS, "--train.staleness", "2", "--evaluation.every", "0"]
    process = start("train", "hopworld", "--run", run, *ahead)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints/000002").exists():
        assert process.poll() is None, process.printed
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = json.loads((run / "checkpoints/000002/state.json").read_text())
    assert state["cursor"] == 12 and len(state["finished"]) + len(state["pending"]) == 6
    waiting = run / "checkpoints/000002/waiting.jsonl.gz"
    assert waiting.exists() == bool(state["finished"])
    resumed = start("train", "--resume", run)
    assert resumed.wait() == 0, resumed.printed

    def drawn(folder):
        folder = RunFolder(folder)
        iterations = folder.trajectory_iterations()
        return sorted(group.task.id for i in iterations for group in folder.trajectories(i))

    assert drawn(run) == drawn(uninterrupted)
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["algorithm"]["importance_cap"] == 2.0
    rows = RunFolder(run).metrics()[1:]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        figures = row["figures"]
        assert 0 <= figures["age/mean"] <= figures["age/max"] <= 3
        shares = [v for k, v in figures.items() if k.startswith("age/") and k[4:].isdigit()]
        assert sum(shares) == pytest.approx(1)
        assert 0 < figures["importance/effective"] <= 1
        assert 0 <= row["seconds"]["engine_idle"] <= row["seconds"]["total"]
    assert max(row["figures"]["age/max"] for row in rows) >= 1


def test_a_finished_run_resumes_to_itself(uninterrupted):
    before = numbers(uninterrupted)
    process = start("train", "--resume", uninterrupted)
    assert process.wait() == 0, process.printed
    assert numbers(uninterrupted) == before


def test_a_run_is_never_written_over(uninterrupted):
    recipe, _ = load_recipe("hopworld")
    with pytest.raises(ConfigError, match="--resume"):
        RunFolder.create(uninterrupted, recipe)
    with pytest.raises(ConfigError, match="no run"):
        RunFolder.open(uninterrupted / "nowhere")


def test_a_line_cut_off_by_a_kill_is_not_read(tmp_path):
    run = RunFolder.create(tmp_path / "run", load_recipe("hopworld")[0])
    run.append_metrics({"iteration": 0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 1, "fig')
    assert run.metrics() == [{"iteration": 0}]
    run.forget_after(0)
    run.append_metrics({"iteration": 1})
    assert [row["iteration"] for row in run.metrics()] == [0, 1]


def test_the_last_few_checkpoints_and_the_best_are_kept(tmp_path, policy):
    from agent_r1.algorithms.grpo import GRPO

    learner = Learner(policy, GRPO(GRPO.Settings()), LearnerSettings(), temperature=1.0)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for iteration in range(6):
        state = State(iteration=iteration, best_iteration=min(iteration, 1), cursor=7 * iteration)
        checkpoints.save(state, policy, learner)
    assert {p.name for p in tmp_path.iterdir()} == {"000001", "000004", "000005", "best", "last"}
    assert os.readlink(tmp_path / "best") == "000001"
    assert checkpoints.restore(policy, learner).cursor == 35


def test_a_kill_before_the_links_loses_nothing(tmp_path, policy):
    """What has its name is the last checkpoint, whatever the links say."""
    from agent_r1.algorithms.grpo import GRPO

    learner = Learner(policy, GRPO(GRPO.Settings()), LearnerSettings(), temperature=1.0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(State(iteration=1, best_iteration=1), policy, learner)
    checkpoints._link = lambda name, target: 1 / 0
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(State(iteration=2, best_iteration=2), policy, learner)
    assert os.readlink(tmp_path / "last") == "000001"
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.restore(policy, learner).iteration == 2
    checkpoints.save(State(iteration=3, best_iteration=3), policy, learner)
    assert {p.name for p in tmp_path.iterdir()} == {"000003", "best", "last"}


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    (tmp_path / ".000003.partial").mkdir()
    assert Checkpoints(tmp_path, keep=1).last is None


def test_load_gives_an_agent_back(uninterrupted):
    threads = torch.get_num_threads()
    agent = api.load(uninterrupted)
    episode = agent.play(agent.tasks("test")[0])
    assert episode.outcome is not None
    assert agent.play(agent.tasks("test")[0]).steps[0].action == episode.steps[0].action
    with pytest.raises(ConfigError, match="best, last"):
        api.load(uninterrupted, "77")
    torch.set_num_threads(threads)


def test_train_in_python_from_a_notebook(tmp_path):
    """From within a running event loop, with the content of a recipe as a dictionary."""
    import asyncio

    recipe = {
        "env": {"name": "hopworld"},
        "limits": {"turns": 2, "tokens_per_turn": 16, "tokens": 300},
        "train": {"iterations": 1, "tasks": 2, "attempts": 2},
        "evaluation": {"every": 0, "test_tasks": 3},
        "threads": 1,
    }

    async def cell():
        return api.train(recipe, run=tmp_path / "run", overrides={"train.tasks": 1})

    result = asyncio.run(cell())
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result.report
    assert result.report["tasks"] == 1
    assert set(result.report["before"]) == {"1", "2", "3"}
    # Without a validation nothing tells which is best: the newest is loaded and tested.
    assert os.readlink(tmp_path / "run" / "checkpoints" / "best") == "000001"
