"""The example of the page: checked and trained as the page says."""

import json

from agent_r1.cli import main


def test_check_shows_how_each_call_was_taken_up(capsys):
    assert main(["check", "examples/my_agent.toml"]) == 0
    said = capsys.readouterr().out
    assert "played by the agent with the model as it is" in said
    assert "call 1 (chat), 2 messages: a new beginning; 0 of " in said
    assert "share of context tokens that turns before have" in said
    assert "are the agent's, as sampled, each trained on once" in said
    assert "--- action" in said and "its outcome: reward" in said


def test_it_trains(tmp_path, capsys):
    run = tmp_path / "run"
    more = ["--train.iterations", "1", "--train.tasks", "2", "--train.attempts", "4"]
    more += ["--evaluation.every", "0", "--evaluation.test_tasks", "0"]
    assert main(["train", "examples/my_agent.toml", "--run", str(run), *more]) == 0
    figures = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["figures"]
    assert figures["turns"] > 1 and figures["logprob_error"] < 1e-4


def test_an_agent_that_is_not_there_is_named_before_a_model_is_loaded(tmp_path, capsys):
    wrong = ["--env.run", "examples/my_agent.py:rum"]
    assert main(["train", "examples/my_agent.toml", "--run", str(tmp_path / "r"), *wrong]) == 2
    assert "did you mean 'run'" in capsys.readouterr().err
