"""The command that a run suggests when it is done."""

from pathlib import Path

from agent_r1.cli.training import _next_run
from agent_r1.run.recipe import load_recipe


def test_the_next_command_is_of_the_same_task_and_algorithm():
    recipe, _ = load_recipe("hopworld")
    given = ["--algorithm", "my.py:mine", "--seed=4", "--env.cassette.path", "a b"]
    said = _next_run(recipe, "hopworld", Path("runs/a"), given)
    assert said.startswith(
        "train hopworld --algorithm my.py:mine --env.cassette.path 'a b' --seed 1 "
    )
    imitating, _ = load_recipe("hopworld", [("algorithm", "sft"), ("model.lora.rank", 4)])
    given = ["--model.lora.rank", "4", "--learner.lr", "1e-3", "--train.iterations=5"]
    said = _next_run(imitating, "hopworld", Path("runs/warm"), given)
    assert said.startswith("train hopworld --model.lora.rank 4 --model.lora.start runs/warm ")
    assert _next_run(recipe, None, Path("runs/a"), []).startswith("train --resume runs/a ")
