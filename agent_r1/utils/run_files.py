"""The names of the files of a run folder. Whoever reads or writes there takes them from here; what
they hold is told in ``run/folder.py`` and ``run/checkpoint.py``.
"""

from __future__ import annotations

from pathlib import Path

RECIPE = "recipe.json"
CONTENTS = "contents.json"
METRICS = "metrics.jsonl"
TRAJECTORIES = "trajectories"
CHECKPOINTS = "checkpoints"
RESULT = "result.json"
CURVE = "curve.png"
LOCK = ".lock"
TRACKERS = "trackers"
# In a checkpoint, beside the model:
STATE = "state.json"
TRAINER = "trainer.pt"
WAITING = "waiting.jsonl.gz"
BEST, LAST = "best", "last"
LINKS = (BEST, LAST)


def is_run(folder: str | Path) -> bool:
    """Whether a folder is that of a run."""
    return (Path(folder) / RECIPE).exists()
