"""``agent-r1 explain`` on real runs: what it says is what was trained on."""

import json

import pytest

import agent_r1
from agent_r1.analysis.explain import explain
from agent_r1.cli import main
from agent_r1.errors import ConfigError
from agent_r1.run.folder import RunFolder

RECIPE = {
    "env": "hopworld",
    "threads": 1,
    "limits": {"turns": 3, "tokens_per_turn": 48, "tokens": 500},
    "train": {"iterations": 1, "tasks": 4, "attempts": 4},
    "learner": {"lr": 1e-4, "minibatches": 2},
    "evaluation": {"every": 0},
    "credit": {"name": "step", "weights": {"format": 0.2}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain") / "run"
    return agent_r1.train(RECIPE | {"algorithm": "ppo"}, run=folder).run


def test_what_is_shown_is_what_was_trained_on(run):
    found = explain(run, "1/2/3")
    group, known = list(run.estimated(1))[1]
    stored = group.trajectories[2]
    keys = [key for key, _ in group.steps() if key.attempt == 2]
    assert found.own.advantages == [known.advantages[key] for key in keys]
    assert found.notes == [], "stored and computed advantages agree, and an update used it"
    r = [0.2 * s.rewards.get("format", 0) + sum(v for k, v in s.rewards.items() if k != "format")
         for s in stored.steps]  # fmt: skip
    bootstraps = stored.stop.truncated
    r[-1] += 0.0 if bootstraps else stored.outcome.reward
    assert found.returns == pytest.approx([sum(r[i:]) for i in range(len(r))])
    total = sum(t.num_action_tokens for g in run.trajectories(1) for t in g.trajectories)
    assert all(weight > 1 / total for weight in found.own.weights), "half the groups a mini-batch"
    names = ", ".join(column.name for column in found.others).split(", ")
    assert sorted(names) == sorted(
        ["grpo", "cispo", "dapo", "dr-grpo", "gigpo", "gspo", "rloo", "reinforce++",
         "reinforce++-baseline"]
    )  # fmt: skip


def test_the_weights_of_a_mini_batch_are_whole(run):
    """Over all trajectories, each mini-batch's weights sum to 1."""
    total = 0.0
    for number, group in enumerate(run.trajectories(1), 1):
        for attempt, t in enumerate(group.trajectories, 1):
            found = explain(run, f"1/{number}/{attempt}")
            counts = [len(step.action.token_ids) for step in t.steps]
            total += sum(w * n for w, n in zip(found.own.weights, counts, strict=True))
    assert total == pytest.approx(2.0)


def test_the_command_needs_no_model(run, capsys):
    assert main(["explain", str(run.path), "1/1/1", "--tokens"]) == 0
    text = capsys.readouterr().out
    t = next(run.trajectories(1)).trajectories[0]
    assert "ppo (this run)" in text
    assert f"task {t.task_id}" in text
    assert text.count("\n") > t.num_action_tokens
    assert main(["explain", str(run.path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["iteration"] == 1
    assert len(data["steps"][0]["token_ids"]) == len(data["algorithms"][0]["advantages"][0])


@pytest.mark.parametrize(
    ("where", "cure"),
    [("1/9/1", "groups 1 to 4"), ("1/1/0", "attempts 1 to 4"), ("7", "iterations 1 to 1"),
     ("one", "ITERATION/GROUP/ATTEMPT"), ("1/2/3/4", "ITERATION/GROUP/ATTEMPT")],
)  # fmt: skip
def test_what_is_not_there_is_an_error_that_says_what_is(run, where, cure):
    with pytest.raises(ConfigError, match=cure):
        explain(run, where)


def test_a_run_without_trajectories(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    with pytest.raises(ConfigError, match="no trajectories"):
        explain(RunFolder.open(tmp_path))
