"""PPO with time counted in steps: one action of the decision process is one whole turn, as in
Agent-R1's later code (AgentR1/Agent-R1, ``compute_gae_advantage_return``) and ArCHer's turn-level
critic (arXiv 2402.19446, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

from agent_r1.algorithms.advantages import gae
from agent_r1.algorithms.credit import Attempt
from agent_r1.algorithms.ppo import PPO


class StepGAE(PPO):
    """``delta_s = r_s + gamma V(s+1) - V(s)`` from turn to turn, V being the critic's value before
    a turn's first token; every token of the turn gets its turn's advantage.

    The critic learns the turn's return at each of its tokens.
    """

    class Settings(PPO.Settings):
        """``gamma`` and ``lam`` are per step."""

        name: str = "step-gae"

    def estimate(
        self, attempt: Attempt, rewards: Sequence[float]
    ) -> tuple[list[float], list[float]]:
        before = [values[0] for values in attempt.by_step(attempt.values)]
        advantages = gae(
            attempt.step_sums(rewards),
            before,
            last_value=self.last_value(attempt),
            gamma=self.settings.gamma,
            lam=self.settings.lam,
        )
        targets = [a + v for a, v in zip(advantages, before, strict=True)]
        return attempt.spread(advantages), attempt.spread(targets)
