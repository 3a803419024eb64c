"""What people see of a run: the index of its episodes, the diagnosis, the window's answers. The
window in a browser is tested in tests/whole/test_browser.py.
"""

import dataclasses
import gzip
import json
import math
import os
import shutil
import sqlite3
import threading
import time

import pytest
from starlette.testclient import TestClient

import agent_r1
from agent_r1.analysis.diagnose import diagnose
from agent_r1.analysis.episode_index import EpisodeIndex, Query, as_json, parse_range
from agent_r1.analysis.viewer.episode import episode_data, group_data, stored_group, tokenizer_of
from agent_r1.analysis.viewer.library import Library
from agent_r1.analysis.viewer.server import make_app, query_of
from agent_r1.cli import main
from agent_r1.errors import ConfigError
from agent_r1.run.figures import flat_figures
from agent_r1.run.folder import RunFolder
from agent_r1.types import (
    Action,
    CallResult,
    Estimates,
    Group,
    Message,
    Outcome,
    Step,
    StepKey,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
)

EVIL = "<img src=x onerror=alert(1)><script>alert(1)</script>\x1b[2J\u202e gnp.exe \ud83d"


@pytest.fixture(scope="module", autouse=True)
def cache_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run with a messy tool, process rewards and step credit."""
    folder = tmp_path_factory.mktemp("runs") / "real"
    overrides = {
        "train.iterations": 2,
        "train.tasks": 3,
        "train.attempts": 4,
        "evaluation.tasks": 4,
        "threads": 1,
    }
    agent_r1.train("hopworld-noise", run=folder, overrides=overrides)
    return RunFolder(folder)


def a_step(said="look", *, events=(), rewards=None, call=True, result="found it"):
    calls = (ToolCall("search", {"query": said}),) if call else ()
    return Step(
        Action((5, 6), (-0.5, -0.25), (0.7, 0.1), (), "stop"),
        Message("assistant", said, calls),
        (Message("tool", f"shown: {result}"),) if call else (),
        (7, 8, 9) if call else (),
        rewards or {},
        "start",
        tuple(events),
        results=(CallResult("search", result),) if call else (),
    )


def a_trajectory(attempt, steps, *, reward=0.0, stop=StopReason.DONE, question="why?"):
    failed = stop is StopReason.FAULT
    return Trajectory(
        "task",
        "2",
        attempt,
        (Message("system", "secret system words"), Message("user", question)),
        (1, 2, 3),
        steps,
        stop,
        None if failed else Outcome(reward, reward >= 1),
        "it broke" if failed else None,
    )


def make_run(folder, iterations, *, rows=None, limits=4096):
    """A run folder with these groups, without training."""
    recipe = agent_r1.load_recipe(
        {"env": "hopworld", "credit": "step", "limits": {"tokens": limits}}
    )[0]
    run = RunFolder.create(folder, recipe)
    for number, groups in iterations.items():
        known = Estimates()
        for index, group in enumerate(groups):
            group.number = index
            for key, step in group.steps():
                known.advantages[key] = (0.5,) * len(step.action.token_ids)
                known.ratios[key] = (1.0, 1.5)
        run.write_trajectories(number, groups, known)
    for row in rows or ():
        run.append_metrics(row)
    return run


def of(*trajectories):
    return Group(Task("task", "why?", "because"), list(trajectories))


# The index -----------------------------------------------------------------------------------


def test_the_index_agrees_with_the_stored_episodes(real):
    index = EpisodeIndex(real).read_all()
    total, rows = index.find(Query(limit=1000))
    stored = {
        (iteration, group.number + 1, attempt + 1): trajectory
        for iteration in real.trajectory_iterations()
        for group in real.trajectories(iteration)
        for attempt, trajectory in enumerate(group.trajectories)
    }
    assert total == len(rows) == len(stored) == 24
    for row in rows:
        trajectory = stored[row["iteration"], row["group"], row["attempt"]]
        assert row["parts"] == pytest.approx(trajectory.process_reward())
        assert row["tokens"] == trajectory.num_tokens
        assert row["stop"] == trajectory.stop
        assert row["success"] == trajectory.outcome.success
        assert sum(row["events"].values()) == sum(len(s.events) for s in trajectory.steps)
    mean = sum(t.outcome.reward for t in stored.values()) / len(stored)
    assert index.mean("reward") == pytest.approx(mean)
    assert index.facets()["parts"].keys() == {"format", "reached", "answered"}


def test_filters_and_order(tmp_path):
    good = a_trajectory(0, [a_step("red apple", rewards={"format": 0.5})], reward=1.0)
    bad = a_trajectory(1, [a_step("green pear"), a_step(events=("fault/timeout:search",))])
    lost = a_trajectory(2, [], stop=StopReason.FAULT)
    run = make_run(tmp_path / "run", {1: [of(good, bad, lost)], 2: [of(good)]})
    index = EpisodeIndex(run).read_all()

    def places(**given):
        return [(r["iteration"], r["attempt"]) for r in index.find(query_of(given))[1]]

    assert places() == [(2, 1), (1, 1), (1, 2), (1, 3)]  # the newest first
    assert places(iteration="1") == [(1, 1), (1, 2), (1, 3)]
    assert places(success="0") == [(1, 2)]
    assert places(stop="fault") == [(1, 3)]
    assert places(event="fault/") == [(1, 2)]
    assert places(text="appl") == [(2, 1), (1, 1)]  # the beginning of a word
    assert places(text="apple red") == [(2, 1), (1, 1)]
    assert places(text="secret") == []  # all episodes have the system message
    assert places(**{"part/format": "0.4.."}) == [(2, 1), (1, 1)]
    assert places(turns="2..") == [(1, 2)]
    assert places(sort="turns", limit="1") == [(1, 2)]
    assert places(sort="part/format", order="ascending")[:2] == [(2, 1), (1, 1)]
    assert places(offset="3") == [(1, 3)]
    assert places(text='"; DROP TABLE episodes --') == []
    assert places(**{"part/x' OR 1=1 --": "0.."}) == []
    assert index.find(Query(ranges={"off_policy": (0.5, 0.5)}))[0] == 3


@pytest.mark.parametrize("given", [{"colour": "1"}, {"turns": "many"}, {"limit": "x"}])
def test_a_query_that_makes_no_sense_is_told(tmp_path, given):
    index = EpisodeIndex(make_run(tmp_path / "run", {1: [of(a_trajectory(0, [a_step()]))]}))
    with pytest.raises(ConfigError):
        index.find(query_of(given))


def test_ranges():
    assert parse_range("3..8") == (3, 8)
    assert parse_range("..8") == (None, 8)
    assert parse_range("3..") == (3, None)
    assert parse_range("3") == (3, 3)


def test_the_index_follows_the_files(tmp_path):
    episode = of(a_trajectory(0, [a_step()]))
    run = make_run(tmp_path / "run", {1: [episode], 2: [episode]})
    index = EpisodeIndex(run).read_all()
    assert index.missing() == []
    run.write_trajectories(2, [episode, dataclasses.replace(episode, number=1)], Estimates())
    run.write_trajectories(3, [episode], Estimates())
    run.trajectories_file(1).unlink()
    assert index.missing() == [3, 2]
    assert index.read_all().find(Query())[0] == 3
    assert EpisodeIndex(run).missing() == []  # a later look begins with what is known


def test_half_a_file_is_read_to_the_damage(tmp_path):
    group = of(a_trajectory(0, [a_step()]))
    run = make_run(tmp_path / "run", {1: [group, of(a_trajectory(0, [a_step()]))], 2: [group]})
    file = run.trajectories_file(1)
    lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
    file.write_bytes(gzip.compress(lines[0] + lines[1][:50]))
    index = EpisodeIndex(run).read_all()
    assert index.find(Query())[0] == 2
    assert list(index.damaged()) == [1] and "cannot be read" in index.damaged()[1]
    assert diagnose(run, index)[0].name == "damaged-file"


def test_an_index_that_is_broken_is_made_again(tmp_path):
    run = make_run(tmp_path / "run", {1: [of(a_trajectory(0, [a_step()]))]})
    EpisodeIndex(run).read_all()._file.write_bytes(b"no database" * 1000)
    assert EpisodeIndex(run).read_all().find(Query())[0] == 1


def test_several_threads_read_one_index(tmp_path):
    groups = {n: [of(a_trajectory(0, [a_step()]))] for n in range(1, 20)}
    run = make_run(tmp_path / "run", groups)
    threads = [threading.Thread(target=lambda: EpisodeIndex(run).read_all()) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert EpisodeIndex(run).find(Query())[0] == 19


def test_json_without_what_is_no_number():
    assert json.loads(as_json({"a": math.nan, "b": [math.inf, 1.5]})) == {
        "a": None,
        "b": [None, 1.5],
    }


def test_flat_figures(real):
    row = real.metrics()[-1]
    flat = flat_figures(row)
    assert flat["success"] == row["figures"]["success"]
    assert flat["seconds/rollout"] == row["seconds"]["rollout"]
    assert flat["memory_gib/process"] > 0.1
    assert flat["validation/success"] == row["validation"]["total"]["success"]
    assert flat["tool_calls"] > 0
    assert flat_figures({"figures": 3, "seconds": {"x": math.nan, "y": "1"}}) == {}


# What is stored of a call ----------------------------------------------------------------------


def test_a_step_holds_what_happened_beside_what_it_means(real):
    steps = [
        s for n in (1, 2) for g in real.trajectories(n) for t in g.trajectories for s in t.steps
    ]
    called = [step for step in steps if step.message.tool_calls]
    assert called
    for step in called:
        if step.results:  # the environment was asked: no limit came before
            assert len(step.results) == len(step.message.tool_calls)
            shown = [message.content for message in step.observation]
            for result, seen in zip(step.results, shown, strict=True):
                assert seen == (f"Error: {result.text}" if result.error else result.text)
    assert any(step.results for step in called)


# Diagnosis -------------------------------------------------------------------------------------


def rows_of(count, **figures):
    """Rows of metrics whose figures go from a first to a last value."""
    base = {"success": (0.4, 0.5), "groups_used": (6, 6), "groups_without_signal": (2, 2)}
    base |= {"entropy": (0.5, 0.45), "action_tokens": (50, 50), "stop/done": (64, 64)}
    table = base | figures
    return [
        {
            "iteration": n + 1,
            "figures": {k: a + (b - a) * n / (count - 1) for k, (a, b) in table.items()},
        }
        for n in range(count)
    ]


CASES = {
    "no-signal": {"groups_used": (1, 1), "groups_without_signal": (7, 7)},
    "entropy-collapse": {"entropy": (0.5, 0.001), "success": (0.4, 0.4)},
    "engine-differs": {"logprob_error": (0.1, 0.1)},
    "truncation": {"stop/max_turns": (60, 60), "stop/done": (4, 4)},
    "reward-hacking": {"process/format": (0.2, 0.9), "success": (0.6, 0.3)},
    "tool-faults": {"fault/timeout:search": (13, 13)},
    "mistakes": {"mistake/malformed_call": (40, 40)},
    "excluded-episodes": {"stop/fault": (5, 5)},
    "longer-not-better": {"action_tokens": (40, 200), "success": (0.4, 0.4)},
    "updates-skipped": {"updates_skipped": (1, 1)},
    "ratio-drift": {"clip_fraction": (0.5, 0.5)},
}


@pytest.mark.parametrize("name", CASES)
def test_each_finding_is_found_alone(tmp_path, name):
    steps = [dataclasses.replace(a_step(), action=Action((5,), (-0.5,), (0.7,), (), "stop"))]
    run = make_run(
        tmp_path / "run", {1: [of(a_trajectory(0, steps))]}, rows=rows_of(12, **CASES[name])
    )
    index = EpisodeIndex(run).read_all()
    found = diagnose(run, index)
    assert [finding.name for finding in found] == [name]
    assert found[0].evidence and found[0].cure
    index.find(query_of(found[0].episodes))  # its episodes can be asked for


def test_nothing_is_found_in_a_healthy_run(tmp_path):
    run = make_run(tmp_path / "run", {1: [of(a_trajectory(0, [a_step()]))]}, rows=rows_of(12))
    assert diagnose(run, EpisodeIndex(run).read_all()) == []


def test_findings_from_the_episodes(tmp_path):
    mute = a_trajectory(0, [a_step(call=False)])
    groups = {n: [of(mute, mute, a_trajectory(2, [a_step()]))] for n in range(10, 13)}
    run = make_run(tmp_path / "run", groups, rows=rows_of(12), limits=3)
    names = [finding.name for finding in diagnose(run, EpisodeIndex(run).read_all())]
    assert "answers-without-tools" in names
    assert "prompts-near-limit" in names


def test_advice_of_the_run_itself_is_repeated(tmp_path):
    rows = rows_of(4)
    rows[2]["advice"] = {"small-sets": "validation has 2 tasks"}
    run = make_run(tmp_path / "run", {1: [of(a_trajectory(0, [a_step()]))]}, rows=rows)
    (found,) = diagnose(run, EpisodeIndex(run).read_all())
    assert found.name == "small-sets" and "iteration 3" in found.evidence


# The window's answers --------------------------------------------------------------------------


@pytest.fixture
def client(real):
    return client_of(real.path.parent)


def client_of(*folders):
    return TestClient(make_app(Library(folders)), base_url="http://127.0.0.1:8765")


def test_runs_and_curves(client, real):
    answer = client.get("/api/runs").json()
    (run,) = answer["runs"]
    assert run["name"] == "real" and run["state"] == "finished" and run["iterations"] == 2
    curves = client.get("/api/curves/real").json()
    assert curves["iteration"] == [0, 1, 2]
    stored = [row["figures"]["reward"] for row in real.metrics()[1:]]
    assert curves["figures"]["reward"] == [None, *stored]
    assert curves["seconds"][0] == 0 < curves["seconds"][1] < curves["seconds"][2]
    detail = client.get("/api/run/real").json()
    assert detail["recipe"]["env.noise.fail"] == 0.1
    assert detail["facets"]["episodes"] == 24


def test_episodes_groups_and_explanations(client, real):
    rows = client.get("/api/episodes/real?sort=turns&limit=3").json()["rows"]
    assert len(rows) == 3
    place = f"{rows[0]['iteration']}/{rows[0]['group']}"
    group = client.get(f"/api/group/{place}/real").json()
    assert len(group["attempts"]) == 4
    assert group["unique_tokens"] == sum(node["tokens"] for node in group["tree"])
    assert group["unique_tokens"] < group["all_tokens"]
    episode = client.get(f"/api/episode/{place}/{rows[0]['attempt']}/real").json()
    tokens = episode["tokens"]
    stored, known = stored_group(real, *map(int, place.split("/")))
    trajectory = stored.trajectories[rows[0]["attempt"] - 1]
    assert len(tokens["id"]) == trajectory.num_tokens
    assert "".join(tokens["text"]) == tokenizer_of(real).decode(
        tokens["id"], skip_special_tokens=False
    )
    sampled = [i for i, kind in enumerate(tokens["kind"]) if kind == "action"]
    logprobs = [x for step in trajectory.steps for x in step.action.logprobs]
    assert [tokens["logprob"][i] for i in sampled] == logprobs
    keys = [StepKey(stored.number, rows[0]["attempt"] - 1, n) for n in range(len(trajectory.steps))]
    advantages = [x for key in keys for x in known.advantages[key]]
    assert [tokens["advantage"][i] for i in sampled] == advantages
    assert [i for i, trained in enumerate(tokens["trained"]) if trained] == sampled
    told = client.get(f"/api/explanation/{place}/{rows[0]['attempt']}/real").json()
    assert told["algorithms"][0]["name"].startswith("grpo")
    assert client.get("/api/diagnosis/real").json()["unread"] == 0


def test_the_page_itself_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.status_code == 200 and "view.js" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for file in ("view.js", "view.css"):
        answer = client.get(f"/{file}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in answer.text.replace("http://www.w3.org/", "")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8765"},
        {"host": "127.0.0.1.evil.example:8765"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_other_origins_are_refused(client, headers):
    for place in ("/", "/api/runs", "/view.js"):
        answer = client.get(place, headers=headers)
        assert answer.status_code == 403 and "real" not in answer.text


def test_the_page_is_answered_under_all_names_of_this_machine(real):
    for host in ("127.0.0.1:8765", "localhost:8765", "[::1]:8765", "localhost"):
        client = client_of(real.path.parent)
        answer = client.get("/api/runs", headers={"host": host, "origin": f"http://{host}"})
        assert answer.status_code == 200


def test_it_only_reads(client):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.request(method, "/api/runs").status_code == 403


@pytest.mark.parametrize(
    "place",
    [
        *("/api/run/..%2F..%2Fetc", "/api/run/%2Fetc%2Fpasswd", "/..%2f..%2fetc/passwd"),
        *("/%2e%2e/%2e%2e/etc/passwd", "/api/curves/../../etc/passwd", "/server.py"),
        *("/api/episodes/nothing", "/api/group/1/1/nothing", "/api/run/"),
    ],
)
def test_nothing_outside_of_the_folders_is_opened(client, place):
    answer = client.get(place)
    assert answer.status_code == 404
    assert "root:" not in answer.text


def test_links_are_not_followed(real, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(real.path)
    assert client_of(tmp_path / "runs").get("/api/runs").json()["runs"] == []


def test_wrong_places_are_told(client):
    for place in ("group/9/1/real", "group/1/99/real", "group/1/0/real", "episode/1/1/9/real"):
        answer = client.get(f"/api/{place}")
        assert answer.status_code == 400 and answer.json()["error"], place
    answer = client.get("/api/episodes/real?colour=1")
    assert answer.status_code == 400 and "colour" in answer.json()["error"]


def test_hostile_content_is_told_as_it_is(tmp_path):
    step = a_step(EVIL.replace("\ud83d", ""), result="x" * 1_000_000)
    hostile = of(a_trajectory(0, [step], question="\x00\x1b[31m" + "ש" * 10), a_trajectory(1, []))
    run = make_run(tmp_path / "runs" / "<b>evil</b>", {1: [hostile]})
    run.append_metrics({"iteration": 1, "figures": {"reward": math.nan, EVIL: 1e400}})
    client = client_of(tmp_path / "runs")
    name = "%3Cb%3Eevil%3C%2Fb%3E"
    for place in ("run/", "curves/", "episodes/", "diagnosis/", "group/1/1/", "episode/1/1/1/"):
        answer = client.get(f"/api/{place}{name}")
        assert answer.status_code == 200, (place, answer.text[:300])
        assert answer.headers["content-type"] == "application/json"
        answer.json()
    assert (
        "<script>" in client.get(f"/api/episode/1/1/1/{name}").json()["steps"][0]["said"]["content"]
    )


def test_broken_and_foreign_folders_are_shown_as_such(tmp_path, real):
    runs = tmp_path / "runs"
    shutil.copytree(real.path, runs / "bad-metrics")
    with (runs / "bad-metrics" / "metrics.jsonl").open("a") as file:
        file.write("no json\n{}\n")
    shutil.copytree(real.path, runs / "bad-recipe")
    (runs / "bad-recipe" / "recipe.json").write_bytes(b"\xff\xfe{")
    shutil.copytree(real.path, runs / "half-written")
    with (runs / "half-written" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "figu')
    (runs / "foreign").mkdir()
    (runs / "foreign" / "metrics.jsonl").write_text('{"loss": 1}\n')
    (runs / "empty").mkdir()
    shutil.copytree(real.path, runs / "no-model", ignore=shutil.ignore_patterns("checkpoints"))
    client = client_of(runs)
    found = {run["name"]: run for run in client.get("/api/runs").json()["runs"]}
    states = {name: run["state"] for name, run in found.items()}
    assert states == {
        "bad-metrics": "broken",
        "bad-recipe": "broken",
        "foreign": "broken",
        "half-written": "finished",
        "no-model": "finished",
    }
    assert "line" in found["bad-metrics"]["problem"] and "recipe" in found["bad-recipe"]["problem"]
    for name in found:  # what can be seen is seen
        assert client.get(f"/api/run/{name}").status_code == 200
        assert client.get(f"/api/curves/{name}").status_code == 200
    assert client.get("/api/run/bad-metrics").json()["facets"]["episodes"] == 24
    tokens = client.get("/api/episode/1/1/1/no-model").json()["tokens"]
    assert set(tokens["text"]) == {None} and all(tokens["id"])  # without a tokenizer, ids alone


def test_a_run_that_is_at_work_is_running(tmp_path, real):
    shutil.copytree(real.path, tmp_path / "runs" / "now")
    run = RunFolder(tmp_path / "runs" / "now")
    client = client_of(run.path.parent)
    assert client.get("/api/run/now").json()["state"] == "finished"
    with run.locked():
        summary = client.get("/api/run/now").json()
        assert summary["state"] == "running" and summary["seconds_left"] == 0
        assert not client.get("/api/runs").json()["runs"][0]["problem"]
    assert not run.is_running()


def test_runs_of_one_name_in_two_folders(tmp_path, real):
    for folder in ("a", "b"):
        shutil.copytree(real.path, tmp_path / folder / "deep" / "run")
    client = client_of(tmp_path / "a", tmp_path / "b")
    names = [run["name"] for run in client.get("/api/runs").json()["runs"]]
    assert names == ["deep/run", "deep/run (2)"]
    assert client.get("/api/run/deep/run%20(2)").json()["facets"]["episodes"] == 24
    assert client.get("/api/runs").json()["differences"] == {}


def test_a_rewritten_history_is_context(tmp_path):
    rewritten = dataclasses.replace(a_step(), context_ids=(1, 2, 3, 11, 12))
    run = make_run(tmp_path / "run", {1: [of(a_trajectory(0, [a_step(), rewritten]))]})
    group, known = stored_group(run, 1, 1)
    data = episode_data(group, known, 1, None)
    kinds = list(zip(data["tokens"]["id"], data["tokens"]["kind"], strict=True))
    assert (11, "context") in kinds and (3, "context") not in kinds
    tree = group_data(group, known, None)["tree"]
    assert {node["kind"] for node in tree} == {"observation", "action", "context"}


# What a stranger found ---------------------------------------------------------------------------


def test_one_bad_folder_leaves_the_others(tmp_path, real):
    runs = tmp_path / "runs"
    shutil.copytree(real.path, runs / "good")
    for name, line in (
        ("list", "[1]"),
        ("number", "5"),
        ("huge", '{"iteration": 1, "figures": {}}'),
    ):
        shutil.copytree(real.path, runs / name)
        (runs / name / "metrics.jsonl").write_text(line + "\n")
    huge = {"iteration": 1, "figures": {"reward": 10**400}}
    (runs / "huge" / "metrics.jsonl").write_text(json.dumps(huge) + "\n")
    (runs / "pipe").mkdir()
    os.mkfifo(runs / "pipe" / "metrics.jsonl")
    (runs / os.fsdecode(b"no \xff text")).mkdir()
    (runs / os.fsdecode(b"no \xff text") / "metrics.jsonl").touch()
    found = {run["name"]: run["state"] for run in client_of(runs).get("/api/runs").json()["runs"]}
    assert found.pop("huge") == "stopped" and found.pop("good") == "finished"
    assert found == {"list": "broken", "number": "broken", "pipe": "broken"}


def test_an_index_that_is_in_use_is_not_thrown_away(tmp_path):
    run = make_run(tmp_path / "run", {1: [of(a_trajectory(0, [a_step()]))]})
    index = EpisodeIndex(run).read_all()
    inode = index._file.stat().st_ino
    with sqlite3.connect(index._file) as other:
        other.execute("BEGIN IMMEDIATE")
        again = []
        thread = threading.Thread(target=lambda: again.append(EpisodeIndex(run)))
        thread.start()
        time.sleep(0.3)
        other.rollback()
        thread.join()
    assert again[0].find(Query())[0] == 1 and index._file.stat().st_ino == inode


def test_damaged_pages_are_noticed(tmp_path):
    run = make_run(tmp_path / "run", {n: [of(a_trajectory(0, [a_step()]))] for n in range(1, 9)})
    file = EpisodeIndex(run).read_all()._file
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = bytearray(file.read_bytes())
    data[4096 : 4096 * 9] = b"\xa5" * (4096 * 8)
    file.write_bytes(data)
    assert EpisodeIndex(run).read_all().find(Query())[0] == 8


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    run = make_run(tmp_path / "run", {1: [of(a_trajectory(0, [a_step()]))]})
    assert EpisodeIndex(run).read_all().find(Query())[0] == 1


def test_a_name_that_moves_to_another_folder(tmp_path, real):
    for folder in ("a", "b"):
        shutil.copytree(real.path, tmp_path / folder / "x")
    library = Library([tmp_path / "a", tmp_path / "b"])
    assert [view.name for view in library.views()] == ["x", "x (2)"]
    shutil.rmtree(tmp_path / "a" / "x")
    (view,) = library.views()
    assert view.run.path == tmp_path / "b" / "x" and view.summary()["state"] == "finished"


def test_a_link_to_the_page_can_be_followed(client):
    clicked = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}
    assert client.get("/", headers=clicked).status_code == 200
    assert client.get("/api/runs", headers=clicked).status_code == 403
    assert client.get("/", headers={**clicked, "host": "evil.example"}).status_code == 403


def test_no_finding_tells_old_news_or_what_is_no_number(tmp_path):
    rows = rows_of(30, **{"updates_skipped": (0, 0), "groups_used": (0, 0), "success": (0.9, 0.9)})
    rows[0]["advice"] = {"small-sets": "long ago"}
    rows[2]["figures"]["updates_skipped"] = 1
    rows[29]["figures"]["groups_without_signal"] = 8
    run = make_run(tmp_path / "run", {29: [of(a_trajectory(0, [a_step()]))]}, rows=rows)
    found = diagnose(run, EpisodeIndex(run).read_all())
    assert [finding.name for finding in found] == ["ratio-drift"]
    assert "nan" not in found[0].evidence


def test_foreign_text_moves_no_cursor(tmp_path, capsysbinary):
    rows = rows_of(4)
    rows[3]["advice"] = {"\x1b]0;pwned\x07": EVIL.replace("\ud83d", "")}
    step = a_step(
        EVIL.replace("\ud83d", ""), rewards={"[/red]\x1b[2J": 1.0}, events=("fault/\x1b[2J",)
    )
    run = make_run(tmp_path / "my runs", {3: [of(a_trajectory(0, [step]))]}, rows=rows)
    for command in ("diagnose", "episodes"):
        assert main([command, str(run.path)]) == 0
        said = capsysbinary.readouterr()
        assert b"\x1b" not in said.out and "\u202e".encode() not in said.out


def test_raw_results_can_be_searched(tmp_path):
    step = dataclasses.replace(a_step(), results=(CallResult("search", "zebra"),))
    run = make_run(tmp_path / "run", {1: [of(a_trajectory(0, [step]))]})
    index = EpisodeIndex(run).read_all()
    assert index.find(query_of({"text": "zebra"}))[0] == 1
    assert index.find(query_of({"text": "zebra\x00 \x00", "offset": "9" * 30}))[0] == 1


def test_nobody_is_warned_of_rewards_that_are_not_learned_from(tmp_path):
    rows = rows_of(12, **CASES["reward-hacking"])
    run = make_run(tmp_path / "run", {1: [of(a_trajectory(0, [a_step()]))]}, rows=rows)
    data = run.recipe_data() | {"credit": {"name": "outcome"}}
    (run.path / "recipe.json").write_text(json.dumps(data))
    assert diagnose(run, EpisodeIndex(run).read_all()) == []
    data |= {"credit": {"name": "step", "weights": {"format": 0.0}}}
    (run.path / "recipe.json").write_text(json.dumps(data))
    assert diagnose(run, EpisodeIndex(run).read_all()) == []


def test_half_precision_alone_is_no_finding(tmp_path):
    run = make_run(
        tmp_path / "run",
        {1: [of(a_trajectory(0, [a_step()]))]},
        rows=rows_of(12, logprob_error=(0.15, 0.15)),
    )
    data = run.recipe_data()
    data["model"]["dtype"] = "bfloat16"
    (run.path / "recipe.json").write_text(json.dumps(data))
    assert diagnose(run, EpisodeIndex(run).read_all()) == []
