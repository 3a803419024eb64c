"""What runs on a GPU, as far as a machine without one can tell; the rest is ``pytest -m gpu``."""

import subprocess
import sys
from pathlib import Path

from tests.families import FAMILIES

ROOT = Path(__file__).parents[2]


def test_learner_and_engine_run_on_a_pretended_gpu_for_every_family():
    command = [sys.executable, "tests/model/on_a_pretended_gpu.py"]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [family, kind] for family in FAMILIES for kind in ("whole", "adapter")
    ]
