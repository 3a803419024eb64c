"""What people are told while there is time to change something."""

import json

import pytest

import agent_r1
from agent_r1.errors import ConfigError, RunError
from tests.commands import agent_r1 as run

ENV = '''
from agent_r1 import Task, ToolEnv, tool

class Mine(ToolEnv):
    system = {system!r}

    @classmethod
    def tasks(cls, settings, split):
        return [Task(f"{{split}}{{n}}", "say", "x") for n in range({num})]

    @tool
    def look(self, x: str) -> str:
        """Look."""
        return x

    def score(self, answer):
        {score}
'''
SMALL = {
    "train": {"iterations": 2, "tasks": 2, "attempts": 2},
    "limits": {"turns": 2, "tokens_per_turn": 4, "tokens": 400},
    "evaluation": {"every": 0},
    "threads": 1,
}


def train(tmp_path, score="return 0.0", system="", num=40, **overrides):
    (tmp_path / "mine.py").write_text(ENV.format(score=score, system=system, num=num))
    return agent_r1.train(
        {"env": f"{tmp_path / 'mine.py'}:Mine"} | SMALL,
        run=tmp_path / "run",
        overrides=overrides,
    )


def test_a_run_that_learns_nothing_says_why_and_what_to_do(tmp_path, caplog):
    result = train(tmp_path)
    last = result.metrics[-1]
    assert last["figures"]["iterations_without_signal"] == 2
    words = last["advice"]["no-signal"]
    assert "reward 0 in 4 of 4" in words
    assert "made no well-formed call" in words
    assert "max_tokens (limits.tokens" in words
    assert f"agent-r1 explain {tmp_path / 'run'}" in words
    assert any(line.startswith("iteration 2: no-signal: ") for line in caplog.messages)
    first = result.metrics[1]["advice"]
    assert list(first) == ["one-stop"]
    assert "4 of 4 episodes stopped at max_tokens" in first["one-stop"]
    assert "one-stop" not in last["advice"]  # said once


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"limits.tokens = 60: the prompt of task 'train0' alone"):
        train(tmp_path, system="word " * 80, **{"limits.tokens": 60})
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_scored_episode_is_an_error_with_the_first_reason(tmp_path):
    with pytest.raises(RunError, match=r"iteration 1: not one of 4 .* the first: outcome: OSError"):
        train(tmp_path, score="raise OSError('the judge is down')")
    done = run("train", "--resume", tmp_path / "run")
    assert done.returncode == 1
    assert "agent-r1: iteration 1: not one of 4 episodes" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_validation_without_a_scored_episode_is_one_too(tmp_path):
    score = "assert not self.task.id.startswith('validation'), 'no key'\n        return 1.0"
    with pytest.raises(RunError, match=r"not one of 3 .*no key"):
        train(tmp_path, score=score, **{"evaluation.every": 1, "evaluation.tasks": 3})


def test_best_is_only_what_was_measured(tmp_path, caplog):
    """A metric that only successes have, and nothing succeeds: nothing chooses, the newest is
    kept, and it is said.
    """
    result = train(
        tmp_path,
        **{
            "evaluation": {"every": 1, "tasks": 3},
            "checkpoint.metric": "words",
        },
    )
    assert any("checkpoint.metric = 'words': no episode" in line for line in caplog.messages)
    assert (result.run.path / "checkpoints" / "best").resolve().name == "000002"


def test_demonstrations_without_a_call_are_said(tmp_path):
    sft = {"algorithm": "sft", "train.attempts": 1, "limits.tokens_per_turn": 16}
    result = train(tmp_path, score="return float(answer == 'x')", **sft)
    assert "2 of 2 demonstrations use no tool" in result.metrics[1]["advice"]["no-tool-shown"]
    (tmp_path / "r.toml").write_text('env = "mine.py:Mine"\n[limits]\ntokens = 400\n')
    found = run("check", tmp_path / "r.toml", "--json")
    assert any("use no tool" in line for line in json.loads(found.stdout)["warnings"])


def test_a_longer_run_goes_on_and_changed_code_is_noticed(tmp_path, caplog):
    train(tmp_path, score="return float(len(self.task.id) % 2)")
    source = tmp_path / "mine.py"
    source.write_text(source.read_text() + "\n# changed\n")
    result = agent_r1.api.resume(tmp_path / "run", iterations=3)
    assert [row["iteration"] for row in result.metrics] == [0, 1, 2, 3]
    assert any("mine.py has changed since the run began" in line for line in caplog.messages)


def test_what_a_run_imports_and_reads_is_watched_too(tmp_path, caplog):
    """A helper beside the environment and a file of its data; what stayed is not mentioned."""
    (tmp_path / "watched_helper.py").write_text("LENGTH = 2\n")
    (tmp_path / "rows.txt").write_text("a\nb\n")
    (tmp_path / "watched.py").write_text(
        "from watched_helper import LENGTH\n"
        "from agent_r1 import Task, ToolEnv\n"
        "class Mine(ToolEnv):\n"
        "    class Settings(ToolEnv.Settings):\n"
        "        name: str = 'mine'\n"
        "        rows: str\n"
        "    @classmethod\n"
        "    def tasks(cls, settings, split):\n"
        "        rows = open(settings.rows).read().split()\n"
        "        return [Task(f'{split}{row}', 'say') for row in rows]\n"
        "    def score(self, answer):\n"
        "        return float(len(answer or '') > LENGTH)\n"
    )
    env = {"name": f"{tmp_path / 'watched.py'}:Mine", "rows": str(tmp_path / "rows.txt")}
    agent_r1.train({"env": env} | SMALL, run=tmp_path / "run")
    (tmp_path / "watched_helper.py").write_text("LENGTH = 3\n")
    (tmp_path / "rows.txt").write_text("a\nc\n")
    agent_r1.api.resume(tmp_path / "run", iterations=3)
    changed = [line for line in caplog.messages if "has changed since" in line]
    assert len(changed) == 2
    assert "watched_helper.py" in "".join(changed)
    assert "rows.txt" in "".join(changed)
    with pytest.raises(ConfigError, match="has done 3 already"):
        agent_r1.api.resume(tmp_path / "run", iterations=2)


def test_code_that_cannot_be_imported_is_one_line(tmp_path):
    for text, words in (("def f(:\n", "line 1"), ("import nowhere_at_all\n", "nowhere_at_all")):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(ConfigError, match=rf"bad.py.*{words}.* cannot be imported|{words}"):
            agent_r1.train({"env": f"{tmp_path / 'bad.py'}:X"}, run=tmp_path / "bad")
