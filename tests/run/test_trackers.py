"""Trackers, each with its real package, against metrics.jsonl."""

import json
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import time

import pytest

import agent_r1
from agent_r1.errors import ConfigError
from agent_r1.run.figures import flat_figures
from agent_r1.run.folder import RunFolder
from agent_r1.run.trackers import TRACKERS
from agent_r1.run.trackers.sending import Senders
from tests.commands import Command
from tests.commands import agent_r1 as command

DONE, SAID = agent_r1.StopReason.DONE, agent_r1.Message("assistant", "done")
NAMES = ("tensorboard", "wandb", "mlflow", "trackio")
SMALL = (
    *("--train.tasks=2", "--train.attempts=2", "--evaluation.tasks=2", "--evaluation.test_tasks=0"),
    *("--evaluation.every=2", "--checkpoint.every=1", "--threads=1", "--limits.turns=3"),
)
OVERRIDES = {word[2:].partition("=")[0]: json.loads(word.partition("=")[2]) for word in SMALL}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run with all trackers that was killed after some iterations and went on."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(home))
        patch.setenv("TRACKIO_DIR", str(home / "trackio"))
        run = home / "runs" / "killed"
        trackers = json.dumps(list(NAMES))
        words = ("train", "hopworld", "--run", run, "--trackers", trackers, "--train.iterations=5")
        first = Command(*words, *SMALL)
        deadline = time.monotonic() + 200
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 4:
            assert first.poll() is None and time.monotonic() < deadline, first.printed
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
        resumed = command("train", "--resume", run)
        assert resumed.returncode == 0, resumed.stderr
        said = resumed.stdout + resumed.stderr
        assert "tracker '" not in said, said
        yield RunFolder(run)


def read_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run.path / "trackers" / "tensorboard"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in found.setdefault(event.step, {})  # what was void is not shown
            found[event.step][name] = event.value
    tables = {event.step: event.tensor_proto.string_val[0] for event in events.Tensors("episodes")}
    return found, {step: text.decode() for step, text in tables.items()}


