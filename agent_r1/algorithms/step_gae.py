"""PPO whose time goes by steps: one action of the decision process is one whole turn, as in
Agent-R1's later code (AgentR1/Agent-R1, ``compute_gae_advantage_return``) and ArCHer's turn-level
critic (arXiv 2402.19446, section 3).
"""

from __future__ import annotations

from agent_r1.algorithms.advantages import gae
from agent_r1.algorithms.credit import PerToken
from agent_r1.algorithms.ppo import PPO, values
from agent_r1.types import Trajectory


class StepGAE(PPO):
    """``delta_s = r_s + gamma V(s+1) - V(s)`` from turn to turn, V being the critic's value before
    a turn's first token; every token of the turn gets its turn's advantage.

    The critic learns the turn's return at each of its tokens.
    """

    class Settings(PPO.Settings):
        """``gamma`` and ``lam`` are per step."""

        name: str = "step-gae"

    def estimate(self, trajectory: Trajectory, rewards: PerToken) -> tuple[PerToken, PerToken]:
        before = [values(trajectory, index)[0] for index in range(len(rewards))]
        advantages = gae(
            [sum(step) for step in rewards],
            before,
            last_value=self.last_value(trajectory),
            gamma=self.settings.gamma,
            lam=self.settings.lam,
        )
        targets = [a + v for a, v in zip(advantages, before, strict=True)]
        return _spread(advantages, rewards), _spread(targets, rewards)


def _spread(per_step: list[float], like: PerToken) -> PerToken:
    return [[value] * len(tokens) for value, tokens in zip(per_step, like, strict=True)]
