"""Checkpoints: everything that the next iteration depends on, written at once or not at all.

``checkpoints/000010`` is a plain Hugging Face model folder with ``trainer.pt`` (optimiser, value
head, RNG) and ``state.json`` beside the weights. ``checkpoints/last`` and ``checkpoints/best`` are
links.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from agent_r1.config import ConfigError
from agent_r1.learner import Learner
from agent_r1.policy import Policy


@dataclass
class State:
    """Where a run stands.

    Attributes:
        iteration: Iterations done.
        cursor: Training tasks drawn so far.
        best: Best validation figure so far, and ``best_iteration``, whose checkpoint reached it.
        train_seconds: Time spent in iterations, evaluations and checkpoints not counted.
        micro_batch_tokens: As chosen by the memory there was at first; what is free when a run is
            resumed must not change its last bits.
    """

    iteration: int = 0
    cursor: int = 0
    best: float | None = None
    best_iteration: int = 0
    train_seconds: float = 0.0
    micro_batch_tokens: int = 0


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: State, policy: Policy, learner: Learner) -> None:
        """Writes under a temporary name, renames, moves the links, then drops what is no longer
        kept.
        """
        final = self.folder / f"{state.iteration:06d}"
        partial = self.folder / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        policy.save(partial)
        extra = {"learner": learner.state_dict(), "rng": torch.get_rng_state()}
        torch.save(extra, partial / "trainer.pt")
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if state.best_iteration == state.iteration:
            self._link("best", final.name)
        self._link("last", final.name)  # the last word: what is not linked did not happen
        self._prune(state)

    def restore(self, policy: Policy, learner: Learner) -> State:
        """Puts the last checkpoint's optimiser and RNG back; the weights were loaded with the
        policy.
        """
        folder = self.folder / "last"
        extra = torch.load(folder / "trainer.pt", map_location=policy.device, weights_only=True)
        learner.load_state_dict(extra["learner"])
        torch.set_rng_state(extra["rng"].cpu())
        return State(**json.loads((folder / "state.json").read_text()))

    @property
    def last(self) -> Path | None:
        """The newest checkpoint, or ``None`` before the first."""
        return self.folder / "last" if (self.folder / "last" / "state.json").exists() else None

    def _link(self, name: str, target: str) -> None:
        partial = self.folder / f".{name}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(target)
        os.replace(partial, self.folder / name)

    def _prune(self, state: State) -> None:
        done = sorted(path for path in self.folder.iterdir() if path.name.isdigit())
        for path in done[: -self.keep]:
            if int(path.name) != state.best_iteration:
                shutil.rmtree(path)


def model_folder(run: Path, which: str) -> Path:
    """The model of a run: ``best``, ``last``, or an iteration's number."""
    name = f"{int(which):06d}" if which.isdigit() else which
    folder = run / "checkpoints" / name
    if not folder.exists():
        raise ConfigError(
            f"{run} has no checkpoint {which!r}; use best, last or the number of one it has"
        )
    return folder.resolve()
