"""Dr. GRPO, "GRPO done right": arXiv 2503.20783 (Understanding R1-Zero-like training), 3.2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from agent_r1.algorithms.advantages import group_relative
from agent_r1.algorithms.base import GroupAlgorithm


class DrGRPO(GroupAlgorithm):
    """GRPO without its two biases: ``A = R - mean(R)``, which does not favour questions whose
    returns differ little, and a sum over tokens divided by a constant, which does not favour long
    wrong answers. The constant is ``fixed_length`` times the number of all attempts, those of
    groups without a signal included.
    """

    class Settings(GroupAlgorithm.Settings):
        name: str = "dr-grpo"
        aggregation: Literal["token", "sequence", "fixed"] = "fixed"
        fixed_length: int | None = Field(256, ge=1)

    def baseline(self, returns: Sequence[float]) -> list[float]:
        return group_relative(returns, normalize_std=False)
