"""Rows of users' files: each is looked at before a run begins."""

import gzip
import json

import pytest

from agent_r1.errors import ConfigError
from agent_r1.run.recipe import load_recipe
from agent_r1.tasks.database.env import DatabaseEnv
from agent_r1.tasks.from_files import load_tasks
from agent_r1.tasks.multihop.env import MultiHop
from agent_r1.tasks.row_file import left_out
from agent_r1.training.preflight import warnings_of
from agent_r1.utils.scope import scope

GOOD = {"id": "a", "question": "Who?", "answer": "Ada"}


def write(path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**GOOD, "id": "b", "answer": None}, "'answer' is None"),
        ({**GOOD, "id": "b", "answer": ["Ada"]}, r"'answer' is \['Ada'\]"),
        ({**GOOD, "id": None}, "'id' is None"),
        ({"id": "b", "answer": ""}, "'question' is missing"),
        (GOOD, "the id 'a' is that of line 1, too"),
        (b'{"id": "b", "question": "caf\xe9", "answer": "x"}', "not valid JSON in UTF-8"),
        (b'[{"id": "b"}]', "an object is needed on each line"),
        (b'{"id": "b", "question": "?", "answer": NaN}', "'answer' is nan"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_row_is_named_with_its_line_or_left_out_and_counted(tmp_path, row, words):
    path = write(tmp_path / "q.jsonl", GOOD, row, {**GOOD, "id": "c"})
    with pytest.raises(ConfigError, match=f"q.jsonl, line 2: .*{words}.*bad_rows = 'skip'"):
        load_tasks(path, "env.tasks")
    with scope():
        assert [task.id for task in load_tasks(path, "env.tasks", "skip")] == ["a", "c"]
        (line,) = left_out()
    assert path in line
    assert "1 rows were left out" in line
    assert "line 2" in line


def test_numbers_and_empty_answers_will_do_and_text_is_clean(tmp_path):
    row = b'{"id": 7, "question": "half \\ud83d", "answer": "", "tests": ["1 + 1"]}'
    (task,) = load_tasks(write(tmp_path / "q.jsonl", row, b""), "env.tasks")
    assert (task.id, task.question, task.answer) == ("7", "half \ufffd", "")
    assert task.data == {"tests": ["1 + 1"]}


def test_a_file_that_is_cut_off_is_one_line(tmp_path):
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 9)[:-12])
    with pytest.raises(ConfigError, match=r"q.jsonl.gz, after line \d: not whole gzip"):
        load_tasks(str(path), "env.tasks")


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_every_gold_query_is_run_before_training(tmp_path, bad_rows):
    script = tmp_path / "db.sql"
    script.write_text("CREATE TABLE t (n); INSERT INTO t VALUES (1), (2);")
    rows = [
        {"id": f"q{n}", "question": "How many?", "answer": "2", "sql": "SELECT COUNT(*) FROM t"}
        for n in range(40)
    ]
    rows[33]["sql"] = "SELECT COUNT(*) FORM t"
    questions = write(tmp_path / "q.jsonl", *rows)
    settings = DatabaseEnv.Settings(path=str(script), questions=questions, bad_rows=bad_rows)
    if bad_rows == "error":
        with pytest.raises(ConfigError, match=r"q.jsonl, line 34: question 'q33': its sql: near"):
            DatabaseEnv.tasks(settings, "train")
        return
    splits = ("train", "validation", "test")
    ids = {task.id for split in splits for task in DatabaseEnv.tasks(settings, split)}
    assert ids == {f"q{n}" for n in range(40)} - {"q33"}


def test_gold_passages_that_are_not_there_are_counted(tmp_path):
    questions = [
        {**GOOD, "id": f"q{n}", "supporting_ids": [f"p{n % 3}"], "supporting": ["T"]}
        for n in range(30)
    ]
    write(tmp_path / "toy.jsonl", *questions)
    passages = [{"_id": f"p{n}", "title": "T", "text": f"Text {n}."} for n in range(2)]
    write(tmp_path / "corpus.toy.jsonl", *passages)
    settings = MultiHop.Settings(path=str(tmp_path), datasets=("toy",))
    (line,) = MultiHop.check_data(settings)
    assert "10 of 30 gold passages are not in the corpus, the first: 'p2' of question" in line


def test_small_sets_are_said(tmp_path):
    write(tmp_path / "q.jsonl", *({**GOOD, "id": f"q{n}"} for n in range(60)))
    (tmp_path / "mine.py").write_text(
        "from agent_r1 import tool\n"
        "@tool\ndef look(x: str) -> str:\n    'Look.'\n    return x\n"
        "def reward(task, answer):\n    return 1.0\n"
    )
    mine = str(tmp_path / "mine.py")
    env = {"name": "tools", "tasks": str(tmp_path / "q.jsonl"), "tools": [f"{mine}:look"]}
    recipe, _ = load_recipe({"env": env | {"reward": f"{mine}:reward"}})
    lines = list(warnings_of(recipe))
    assert any("validation has" in line and "of 64 asked for" in line for line in lines)
