"""Trackers of experiments that a recipe can name, beside ``metrics.jsonl``, which is always
written. A new one is a file with a class like those here, and a line in ``TRACKERS``, or no line at
all when the recipe names it as ``"my_tracker.py:MyTracker"``.
"""

from __future__ import annotations

from agent_r1.config.registry import Registry
from agent_r1.run.trackers.base import Tracker

TRACKERS: Registry[Tracker] = Registry(
    "tracker",
    {
        "tensorboard": "agent_r1.run.trackers.tensorboard:TensorBoard",
        "wandb": "agent_r1.run.trackers.wandb:WandB",
        "mlflow": "agent_r1.run.trackers.mlflow:MLflow",
        "trackio": "agent_r1.run.trackers.trackio:Trackio",
    },
)
