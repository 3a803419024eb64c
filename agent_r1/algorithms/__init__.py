"""Credit assignment and losses. An algorithm is one file; its name stands in this table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_r1.config.registry import Registry

if TYPE_CHECKING:
    from agent_r1.algorithms.base import Algorithm
    from agent_r1.algorithms.credit import Credit

ALGORITHMS: Registry[Algorithm] = Registry(
    "algorithm",
    {
        "cispo": "agent_r1.algorithms.cispo:CISPO",
        "dapo": "agent_r1.algorithms.dapo:DAPO",
        "dr-grpo": "agent_r1.algorithms.dr_grpo:DrGRPO",
        "gigpo": "agent_r1.algorithms.gigpo:GiGPO",
        "grpo": "agent_r1.algorithms.grpo:GRPO",
        "gspo": "agent_r1.algorithms.gspo:GSPO",
        "ppo": "agent_r1.algorithms.ppo:PPO",
        "reinforce++": "agent_r1.algorithms.reinforce_pp:ReinforcePP",
        "reinforce++-baseline": "agent_r1.algorithms.reinforce_pp:ReinforcePPBaseline",
        "rloo": "agent_r1.algorithms.rloo:RLOO",
        "sft": "agent_r1.algorithms.sft:SFT",
        "step-gae": "agent_r1.algorithms.step_gae:StepGAE",
    },
    default="grpo",
)
CREDITS: Registry[Credit] = Registry(
    "credit",
    {
        "outcome": "agent_r1.algorithms.credit:OutcomeCredit",
        "step": "agent_r1.algorithms.credit:StepCredit",
        "token": "agent_r1.algorithms.credit:TokenCredit",
        "trajectory": "agent_r1.algorithms.credit:TrajectoryCredit",
    },
    default="outcome",
)
