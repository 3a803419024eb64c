"""What an action earned: from process rewards and the outcome reward to numbers per action token,
and with what they are compared. Plain numbers, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, Literal

from pydantic import Field

from agent_r1.algorithms.advantages import returns_to_go
from agent_r1.config.section import NamedSection
from agent_r1.types import Group, Step, Trajectory

PerToken = list[list[float]]
"""Of one trajectory: per step, per action token."""


class Credit:
    """A level: the unit that gets a return of its own, and whether process rewards count.

    Two views of the same rewards: ``rewards`` places them on action tokens, for estimators that
    walk along a trajectory (PPO, REINFORCE++); ``compare`` sums them to one return a unit and
    compares the units of a group (GRPO and its kin, RLOO).
    """

    class Settings(NamedSection):
        """The keys of ``[credit]``."""

    gate: bool = False
    """Whether process rewards are left out where all outcomes of a group are equal."""

    pays_at_the_end: ClassVar[bool] = False
    """Whether ``rewards`` places process rewards on the last token of the trajectory."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.gate = getattr(settings, "gate", False)

    def process(self, rewards: Mapping[str, float]) -> float:
        """What a step's process rewards are worth together."""
        raise NotImplementedError

    def rewards(self, trajectory: Trajectory, outcome: float, *, gated: bool) -> PerToken:
        """Each step's process reward on its last token and the outcome on the very last."""
        raise NotImplementedError

    def returns(self, trajectory: Trajectory, rewards: PerToken) -> PerToken:
        """The return of the unit that each token belongs to."""
        raise NotImplementedError

    def units(self, trajectory: Trajectory, returns: PerToken) -> list[tuple[float, Hashable]]:
        """Each unit once, in order: its return, and a key that it shares with those it is compared
        with.
        """
        raise NotImplementedError

    def compare(
        self,
        group: Group,
        rewards: Sequence[PerToken],
        baseline: Callable[[Sequence[float]], list[float]],
    ) -> list[PerToken]:
        """Advantages of a group's scored trajectories: ``baseline`` among units of the same key."""
        returns = [self.returns(t, r) for t, r in zip(group.scored, rewards, strict=True)]
        units = [self.units(t, r) for t, r in zip(group.scored, returns, strict=True)]
        flat = list(chain.from_iterable(units))
        alike: dict[Hashable, list[int]] = {}
        for index, (_, key) in enumerate(flat):
            alike.setdefault(key, []).append(index)
        advantages = [0.0] * len(flat)
        for indices in alike.values():
            values = baseline([flat[index][0] for index in indices])
            for index, value in zip(indices, values, strict=True):
                advantages[index] = value
        rest = iter(advantages)
        return [
            self._spread([next(rest) for _ in of_trajectory], per_token)
            for of_trajectory, per_token in zip(units, returns, strict=True)
        ]

    def _spread(self, per_unit: list[float], like: PerToken) -> PerToken:
        """A trajectory's numbers per unit, repeated for each token of the unit."""
        raise NotImplementedError


class OutcomeCredit(Credit):
    """The unit is the trajectory, its return the outcome. Process rewards are recorded, not
    used.
    """

    pays_at_the_end = True

    class Settings(NamedSection):
        name: str = "outcome"

    def process(self, rewards: Mapping[str, float]) -> float:
        return 0.0

    def rewards(self, trajectory: Trajectory, outcome: float, *, gated: bool) -> PerToken:
        placed = _zeros(trajectory)
        process = 0.0 if gated else sum(self.process(step.rewards) for step in trajectory.steps)
        placed[-1][-1] = outcome + process
        return placed

    def returns(self, trajectory: Trajectory, rewards: PerToken) -> PerToken:
        total = sum(map(sum, rewards))
        return [[total] * len(step) for step in rewards]

    def units(self, trajectory: Trajectory, returns: PerToken) -> list[tuple[float, Hashable]]:
        return [(returns[0][0], None)]

    def _spread(self, per_unit: list[float], like: PerToken) -> PerToken:
        return [[per_unit[0]] * len(step) for step in like]


