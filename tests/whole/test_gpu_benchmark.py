"""``benchmarks/gpu.py`` tried without a card: every quick part gives its figures, and an error in
one does not keep the next from running.
"""

import importlib
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from tests import ROOT

BENCHMARKS = ROOT / "benchmarks"
QUICK = ("machine", "exactness", "gradients", "decode", "learner", "memory", "shortage")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The process and its report: a part that cannot work, then the quick ones."""
    folder = tmp_path_factory.mktemp("gpu")
    out = folder / "new" / "report.json"
    parts = [word for name in ("multihop", *QUICK) for word in ("--part", name)]
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--small", *parts]
    command += ["--data", folder / "nowhere", "--out", out]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert out.exists(), process.stderr[-3000:]
    return process, json.loads(out.read_text())


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


def test_an_error_is_recorded_and_the_next_part_runs(done):
    process, report = done
    error = report["multihop"]["error"]
    assert error["type"] == "ConfigError"
    assert "nowhere" in error["message"]
    assert "File" in error["trace"]
    assert [name for name in report if name in ("multihop", *QUICK)] == ["multihop", *QUICK]
    assert process.returncode == 1, process.stderr[-3000:]


@pytest.mark.parametrize("part", QUICK)
def test_each_part_writes_its_figures(done, part):
    figures = done[1][part]
    assert '"error":' not in json.dumps(figures), figures
    assert figures.keys() > {"part_seconds"}


def test_the_figures_say_what_they_should(done):
    _, report = done
    exact, half = (report["exactness"][f"llama {name}"] for name in ("float32", "bfloat16"))
    assert exact.keys() == {"packed against plain", "engine against learner"}
    assert all(0 <= pair["mean"] <= pair["max"] < 1e-3 for pair in exact.values())
    assert all(0 < pair["mean"] <= pair["max"] < 0.5 for pair in half.values())
    assert report["gradients"]["float32"]["packed against padded"]["relative"] < 1e-4
    passes = report["decode"]["tiny x 4"]
    assert passes["passes"] >= 10
    assert passes["sequences_a_pass"] == 4
    assert 0 < passes["ms_a_pass"] <= passes["ms_a_pass_with_the_event_loop"]
    tree = report["learner"]["tiny, 4 episodes, tree"]
    rows = report["learner"]["tiny, 4 episodes, padded rows"]
    assert tree["tokens"] < tree["tokens_as_sequences"] == rows["tokens"]
    assert rows["tokens"] < rows["tokens_with_padding"]
    assert tree["grad_norm"] == pytest.approx(rows["grad_norm"], rel=1e-4)
    assert tree["share_of_peak"] > 0
    assert report["memory"]["tiny, whole"]["planned_gib"] > 0
    update = report["shortage"]["update"]
    assert update["restarts"] >= 1
    assert update["relative_difference"] < 1e-4


# How parts are run --------------------------------------------------------------------------------


def bench(seconds):
    return types.SimpleNamespace(deadline=time.monotonic() + seconds)


@pytest.fixture
def part(gpu, monkeypatch):
    """Makes a function a part; returns its name."""

    def make(function):
        module = types.ModuleType("gpu_parts.made")
        module.made = function
        monkeypatch.setitem(sys.modules, "gpu_parts.made", module)
        monkeypatch.setitem(gpu.PARTS, "made", gpu.Part("made", 5))
        return "made"

    return make


def test_a_part_that_takes_too_long_is_stopped_and_keeps_its_figures(gpu, part, tmp_path):
    def endless(_):
        yield "first", 1
        while True:
            time.sleep(0.01)

    report = gpu.Report(tmp_path / "out.json", {})
    gpu.run(part(endless), bench(0.2), report, end=time.monotonic() + 60)
    found = json.loads((tmp_path / "out.json").read_text())["made"]
    assert found["first"] == 1
    assert found["error"]["type"] == "OutOfTimeError"
    assert gpu.has_error(report.content)


def test_figures_before_an_error_are_written_at_once(gpu, part, tmp_path):
    out = tmp_path / "out.json"

    def halfway(_):
        yield "first", {"a": 1}
        assert json.loads(out.read_text())["made"] == {"first": {"a": 1}}
        raise ValueError("x" * 5000)

    gpu.run(part(halfway), bench(5), gpu.Report(out, {}), end=time.monotonic() + 60)
    error = json.loads(out.read_text())["made"]["error"]
    assert error["type"] == "ValueError"
    assert len(error["message"]) < 1000
    assert "halfway" in error["trace"]


def test_what_does_not_fit_is_left_out(gpu, part, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    name = part(lambda _: iter([("never", 1)]))
    arguments = types.SimpleNamespace(
        out=Path(tmp_path / "out.json"), minutes=0.005, device="cpu", small=False, data=None,
        model="",
    )  # fmt: skip
    content = gpu.everything(arguments, [name])
    assert "left out" in content["made"]
    assert not gpu.has_error(content)
