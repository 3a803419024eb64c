"""Assigns tasks to splits where the data has none."""

from __future__ import annotations

from collections.abc import Sequence

from agent_r1.errors import ConfigError
from agent_r1.types import Task, derive_seed


def deal(tasks: Sequence[Task], split: str, holdout: float) -> list[Task]:
    """The tasks of a split: a share of ``holdout`` for validation, the same for test, the rest
    for training; by a hash of the id, so that added tasks do not move earlier ones.
    """
    bounds = {"validation": (0.0, 1.0), "test": (1.0, 2.0), "train": (2.0, float("inf"))}
    low, high = (bound * holdout for bound in bounds[split])
    dealt = [t for t in tasks if low <= derive_seed("split", t.id) / 2**63 < high]
    if tasks and not dealt:
        raise ConfigError(
            f"env.holdout = {holdout:g}: none of {len(tasks)} tasks falls into split {split!r}; "
            f"{'lower' if split == 'train' else 'raise'} it, or add tasks"
        )
    return dealt
