"""Weights & Biases. Without a key (``wandb login``) the run is written offline, in its own folder;
``wandb sync`` sends it later.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from agent_r1.run.trackers.base import Beginning, TrackerSettings, must_have
from agent_r1.utils.durable import write_atomically
from agent_r1.utils.log import LOG


class WandB:
    """One W&B run for one run, also after a kill."""

    class Settings(TrackerSettings):
        """Names of W&B.

        Attributes:
            project, entity: Where the run stands.
            mode: ``"online"`` or ``"offline"``; by default what ``WANDB_MODE`` says, else online if
                a key is known.
        """

        name: str = "wandb"
        project: str = "agent-r1"
        entity: str | None = None
        mode: Literal["online", "offline"] | None = None

    def __init__(self, settings: Settings) -> None:
        must_have("wandb", "wandb")
        self.settings = settings

    def start(self, beginning: Beginning) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of its own authors'
        import wandb

        known = beginning.folder / "id"
        if not known.exists():
            write_atomically(known, uuid.uuid4().hex[:12])
        mode: Any = self.settings.mode or os.environ.get("WANDB_MODE")
        if mode is None:
            mode = "online" if wandb.api.api_key else "offline"
        self._run = wandb.init(
            project=self.settings.project,
            entity=self.settings.entity,
            name=beginning.name,
            id=known.read_text(),
            config=dict(beginning.settings),
            dir=str(beginning.folder),
            mode=mode,
            resume="allow",
            reinit="create_new",  # other runs of this process stay
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_transaction_log_flush_interval=1.0,
            ),
        )
        # A step of W&B's own could not come a second time, after a kill.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        if mode == "offline":
            LOG.info(f"wandb writes offline; `wandb sync {beginning.folder}/wandb/offline-run-*`")

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **figures})

    def table(self, iteration: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({"iteration": iteration, "episodes": table})

    def close(self) -> None:
        self._run.finish()
