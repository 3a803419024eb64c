"""Supervised fine-tuning: the environment's demonstrations and those of past runs, the loss."""

import json
import shutil

import pytest
import torch

from agent_r1 import api
from agent_r1.analysis.check_recipe import dry_run
from agent_r1.api import Agent
from agent_r1.cli import main
from agent_r1.errors import ConfigError
from agent_r1.model.load import load_policy
from agent_r1.model.places import local_path
from agent_r1.run.folder import RunFolder
from agent_r1.run.recipe import load_recipe
from agent_r1.tasks.hopworld.env import HopWorld
from agent_r1.tree import build_tree
from agent_r1.types import Kind, StepKey, ToolCall

SMALL = {
    "model.lora": {"rank": 4, "alpha": 8},
    "learner.lr": 2e-3,
    "train.iterations": 2,
    "train.tasks": 6,
    "evaluation": {"every": 2, "tasks": 4},
}


def sft(run, **overrides):
    """From Python: the recipe of the tiny base, its own actions imitated."""
    given = {"algorithm": "sft", "train.attempts": 1, "train.temperature": 0.7}
    return api.train("hopworld", run=run, overrides={**SMALL, **given, **overrides})


def as_arguments(overrides):
    return [f"--{key}={json.dumps(value).replace(': ', ' = ')}" for key, value in overrides.items()]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    return sft(tmp_path_factory.mktemp("sft") / "warm").run


def nll(recipe, checkpoint, groups):
    """The mean of -log pi over the action tokens, by plain forward passes."""
    policy = load_policy(recipe.model, checkpoint=checkpoint, adapter=False)
    losses = []
    for branch in (b for group in groups for b in build_tree(group).branches()):
        ids = torch.tensor([branch.token_ids])
        with torch.no_grad():
            logprobs = policy.model(input_ids=ids).logits[0].log_softmax(-1)
        losses += [
            -logprobs[i - 1, ids[0, i]].item()
            for i, kind in enumerate(branch.kinds)
            if kind is Kind.ACTION
        ]
    return sum(losses) / len(losses)


def test_the_loss_is_that_of_the_action_tokens_and_falls(warm):
    recipe, _ = load_recipe(warm.recipe_data())
    first, second = list(warm.trajectories(1)), list(warm.trajectories(2))
    rows = warm.metrics()
    assert rows[1]["figures"]["loss"] == pytest.approx(nll(recipe, None, first), rel=1e-4)
    before, after = (nll(recipe, c, second) for c in (None, warm.path / "checkpoints" / "last"))
    assert after < 0.9 * before
    assert rows[1]["figures"]["entropy"] is None, "nobody sampled"
    assert rows[1]["figures"]["success"] is None, "they were chosen for it"
    assert rows[2]["validation"]["total"]["tasks"] == 4


def test_demonstrations_are_whole_episodes(warm, tokenizer):
    for group in warm.trajectories(1):
        (trajectory,) = group.trajectories
        assert trajectory.outcome.success
        *calls, answer = trajectory.steps
        assert all(step.message.tool_calls and step.observation_ids for step in calls)
        assert tokenizer.decode(answer.action.token_ids).startswith(answer.message.content)
        assert answer.action.logprobs == ()


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path):
    whole = sft(tmp_path / "whole", **{"train.iterations": 3})
    cut = sft(tmp_path / "cut", **{"train.iterations": 1})
    data = cut.run.recipe_data()
    data["train"]["iterations"] = 3
    (cut.run.path / "recipe.json").write_text(json.dumps(data))
    resumed = api.resume(cut.run.path)
    losses = [[row["figures"]["loss"] for row in r.metrics[1:]] for r in (whole, resumed)]
    assert losses[0] == losses[1]


def test_the_command_makes_it_of_a_recipe_for_reinforcement_learning(tmp_path, capsys):
    arguments = as_arguments({k: v for k, v in SMALL.items() if k != "model.lora"})
    run = tmp_path / "run"
    assert main(["sft", "hopworld", "--run", str(run), *arguments]) == 0
    said = capsys.readouterr().out
    assert "1/2  loss " in said
    assert f"train hopworld --model.path {run}/checkpoints/best" in said
    recipe = RunFolder.open(run).recipe_data()
    assert recipe["algorithm"]["name"] == "sft"
    assert recipe["train"]["attempts"] == 1
    assert (run / "checkpoints" / "last" / "model.safetensors").exists(), "no adapter: all weights"
    assert main(["explain", str(run), "--tokens"]) == 0
    assert Agent(load_recipe(recipe)[0], run / "checkpoints" / "best").tasks("test")


