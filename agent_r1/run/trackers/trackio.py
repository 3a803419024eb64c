"""Trackio: written where Trackio keeps its projects, so that ``trackio show`` finds it."""

from __future__ import annotations

import contextlib
import io
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from agent_r1.run.trackers.base import Beginning, TrackerSettings, must_have
from agent_r1.utils.durable import write_atomically


class Trackio:
    """One Trackio run for one run; a process has one at a time."""

    class Settings(TrackerSettings):
        """Names of Trackio.

        Attributes:
            project: Where the run stands.
            space_id: A Space on the hub to show it in; none by default.
        """

        name: str = "trackio"
        project: str = "agent-r1"
        space_id: str | None = None

    def __init__(self, settings: Settings) -> None:
        must_have("trackio", "trackio")
        self.settings = settings

    def start(self, beginning: Beginning) -> None:
        known = beginning.folder / "name"
        if not known.exists():  # Trackio goes on with the newest run of a name: ours is its own
            write_atomically(known, f"{beginning.name}-{uuid.uuid4().hex[:6]}")
        with contextlib.redirect_stdout(io.StringIO()):
            import trackio

            # Keys with a leading underscore are Trackio's own.
            settings = {k: v for k, v in beginning.settings.items() if not k.startswith("_")}
            self._run = trackio.init(
                project=self.settings.project,
                name=known.read_text(),
                space_id=self.settings.space_id,
                config=settings,
                resume="allow" if beginning.is_resumed else "never",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=iteration)

    def table(self, iteration: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import trackio

        table = trackio.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({"episodes": table}, step=iteration)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