def read_wandb(run):
    folder = run.path / "trackers" / "wandb"
    name = (folder / "id").read_text()
    files = sorted(folder.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert 1 <= len(files) <= 2  # one for each process, of one W&B run
    found, tables = {}, {}
    for file in files:
        for record in wandb_records(file.read_bytes()):
            if record.WhichOneof("record_type") != "history":
                continue
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            if "episodes/path" in row:
                table = file.parent / "files" / row["episodes/path"]
                tables[row["iteration"]] = table.read_text()
            elif (iteration := row.pop("iteration", None)) is not None:
                found[iteration] = {k: v for k, v in row.items() if not k.startswith("_")}
    return found, tables


def wandb_records(data):
    """The records of a .wandb file: LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        if not kind or at + 7 + size > len(data):
            return
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(whole)
            whole = b""


def read_mlflow(run):
    from mlflow import MlflowClient

    folder = run.path / "trackers" / "mlflow"
    client, name = MlflowClient(f"sqlite:///{folder}/mlflow.db"), (folder / "id").read_text()
    stored = client.get_run(name)
    assert stored.info.status == "FINISHED" and stored.data.params["env.name"] == '"hopworld"'
    found = {}
    for key in stored.data.metrics:
        for metric in client.get_metric_history(name, key):  # the last of a step counts
            found.setdefault(metric.step, {})[key] = metric.value
    files = (folder / "artifacts").rglob("*.jsonl")
    return found, {int(file.stem): file.read_text() for file in files}


def read_trackio(run):
    """In a process of its own: Trackio reads where its folder is when it is imported."""
    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage; "
        "json.dump(SQLiteStorage.get_logs('agent-r1', sys.argv[1]), sys.stdout)"
    )
    name = (run.path / "trackers" / "trackio" / "name").read_text()
    words = [sys.executable, "-c", code, name]
    told = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found, tables = {}, {}
    for row in json.loads(told):
        step = row.pop("step")
        if "episodes" in row:
            tables[step] = json.dumps(row["episodes"])
        else:
            found[step] = {k: v for k, v in row.items() if k != "timestamp"}
    return found, tables


READERS = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_has_the_figures_of_the_metrics(killed, name):
    found, tables = READERS[name](killed)
    rows = {row["iteration"]: flat_figures(row) for row in killed.metrics()}
    assert found.keys() == rows.keys() == {0, 1, 2, 3, 4, 5}
    for iteration, figures in rows.items():
        if name == "tensorboard":  # float32
            figures = {k: struct.unpack("f", struct.pack("f", v))[0] for k, v in figures.items()}
        assert found[iteration] == figures, iteration
    assert tables.keys() <= {1, 2, 3, 4, 5} and len(tables) >= 3  # a kill may cost samples
    task = next(killed.trajectories(5)).task
    assert task.id in tables[5] and "5/1/" in tables[5]


def own_tracker(tmp_path, body):
    (tmp_path / "mine.py").write_text(
        "import time, json\n"
        "from agent_r1.run.trackers.base import TrackerSettings\n"
        "class Mine:\n"
        "    class Settings(TrackerSettings):\n"
        "        path: str\n"
        "    def __init__(self, settings):\n"
        "        self.path, self.calls = settings.path, 0\n"
        "    def note(self, *words):\n"
        "        with open(self.path, 'a') as file:\n"
        "            file.write(json.dumps(words) + '\\n')\n"
        "    def start(self, begun): self.note('start', begun.first, begun.is_resumed)\n"
        "    def log(self, iteration, figures):\n"
        "        self.note('log', iteration, figures.get('seconds/total', 0))\n"
        "    def table(self, iteration, columns, rows): self.note('table', iteration, len(rows))\n"
        "    def close(self): self.note('close')\n"
        f"{body}"
    )
    return {"name": f"{tmp_path / 'mine.py'}:Mine", "path": str(tmp_path / "told.jsonl")}


def told(tmp_path):
    file = tmp_path / "told.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def train(tmp_path, section, iterations=2, **more):
    overrides = {**OVERRIDES, "train.iterations": iterations, "trackers": section, **more}
    return agent_r1.train("hopworld", run=tmp_path / "run", overrides=overrides)


def send(tmp_path, sections, iterations=2):
    """What a run does with its trackers, without training; called again, it goes on."""
    recipe, _ = agent_r1.load_recipe({"env": "hopworld", "trackers": sections})
    run = RunFolder(tmp_path / "run")
    if not run.path.exists():
        run = RunFolder.create(run.path, recipe)
    senders = Senders(recipe.trackers, run)
    for iteration in range(len(run.metrics()), iterations + 1):
        row = {"iteration": iteration, "figures": {"reward": 0.5}}
        run.append_metrics(row)
        outcome = agent_r1.Outcome(1.0, True)
        steps = [agent_r1.Step(agent_r1.Action((1,), (-0.1,), (0.1,), (), "stop"), SAID)]
        episode = agent_r1.Trajectory("t", "", 0, (), (1,), steps, DONE, outcome)
        senders.log(row, [agent_r1.Group(agent_r1.Task("t", "q"), [episode])] if iteration else ())
    senders.close()
    return run.metrics()


def test_a_tracker_of_ones_own(tmp_path):
    section = own_tracker(tmp_path, "")
    result = train(tmp_path, [section])
    seconds = [row["seconds"]["total"] for row in result.metrics[1:]]
    assert told(tmp_path) == [
        ["start", 0, False],
        ["log", 0, 0],
        *(["log", 1, seconds[0]], ["table", 1, 2]),
        *(["log", 2, seconds[1]], ["table", 2, 2]),
        ["close"],
    ]
    agent_r1.resume(tmp_path / "run", iterations=3)
    again = told(tmp_path)[7:]
    assert [line[:2] for line in again] == [
        ["start", 0],  # the last rows once more, in case they were lost in a kill
        *(["log", 0], ["log", 1], ["log", 2], ["log", 3], ["table", 3], ["close"]),
    ]


def test_a_tracker_that_is_new_to_a_run_is_told_all_of_it(tmp_path):
    send(tmp_path, [])
    send(tmp_path, [own_tracker(tmp_path, "")], 3)
    assert [line[:2] for line in told(tmp_path) if line[0] == "log"] == [
        ["log", n] for n in range(4)
    ]


def test_a_tracker_that_fails_ends_nothing_and_is_tried_again(tmp_path, caplog):
    body = (
        "    def log(self, iteration, figures):\n"
        "        self.calls += 1\n"
        "        if self.calls < 3: raise SystemExit('the network is away')\n"
        "        self.note('log', iteration)\n"
    )
    with caplog.at_level(logging.WARNING, "agent_r1"):
        metrics = send(tmp_path, [own_tracker(tmp_path, body)])
    assert len(metrics) == 3
    assert [line[1] for line in told(tmp_path) if line[0] == "log"] == [0, 1, 2]  # none is lost
    warnings = [r.getMessage() for r in caplog.records if "tracker" in r.getMessage()]
    assert len(warnings) == 1 and "the network is away" in warnings[0]


def test_what_could_not_be_sent_is_told(tmp_path, caplog):
    body = "    def start(self, beginning): raise RuntimeError('no server')\n"
    with caplog.at_level(logging.WARNING, "agent_r1"):
        metrics = send(tmp_path, [own_tracker(tmp_path, body)])
    assert len(metrics) == 3
    warnings = [r.getMessage() for r in caplog.records if "tracker" in r.getMessage()]
    assert "no server" in warnings[0] and "could not be sent" in warnings[1]


def test_a_tracker_that_hangs_holds_up_nothing(tmp_path, caplog, monkeypatch):
    from agent_r1.run.trackers import sending

    monkeypatch.setattr(sending, "CLOSE_SECONDS", 0.5)
    body = "    def log(self, iteration, figures): time.sleep(1000)\n"
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "agent_r1"):
        result = train(tmp_path, [own_tracker(tmp_path, body), "tensorboard"])
    assert len(result.metrics) == 3 and time.monotonic() - start < 100
    assert any("left behind" in record.getMessage() for record in caplog.records)
    found, _ = read_tensorboard(RunFolder(tmp_path / "run"))
    assert found.keys() == {0, 1, 2}  # the other one is told everything


def test_figures_that_are_no_numbers_are_left_out():
    row = {"figures": {"a": math.nan, "b": math.inf, "c": None, "d": [1], "e": 2}}
    assert flat_figures(row) == {"e": 2.0}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("tensorbord", "did you mean 'tensorboard'"),
        ({"name": "wandb", "projct": "x"}, "did you mean 'project'"),
        ({"name": "wandb", "mode": "sometimes"}, "mode"),
        ([3], "neither a section nor a name"),
        (3, "trackers"),
    ],
)
def test_a_wrong_section_is_told(section, words):
    with pytest.raises(ConfigError, match=words):
        agent_r1.load_recipe({"env": "hopworld", "trackers": section})


@pytest.mark.parametrize("name", NAMES)
def test_a_package_that_is_missing_is_told_before_anything_is_made(tmp_path, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    recipe, _ = agent_r1.load_recipe({"env": "hopworld", "trackers": name})
    with pytest.raises(ConfigError, match=rf"agent-r1\[{name}\]"):
        TRACKERS.make(recipe.trackers[0])


def test_preflight_asks_for_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "agent_r1.run.trackers.wandb.must_have",
        lambda name, *modules: (_ for _ in ()).throw(ConfigError(f"tracker {name!r} needs it")),
    )
    with pytest.raises(ConfigError, match="wandb"):
        train(tmp_path, "wandb")
    assert not (tmp_path / "run").exists()
    assert os.listdir(tmp_path) == []


def test_only_the_last_rows_are_told_again(tmp_path, monkeypatch):
    from agent_r1.run.trackers import sending

    monkeypatch.setattr(sending, "AGAIN", 1)
    section = own_tracker(tmp_path, "")
    send(tmp_path, [section])
    send(tmp_path, [section], 3)
    assert [line[1] for line in told(tmp_path) if line[0] == "log"] == [0, 1, 2, 2, 3]
    assert ["start", 2, True] in told(tmp_path)


def test_a_table_that_is_refused_costs_no_figures(tmp_path, caplog):
    body = "    def table(self, iteration, columns, rows): raise PermissionError('no artifacts')\n"
    with caplog.at_level(logging.WARNING, "agent_r1"):
        send(tmp_path, [own_tracker(tmp_path, body)])
    assert [line[0] for line in told(tmp_path)] == ["start", "log", "log", "log", "close"]
    assert sum("tracker" in record.getMessage() for record in caplog.records) == 1


def test_two_trackers_of_one_kind_have_folders_of_their_own(tmp_path):
    send(tmp_path, [own_tracker(tmp_path, ""), own_tracker(tmp_path, "")])
    assert sum(line[0] == "close" for line in told(tmp_path)) == 2
    folders = sorted(f.name for f in (tmp_path / "run" / "trackers").iterdir())
    assert folders == ["Mine", "Mine-2"]


def test_a_broken_folder_of_a_tracker_ends_nothing(tmp_path, caplog):
    section = own_tracker(tmp_path, "")
    send(tmp_path, [section], 1)
    (tmp_path / "run" / "trackers" / "Mine" / "sent").write_text("")
    send(tmp_path, [section], 2)
    assert [line[1] for line in told(tmp_path) if line[0] == "log"] == [0, 1, 0, 1, 2]
    folder = tmp_path / "run" / "trackers"
    folder.rename(tmp_path / "moved")
    folder.touch()
    with caplog.at_level(logging.WARNING, "agent_r1"):
        assert len(send(tmp_path, [section], 3)) == 4
    assert any("could not be sent" in record.getMessage() for record in caplog.records)


def test_a_tracker_that_starts_late_is_told_everything(tmp_path):
    body = (
        "    def start(self, begun):\n"
        "        open(self.path + '.tries', 'a').write('x')\n"
        "        if len(open(self.path + '.tries').read()) < 3: raise OSError('not yet')\n"
    )
    send(tmp_path, [own_tracker(tmp_path, body)])
    assert [line[1] for line in told(tmp_path) if line[0] == "log"] == [0, 1, 2]
