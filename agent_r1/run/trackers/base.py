"""The interface of trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from agent_r1.config.section import NamedSection
from agent_r1.errors import ConfigError


class TrackerSettings(NamedSection):
    """What every tracker's section has.

    Attributes:
        samples: Episodes of each iteration that are sent as text, where the tracker has tables.
    """

    samples: int = Field(2, ge=0)


@dataclass(frozen=True)
class Beginning:
    """What a tracker is told first.

    Attributes:
        name: Name of the run, that of its folder.
        settings: The recipe, flat: values by dotted key.
        folder: A folder of the tracker's own in the run's folder, which is there.
        first: The first iteration whose figures will follow.
        is_resumed: Whether the tracker has been told of this run before; figures from ``first`` on
            may then come a second time, with the same values.
    """

    name: str
    settings: Mapping[str, Any]
    folder: Path
    first: int
    is_resumed: bool


class Tracker(Protocol):
    """Sends figures somewhere. All methods are called in one thread of the tracker's own: they may
    wait, and they may raise; neither holds up the run.
    """

    def start(self, beginning: Beginning) -> None:
        """Begins, or goes on with a run."""
        ...

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Sends the figures of an iteration; all are finite."""
        ...

    def table(self, iteration: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Sends sample episodes: texts and numbers."""
        ...

    def close(self) -> None:
        """Sends what is left, and ends."""
        ...


def must_have(name: str, *modules: str) -> None:
    """Raises ``ConfigError`` if a tracker's packages are not installed."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise ConfigError(
            f"tracker {name!r} needs {', '.join(missing)}: pip install 'agent-r1[{name}]'"
        )
