"""An algorithm of one's own, two ways.

A function from the returns of a group to its advantages, with PPO's clipped loss:
    agent-r1 train hopworld --algorithm examples/my_algorithm.py:above_median

A class, where the loss is to be another one as well:
    agent-r1 train hopworld --algorithm examples/my_algorithm.py:OnlyWhatWorked
"""

import statistics

from agent_r1 import advantage
from agent_r1.algorithms.grpo import GRPO


@advantage
def above_median(returns):
    """``A = R - median(R)``: a single lucky attempt does not move the baseline."""
    middle = statistics.median(returns)
    return [value - middle for value in returns]


class OnlyWhatWorked(GRPO):
    """Supervised learning on the attempts that were better than the group's mean."""

    class Settings(GRPO.Settings):
        name: str = "only-what-worked"

    def policy_loss(self, logprobs, old_logprobs, advantages, sequences):
        return -logprobs * advantages.clamp(min=0.0)