def test_successes_of_past_runs_are_imitated(tmp_path, capsys):
    overrides = {**SMALL, "train.iterations": 1, "train.attempts": 4, "env.train_hops": [1]}
    past = api.train("hopworld", run=tmp_path / "past", overrides=overrides).run
    good = [
        [step.action.token_ids for step in t.steps]
        for group in past.trajectories(1)
        for t in group.trajectories
        if t.outcome.success
    ]
    assert good, "the base solves some"
    source = {"algorithm.source": str(past.path), "env.train_hops": [1]}
    run = sft(tmp_path / "run", **source, **{"train.tasks": 2}).run
    for iteration in (1, 2):
        for group, known in run.estimated(iteration):
            (trajectory,) = group.trajectories
            assert [step.action.token_ids for step in trajectory.steps] in good
            assert trajectory.steps[0].action.logprobs == ()
            assert StepKey(group.number, 0, 0) in known.ratios, "of this update"
    both = {"algorithm.source": [str(past.path), str(run.path)], "env.train_hops": [1]}
    rows = sft(tmp_path / "both", **both).metrics  # sampled ones and imitated ones in one batch
    assert rows[-1]["figures"]["logprob_error"] == 0.0
    arguments = as_arguments({**SMALL, "env.train_hops": [1]})
    command = ["sft", "hopworld", "--from", str(past.path), "--run", str(tmp_path / "cli")]
    assert main([*command, *arguments]) == 0
    assert "1/2  loss " in capsys.readouterr().out
    for key, value in (("model.path", local_path("hopworld-base")), ("env.train_hops", [2])):
        other = {"algorithm.source": str(past.path), "env.train_hops": [1], key: value}
        with pytest.raises(ConfigError, match=rf"algorithm\.source = .* that run has {key} = "):
            sft(tmp_path / "other", **other)
    none = api.train("hopworld", run=tmp_path / "none", overrides={**overrides, "limits.turns": 1})
    with pytest.raises(ConfigError, match=r"algorithm\.source = .* no episode there succeeds"):
        sft(tmp_path / "other", **{"algorithm.source": str(none.run.path), "env.train_hops": [1]})
    assert not (tmp_path / "other").exists(), "found out before anything is loaded"


def test_reinforcement_learning_goes_on_with_the_adapter(tmp_path, warm):
    lora = {"rank": 4, "alpha": 8, "start": str(warm.path)}
    overrides = {
        **SMALL,
        "model.lora": lora,
        "train.attempts": 2,
        "train.iterations": 1,
        "train.temperature": 0.7,
        "evaluation": {"every": 1, "tasks": 4},
        "algorithm.kl": {"coef": 0.1},
    }
    result = api.train("hopworld", run=tmp_path / "rl", overrides=overrides)
    start, *_, end = result.metrics
    ours, theirs = start["validation"], warm.metrics()[-1]["validation"]
    ours.pop("seconds"), theirs.pop("seconds")
    assert ours == theirs, "it starts where the warm start ended"
    assert end["figures"]["kl"] == pytest.approx(0.0, abs=1e-6), "the reference is the start"
    pinned = result.run.recipe_data()["model"]["lora"]["start"]
    assert pinned == str((warm.path / "checkpoints" / "best").resolve())
    loaded = api.load(tmp_path / "rl", "last")
    assert loaded.policy.has_adapter


@pytest.mark.filterwarnings("error::UserWarning")
def test_an_adapter_from_another_machine_is_saved_with_this_ones_model(tmp_path, warm):
    kept = shutil.copytree(warm.path / "checkpoints" / "best", tmp_path / "kept")
    config = json.loads((kept / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "not/here"  # peft would look for it on the hub
    (kept / "adapter_config.json").write_text(json.dumps(config))
    lora = {"rank": 4, "alpha": 8, "start": str(kept)}
    recipe = load_recipe("hopworld", [("model.lora", lora)])[0]
    load_policy(recipe.model).save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == local_path("hopworld-base")


def test_what_cannot_be_started_from_is_named(tmp_path, warm):
    for lora, message in (
        ({"start": str(tmp_path)}, r"model\.lora\.start = .*adapter_config\.json"),
        ({"start": str(warm.path), "rank": 8}, r"model\.lora\.rank = 8: the adapter .* has 4"),
        ({"start": str(warm.path), "rank": 4}, r"model\.lora\.alpha = 32: the adapter .* has 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            api.train("hopworld", run=tmp_path / "x", overrides={**SMALL, "model.lora": lora})
        with pytest.raises(ConfigError, match=message):
            dry_run(load_recipe("hopworld", [("model.lora", lora)])[0])


def test_nothing_to_imitate_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"algorithm\.require\.f1: .* no such metric"):
        sft(tmp_path / "a", **{"algorithm.require": {"f1": 1.0}})
    with pytest.raises(ConfigError, match=r"200 demonstrations in a row .* no success \(max_turns"):
        sft(tmp_path / "b", **{"limits.turns": 1})
    with pytest.raises(ConfigError, match=r"200 demonstrations .* longer than limits"):
        sft(tmp_path / "d", **{"limits.tokens_per_turn": 4})
    with pytest.raises(ConfigError, match=r"nowhere holds no run"):
        sft(tmp_path / "c", **{"algorithm.source": "nowhere"})
    assert not (tmp_path / "c").exists(), "found out before anything is loaded"


def test_an_error_in_gold_names_the_task(tmp_path, monkeypatch):
    def gold(self):
        yield next(iter(real(self)))
        raise KeyError("bridge")

    real = HopWorld.gold
    monkeypatch.setattr(HopWorld, "gold", gold)
    with pytest.raises(ConfigError, match=r"gold\(\) of task '.+' fails: KeyError: 'bridge'"):
        sft(tmp_path / "a")
    monkeypatch.setattr(HopWorld, "gold", lambda self: [ToolCall("search", {"query": {1, 2}})])
    with pytest.raises(ConfigError, match=r"gold\(\) of task '.+' fails: TypeError: .*set"):
        sft(tmp_path / "b")
    monkeypatch.setattr(HopWorld, "gold", lambda self: ["x <tool_call>{}</tool_call>"])
    with pytest.raises(ConfigError, match=r"writes a call as text.*give ToolCall\(name, arg"):
        sft(tmp_path / "c")