class _Process(NamedSection):
    """How process rewards count.

    Attributes:
        weights: By part; a part that is not named weighs 1.
        gate: Leave them out in a group whose outcomes are all equal, where small differences in
            process would be all there is to learn from. With it, a group without a success teaches
            nothing.
    """

    weights: dict[str, float] = Field(default_factory=dict)
    gate: bool = False

    def process(self, rewards: Mapping[str, float]) -> float:
        return sum(self.weights.get(part, 1.0) * value for part, value in rewards.items())


class TrajectoryCredit(OutcomeCredit):
    """The unit is the trajectory: ``R = outcome + sum_t r_t``, paid at its end."""

    class Settings(_Process):
        name: str = "trajectory"

    def process(self, rewards: Mapping[str, float]) -> float:
        return float(self.settings.process(rewards))


class StepCredit(Credit):
    """The unit is the step: ``R_s = r_s + gamma R_(s+1)``, the outcome after the last (process
    supervision: GRPO, arXiv 2402.03300, section 4.1.3).
    """

    class Settings(_Process):
        """``compare``: a step's return with those of all steps of the group, of the same index, or
        of the same ``state_key``. Returns-to-go fall as an episode goes on, so comparing all steps
        favours the early ones. Estimators that compare no units have no use for it.
        """

        name: str = "step"
        gamma: float = Field(1.0, ge=0.0, le=1.0)
        compare: Literal["group", "index", "state_key"] = "group"

    def process(self, rewards: Mapping[str, float]) -> float:
        return float(self.settings.process(rewards))

    def rewards(self, trajectory: Trajectory, outcome: float, *, gated: bool) -> PerToken:
        placed = _zeros(trajectory)
        for tokens, step in zip(placed, trajectory.steps, strict=True):
            tokens[-1] = 0.0 if gated else self.process(step.rewards)
        placed[-1][-1] += outcome
        return placed

    def returns(self, trajectory: Trajectory, rewards: PerToken) -> PerToken:
        to_go = returns_to_go([sum(step) for step in rewards], gamma=self.settings.gamma)
        return [[value] * len(step) for value, step in zip(to_go, rewards, strict=True)]

    def units(self, trajectory: Trajectory, returns: PerToken) -> list[tuple[float, Hashable]]:
        return [
            (values[0], self._key(index, step))
            for index, (values, step) in enumerate(zip(returns, trajectory.steps, strict=True))
        ]

    def _key(self, index: int, step: Step) -> Hashable:
        if self.settings.compare == "state_key":
            return step.state_key if step.state_key is not None else ("no key", id(step))
        return index if self.settings.compare == "index" else None

    def _spread(self, per_unit: list[float], like: PerToken) -> PerToken:
        return [[value] * len(step) for value, step in zip(per_unit, like, strict=True)]


class TokenCredit(StepCredit):
    """The unit is the token: return-to-go discounted token by token. For estimators that walk along
    a trajectory (PPO with a critic), where process rewards stand on the token that earned them.
    """

    class Settings(StepCredit.Settings):
        """``compare`` as for steps: a token goes with its step. ``gamma`` is per token."""

        name: str = "token"

    def returns(self, trajectory: Trajectory, rewards: PerToken) -> PerToken:
        flat = returns_to_go(list(chain.from_iterable(rewards)), gamma=self.settings.gamma)
        return like(rewards, flat)

    def units(self, trajectory: Trajectory, returns: PerToken) -> list[tuple[float, Hashable]]:
        return [
            (value, self._key(index, step))
            for index, (values, step) in enumerate(zip(returns, trajectory.steps, strict=True))
            for value in values
        ]

    def _spread(self, per_unit: list[float], like_: PerToken) -> PerToken:
        return like(like_, per_unit)


def like(shape: PerToken, flat: Sequence[float]) -> PerToken:
    """Numbers of a trajectory's action tokens in a row, as numbers per step and token."""
    rest = iter(flat)
    return [[next(rest) for _ in step] for step in shape]


def _zeros(trajectory: Trajectory) -> PerToken:
    return [[0.0] * len(step.action.token_ids) for step in trajectory.steps]
