"""MLflow: a server, or by default a database in the run's folder; with the whole package ``mlflow``
``mlflow ui --backend-store-uri sqlite:///RUN/trackers/mlflow/mlflow.db`` shows it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from agent_r1.run.trackers.base import Beginning, TrackerSettings, must_have
from agent_r1.utils.durable import write_atomically

BATCH = 100
"""Most parameters of one request."""


class MLflow:
    """One MLflow run for one run, also after a kill."""

    class Settings(TrackerSettings):
        """Names of MLflow.

        Attributes:
            experiment: Where the run stands.
            tracking_uri: The server; by default ``MLFLOW_TRACKING_URI``, else a local database.
        """

        name: str = "mlflow"
        experiment: str = "agent-r1"
        tracking_uri: str | None = None

    def __init__(self, settings: Settings) -> None:
        must_have("mlflow", "mlflow", "sqlalchemy", "alembic")
        self.settings = settings

    def start(self, beginning: Beginning) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        local = f"sqlite:///{beginning.folder.resolve()}/mlflow.db"
        uri = self.settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        known = beginning.folder / "id"
        if not known.exists():  # killed while it made its tables, MLflow would never go on
            (beginning.folder / "mlflow.db").unlink(missing_ok=True)
        self._client = MlflowClient(tracking_uri=uri)
        if known.exists():
            self._run = known.read_text()
            self._client.update_run(self._run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self.settings.experiment)
        artifacts = (beginning.folder.resolve() / "artifacts").as_uri() if uri == local else None
        experiment = (
            found.experiment_id
            if found
            else self._client.create_experiment(
                self.settings.experiment, artifact_location=artifacts
            )
        )
        self._run = self._client.create_run(experiment, run_name=beginning.name).info.run_id
        write_atomically(known, self._run)
        pairs = list(beginning.settings.items())
        for start in range(0, len(pairs), BATCH):
            part = [Param(_fit(key), json.dumps(x)) for key, x in pairs[start : start + BATCH]]
            self._client.log_batch(self._run, params=part)

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(_fit(name), value, now, iteration) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def table(self, iteration: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows]
        self._client.log_text(self._run, "".join(lines), f"episodes/{iteration:06d}.jsonl")

    def close(self) -> None:
        self._client.set_terminated(self._run, "FINISHED")


def _fit(name: str) -> str:
    """A name that MLflow takes."""
    return "".join(c if c.isalnum() or c in "_-./ :" else "_" for c in name)
