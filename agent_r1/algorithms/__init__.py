"""Credit assignment and losses. An algorithm is one file; its name stands in this table."""

from agent_r1.config import Registry

ALGORITHMS = Registry("algorithm", {"grpo": "agent_r1.algorithms.grpo:GRPO"}, default="grpo")
CREDITS = Registry(
    "credit",
    {
        "outcome": "agent_r1.algorithms.credit:OutcomeCredit",
        "trajectory": "agent_r1.algorithms.credit:TrajectoryCredit",
        "step": "agent_r1.algorithms.credit:StepCredit",
    },
    default="outcome",
)
