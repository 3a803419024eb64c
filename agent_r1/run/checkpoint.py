"""Checkpoints: everything that the next iteration depends on, written whole or not at all.

``checkpoints/000010`` is a plain Hugging Face model folder with ``trainer.pt`` (optimiser, value
head, RNG), ``state.json`` and ``checksums.json`` beside the weights; with ``train.staleness`` also
groups that wait to be trained on, ``waiting.jsonl.gz``. Which one is the last and
which the best is read from the folders themselves; the links ``checkpoints/last`` and
``checkpoints/best`` are for people, and a file system or a copy without them loses nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from agent_r1.errors import ConfigError, RunError
from agent_r1.run.trajectories import read_groups, write_groups
from agent_r1.types import Estimates, Group
from agent_r1.utils.durable import make_folder, seal, sync_folder, why_damaged
from agent_r1.utils.run_files import BEST, CHECKPOINTS, LAST, LINKS, STATE, TRAINER, WAITING
from agent_r1.utils.text import describe

if TYPE_CHECKING:
    from agent_r1.learner.learner import Learner
    from agent_r1.model.policy import Policy

from agent_r1.model.checkpoint_folder import newest_first, read_state, why_unusable


@dataclass
class State:
    """Progress of a run.

    Attributes:
        iteration: Iterations done.
        cursor: Training tasks drawn so far.
        best: Best validation figure so far, and ``best_iteration``, whose checkpoint reached it.
        train_seconds: Time spent in iterations, evaluations and checkpoints not counted.
        micro_batch_tokens: Chosen by the memory free at the first start, and kept: memory free
            when a run is resumed must not change its last bits.
        metrics: CRC-32 of the rows of metrics that the run had written by then.
        finished, pending: Positions of groups that were drawn and not trained on yet: those of
            ``waiting.jsonl.gz``, in its order, and those that were being played.
    """

    iteration: int = 0
    cursor: int = 0
    best: float | None = None
    best_iteration: int = 0
    train_seconds: float = 0.0
    micro_batch_tokens: int = 0
    metrics: int = 0
    finished: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        last: The newest whole one, or ``None`` where there is none.
        damaged: Newer ones that are not whole, and why.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.last: Path | None = None
        self.damaged: dict[Path, str] = {}
        for number, path in newest_first(folder):
            reason = why_unusable(number, path)
            if reason is None:
                self.last = path
                break
            self.damaged[path] = reason

    def save(
        self,
        state: State,
        policy: Policy,
        learner: Learner,
        waiting: Mapping[int, Group | None] | None = None,
    ) -> None:
        """Writes under a temporary name, syncs to disk, renames, moves the links, then deletes
        checkpoints that are no longer kept.

        Args:
            state: Its fields on groups are set here.
            policy, learner: What is written.
            waiting: Groups that are not trained on yet, by position; ``None`` for those that are
                being played.
        """
        import torch

        final = self.folder / f"{state.iteration:06d}"
        partial = self.folder / f".{final.name}.partial"
        _remove(partial)
        make_folder(partial)
        finished = {n: group for n, group in (waiting or {}).items() if group is not None}
        state.finished, state.pending = [*finished], [n for n in waiting or () if n not in finished]
        extra = {"learner": learner.state_dict(), "rng": torch.get_rng_state()}
        try:
            policy.save(partial)
            torch.save(extra, partial / TRAINER)
            if finished:
                write_groups(partial / WAITING, [*finished.values()], Estimates())
            (partial / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
            seal(partial)
        except Exception as error:  # a full disk fails any writer; tokenizers raise just Exception
            raise RunError(
                f"{partial} cannot be written ({describe(error)}): is the disk full? The run goes "
                "on from the checkpoint before with --resume"
            ) from error
        self._settle_copies()
        if final.exists():
            final.rename(old := self.folder / f".{final.name}.old")
            _remove(old)
        partial.rename(final)
        sync_folder(self.folder)  # only now does the checkpoint exist
        self.last = final
        if state.best_iteration == state.iteration:
            self._link(BEST, final.name)
        self._link(LAST, final.name)
        self._prune(state)

    def restore(self, policy: Policy, learner: Learner) -> State:
        """Puts the last checkpoint's optimiser and RNG back; the weights were loaded with the
        policy.
        """
        import torch

        assert self.last is not None, "there is a checkpoint"
        try:
            extra = torch.load(self.last / TRAINER, map_location=policy.device, weights_only=True)
            learner.load_state_dict(extra["learner"])
            torch.set_rng_state(extra["rng"].cpu())
            return State(**read_state(self.last))
        except (KeyError, RuntimeError, TypeError, ValueError, UnpicklingError) as error:
            raise ConfigError(
                f"{self.last}: the files are intact, but do not match this recipe, or this version "
                f"of agent-r1 or PyTorch: {error!s:.200}"
            ) from error

    def waiting(self, state: State) -> dict[int, Group | None]:
        """The groups that were not trained on yet at the last checkpoint, as ``save`` got them."""
        assert self.last is not None, "there is a checkpoint"
        found: dict[int, Group | None] = dict.fromkeys(state.pending)
        if state.finished:
            groups = [group for group, _ in read_groups(self.last / WAITING)]
            found |= zip(state.finished, groups, strict=True)
        return found

    def put_aside(self, folder: Path) -> None:
        """Moves damaged checkpoints out of the way; nothing is deleted."""
        for path in self.damaged:
            make_folder(folder)
            shutil.move(path, folder / path.name)  # checkpoints may be on another disk
        self.damaged = {}

    def _settle_copies(self) -> None:
        """Replaces folders named best or last, left by a copy that followed links, so that links
        can be made: each gets its number, or is deleted if that folder is whole.
        """
        for name in LINKS:
            path = self.folder / name
            if not path.is_dir() or path.is_symlink():
                continue
            with contextlib.suppress(ConfigError):  # no checkpoint: it stays
                numbered = self.folder / f"{read_state(path)['iteration']:06d}"
                if not numbered.exists():
                    path.rename(numbered)
                elif why_damaged(numbered) is None:
                    shutil.rmtree(path)

    def _link(self, name: str, target: str) -> None:
        partial = self.folder / f".{name}.partial"
        with contextlib.suppress(OSError):  # file systems without links
            partial.unlink(missing_ok=True)
            partial.symlink_to(target)
            os.replace(partial, self.folder / name)
        partial.unlink(missing_ok=True)

    def _prune(self, state: State) -> None:
        done = sorted(
            path for path in self.folder.iterdir() if path.name.isascii() and path.name.isdigit()
        )
        for path in done[: -self.keep]:
            if int(path.name) not in (state.iteration, state.best_iteration):
                _remove(path)


def _remove(path: Path) -> None:
    """Deletes a folder that is no longer needed; of a link, only the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=not path.exists())


def last_state(run: Path) -> State | None:
    """Progress of a run at its last checkpoint whose files have the right sizes."""
    found = newest_first(run / CHECKPOINTS)
    last = next((p for n, p in found if why_unusable(n, p, thorough=False) is None), None)
    return None if last is None else State(**read_state(last))
