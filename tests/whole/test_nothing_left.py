"""Two runs in one process see nothing of each other, and leave nothing behind."""

import json
import os
import subprocess
import sys

from tests import ROOT


def test_two_runs_one_after_the_other_and_side_by_side(tmp_path):
    script = ROOT / "tests" / "whole" / "two_runs" / "main.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    before = said["states"].pop("before")
    for after, state in said["states"].items():
        assert state == before, after
    assert said["together"] == said["alone"]
    for figures in said["alone"].values():
        assert not any("stop/fault" in row for row in figures)
