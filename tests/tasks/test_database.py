"""The database: read-only and limited whatever the agent writes; questions whose SQL is right."""

import asyncio
import json
import sqlite3
from contextlib import closing

import pytest

from agent_r1 import CallError, check_env
from agent_r1.errors import ConfigError
from agent_r1.render.calls import parse_hermes
from agent_r1.tasks.database.database import Database
from agent_r1.tasks.database.env import DatabaseEnv
from agent_r1.tasks.database.shops import build_database

SETTINGS = DatabaseEnv.Settings()


def call(name, **arguments):
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>{body}</tool_call>"


def play(task, *texts, settings=SETTINGS):
    async def work():
        env = DatabaseEnv(settings)
        await env.reset(task, 0)
        steps = [await env.step(parse_hermes(text)) for text in texts]
        outcome = await env.outcome()
        await env.close()
        return steps, outcome

    return asyncio.run(work())


@pytest.fixture
def shop():
    connection = sqlite3.connect(":memory:", cached_statements=0)
    connection.executescript(
        "CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT);"
        "INSERT INTO items VALUES (1, 'lamp'), (2, 'desk'), (3, 'rug');"
        "CREATE VIEW names AS SELECT name FROM items;"
    )
    database = Database(connection, max_rows=2, max_steps=200_000)
    yield database
    database.close()


def test_contract_over_all_kinds_of_questions():
    notes = check_env(DatabaseEnv, SETTINGS, num_tasks=60)
    assert any("180 of 180" in note for note in notes)


def test_a_query_gives_rows_and_says_what_it_read(shop):
    found = shop.query("SELECT name FROM items ORDER BY id")
    assert (found.columns, found.rows, found.more) == (["name"], [["lamp"], ["desk"]], True)
    assert found.tables == ["items"]
    assert shop.query("SELECT name FROM items ORDER BY id") == found  # the second time, too
    assert shop.query("SELECT 1 + 1").tables == []
    assert shop.tables == {"items": ["id", "name"], "names": ["name"]}


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE items",
        "INSERT INTO items VALUES (4, 'x')",
        "UPDATE items SET name = 'x'",
        "DELETE FROM items",
        "CREATE TABLE mine (x)",
        "CREATE TEMP TABLE mine (x)",
        "ATTACH DATABASE '/tmp/x.db' AS other",
        "VACUUM INTO '/tmp/x.db'",
        "PRAGMA query_only = OFF",
        "PRAGMA writable_schema = ON",
        "SELECT load_extension('x')",
        "SELECT randomblob(1000000000)",
        "SELECT * FROM pragma_database_list",
        "BEGIN",
        "SELECT 1; DROP TABLE items",
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT MAX(x) FROM n",
        "SELECT COUNT(*) FROM items a, items b, items c, items d, items e, items f, items g, "
        "items h, items i, items j, items k, items l, items m",
        "SELECT * FROM nothing",
        "this is no SQL",
        "",
        "-- a comment",
        "SELECT like('%a%a%a%a%a%a%a%b' || printf('%200d', 1), 'aaaa')",
        "SELECT '\x00'",
        "SELECT :missing",
    ],
)
def test_what_does_not_read_or_takes_too_long_is_the_agents_mistake(shop, sql):
    with pytest.raises(CallError):
        shop.query(sql)
    assert shop.query("SELECT COUNT(*) FROM items").rows == [[3]]


def test_values_are_limited(shop):
    with pytest.raises(CallError, match="too big"):
        shop.query("SELECT replace(printf('%19000d', 1), ' ', 'xx')")
    assert shop.query("SELECT printf('%999999d', 1)").rows == [[None]]


def test_time_is_limited_whatever_a_step_costs(shop):
    import time

    sql = (
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 1000000), "
        "t(s) AS (SELECT replace(printf('%9000d', 1), ' ', 'x')) "
        "SELECT SUM(instr(s || x, 'y')) FROM n, t"
    )
    start = time.perf_counter()
    with pytest.raises(CallError, match="takes too long"):
        shop.query(sql)
    assert time.perf_counter() - start < 10


