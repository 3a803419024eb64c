"""RLOO, REINFORCE leave-one-out: Back to basics, arXiv 2402.14740, section 4.2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from agent_r1.algorithms.advantages import leave_one_out
from agent_r1.algorithms.base import GroupAlgorithm


class RLOO(GroupAlgorithm):
    """``A = R - mean of the others' R``.

    The paper's loss is ``-A log pi`` on fresh rollouts; PPO's clipped loss has the same gradient
    there and stays right when a rollout is used for several updates. ``log pi`` is that of the
    whole sequence: a sum over its tokens, averaged over all attempts, those of groups without a
    signal included (hence ``fixed_length = 1``).
    """

    class Settings(GroupAlgorithm.Settings):
        name: str = "rloo"
        aggregation: Literal["token", "sequence", "fixed"] = "fixed"
        fixed_length: int | None = Field(1, ge=1)

    def baseline(self, returns: Sequence[float]) -> list[float]:
        return leave_one_out(returns)
