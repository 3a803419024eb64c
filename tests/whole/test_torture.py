"""The machine that looks for faults, in a short form with fixed seeds; and that it finds some."""

import json
import shutil
import subprocess
import sys

import pytest

from torture.common import Ended, Tally


@pytest.fixture(scope="module")
def tally(tmp_path_factory):
    """In a process of its own: it forks, and wants no threads about."""
    out = tmp_path_factory.mktemp("torture")
    words = [sys.executable, "-m", "torture", "--share", "0.03", "--seed", "1", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    result = json.loads((out / "counts.json").read_text())
    return done.returncode, result


def test_nothing_of_what_it_tries_is_a_fault(tally):
    code, result = tally
    assert result["faults"] == []
    assert code == 0
    kinds = {"kills", "power cuts", "recipes", "environments", "run folders", "models", "data"}
    assert kinds <= result["counts"].keys()
    assert all(row["all"] > 0 for row in result["counts"].values())


def test_it_tells_the_ways_to_end_apart(tmp_path):
    tally = Tally(tmp_path / "faults")
    for code, text in [
        (0, "ok"), (2, "agent-r1: no"), (1, "Traceback (most recent call last)"), (None, ""),
        (1, "agent-r1: KeyError: 'x' (--debug shows more)"), (-11, ""), (3, ""),
    ]:  # fmt: skip
        tally.note("kind", Ended(code, text).verdict, [code, text], text)
    counts = tally.table()["kind"]
    assert counts == {
        "clear": 1, "accepted": 1, "traceback": 4, "hang": 1, "silent": 0, "all": 7,
    }  # fmt: skip
    written = sorted((tmp_path / "faults").iterdir())
    assert len(written) == 5
    assert json.loads(written[0].read_text())["case"][0] == 1


def test_it_finds_faults_that_are_put_in(tmp_path):
    """A renderer that lets text through, and a disk that never has what it was told to have."""
    broken = (
        "import sys\n"
        "from torture import machine\n"
        "real = machine.one\n"
        "def one(kind, count, seed, out):\n"
        "    if kind == 'control':\n"
        "        from agent_r1.render.template import ChatTemplate\n"
        "        ChatTemplate._harmless = lambda self, value, marked: value\n"
        "        ChatTemplate._odd = lambda self, value: None\n"
        "    if kind == 'power_cuts':\n"
        "        from torture import kills\n"
        "        kills.Disk.synced = lambda self, descriptor: None\n"
        "    return real(kind, count, seed, out)\n"
        "from pathlib import Path\n"
        "tally = one(sys.argv[1], int(sys.argv[2]), 3, Path(sys.argv[3]))\n"
        "sys.exit(len(tally.faults) > 0)\n"
    )
    for kind, count in (("control", 60), ("power_cuts", 8)):
        out = tmp_path / kind
        out.mkdir()
        words = [sys.executable, "-c", broken, kind, str(count), str(out)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1, (kind, done.stderr[-2000:])
        assert list(out.rglob("faults/*/*.json"))
        shutil.rmtree(out)