def test_process_rewards_are_given_once():
    task = DatabaseEnv.tasks(DatabaseEnv.Settings(tables=(2,)), "train")[0]
    gold = call("query", sql=task.data["sql"])
    texts = [call("list_tables"), call("query", sql="SELEC"), gold, gold, "no tags"]
    steps, outcome = play(task, *texts)
    assert [step.rewards for step in steps] == [
        {"format": 1.0, "ran": 0.0, "tables": 0.0},
        {"format": 0.0, "ran": 0.0, "tables": 0.0},
        {"format": 0.0, "ran": 1.0, "tables": 1.0},
        {"format": 0.0, "ran": 0.0, "tables": 0.0},
        {"answered": 0.0},
    ]
    assert steps[1].events == ("mistake/rejected:query",)
    assert "syntax error" in steps[1].messages[0].content
    assert outcome.reward == 0.0


def test_half_of_the_tables_is_half_of_the_reward():
    task = DatabaseEnv.tasks(DatabaseEnv.Settings(tables=(2,)), "train")[0]
    table = task.data["sql"].split(" FROM ")[1].split(" ")[0]
    (step,), _ = play(task, call("query", sql=f"SELECT * FROM {table}"))
    assert step.rewards == {"format": 1.0, "ran": 1.0, "tables": 0.5}


@pytest.mark.parametrize(
    ("answer", "right"),
    [("7", True), ("7.0", True), (" 7 ", True), ("70", False), ("seven", False), ("", False)],
)
def test_numbers_count_as_numbers(answer, right):
    import dataclasses

    task = dataclasses.replace(DatabaseEnv.tasks(SETTINGS, "train")[0], answer="7")
    _, outcome = play(task, f"<answer>{answer}</answer>")
    assert outcome.success == right


def test_databases_come_from_their_seed():
    assert build_database(5, 2) == build_database(5, 2)
    assert build_database(5, 2) != build_database(6, 2)
    seen = {task.question for task in DatabaseEnv.tasks(SETTINGS, "train")[:300]}
    held_out = {task.data["seed"] for task in DatabaseEnv.tasks(SETTINGS, "test")[:300]}
    assert len(seen) > 150
    assert not held_out & {t.data["seed"] for t in DatabaseEnv.tasks(SETTINGS, "train")[:300]}


# One's own ----------------------------------------------------------------------------------------

ROWS = [
    {"id": f"q{n}", "question": f"Who has ticket {n}?", "answer": name,
     "sql": f"SELECT owner FROM tickets WHERE id = {n}"}
    for n, name in enumerate(["Ada", "Ben", "Cleo"] * 10, 1)
]  # fmt: skip


@pytest.fixture(params=["tickets.db", "tickets.sql"])
def own(request, tmp_path):
    script = "CREATE TABLE tickets (id INTEGER, owner TEXT);" + "".join(
        f"INSERT INTO tickets VALUES ({n}, '{row['answer']}');" for n, row in enumerate(ROWS, 1)
    )
    path = tmp_path / request.param
    if path.suffix == ".sql":
        path.write_text(script)
    else:
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(script)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return DatabaseEnv.Settings(path=str(path), questions=str(questions), holdout=0.2)


def test_a_database_of_ones_own(own):
    assert check_env(DatabaseEnv, own)
    task = DatabaseEnv.tasks(own, "train")[0]
    texts = [call("query", sql=task.data["sql"]), f"<answer>{task.answer}</answer>"]
    steps, outcome = play(task, *texts, settings=own)
    assert steps[0].rewards == {"format": 1.0, "ran": 1.0, "tables": 1.0}
    assert outcome.success


def test_what_is_wrong_with_ones_own_is_said(own, tmp_path):
    with pytest.raises(ValueError, match="path and questions go together"):
        DatabaseEnv.Settings(path="x.db")
    task = DatabaseEnv.tasks(own, "train")[0]
    missing = own.model_copy(update={"path": str(tmp_path / "nope.db")})
    with pytest.raises(ConfigError, match="there is no file"):
        play(task, settings=missing)
    (tmp_path / "bad.db").write_text("not a database at all")
    with pytest.raises(ConfigError, match=r"env\.path = '.*bad\.db': no SQLite database"):
        play(task, settings=own.model_copy(update={"path": str(tmp_path / "bad.db")}))
    task.data["sql"] = "SELECT nobody FROM tickets"
    with pytest.raises(ConfigError, match=f"question '{task.id}': its sql: no such column"):
        play(task, settings=own)
