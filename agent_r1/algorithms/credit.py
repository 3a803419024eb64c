"""Credit assignment: from process rewards and the outcome reward to numbers per action token, and
the units that are compared. Plain numbers, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import ClassVar, Literal

from pydantic import Field

from agent_r1.algorithms.advantages import returns_to_go
from agent_r1.config.section import NamedSection
from agent_r1.types import Estimates, Group, StepKey, Trajectory


@dataclass(slots=True, frozen=True)
class Attempt:
    """A scored trajectory and the numbers of its action tokens: all steps in one row (T,), one
    step after another.

    Attributes:
        number: Place of the trajectory in its group.
        trajectory: The sampled episode.
        lengths: (S,), action tokens of each step; T together.
        logprobs: (T,), log-probabilities (nats) under the policy that the update starts from, where
            the learner computed them (not with a mask off), else at sampling; none for a
            demonstration.
        reference_logprobs: (T,), under the reference policy; none without a KL term in the reward.
        values: (T,), the critic's values of the state before each token; none without a critic.
        last_value: The critic's value of the state after the last token.
    """

    number: int
    trajectory: Trajectory
    lengths: Sequence[int]
    logprobs: Sequence[float] = ()
    reference_logprobs: Sequence[float] = ()
    values: Sequence[float] = ()
    last_value: float = 0.0

    def by_step(self, per_token: Sequence[float]) -> list[Sequence[float]]:
        """(T,) numbers, split by step."""
        ends = accumulate(self.lengths, initial=0)
        return [per_token[start:end] for start, end in pairwise(ends)]

    def step_sums(self, per_token: Sequence[float]) -> list[float]:
        """(T,) numbers summed over each step: (S,)."""
        return [sum(of_step) for of_step in self.by_step(per_token)]

    def spread(self, per_step: Sequence[float]) -> list[float]:
        """(S,) numbers, each repeated for the tokens of its step: (T,)."""
        pairs = zip(per_step, self.lengths, strict=True)
        return [value for value, length in pairs for _ in range(length)]


def attempts_of(group: Group, known: Estimates) -> list[Attempt]:
    """A group's scored trajectories, with the numbers that the learner computed."""
    found = []
    for number, trajectory in group.attempts():
        steps = trajectory.steps
        keys = [StepKey(group.number, number, index) for index in range(len(steps))]
        values = [known.values[key] for key in keys if key in known.values]
        logprobs = [
            (known.old_logprobs.get(key) or step.action.logprobs)[: len(step.action.token_ids)]
            for key, step in zip(keys, steps, strict=True)
        ]
        reference = [known.reference_logprobs.get(key, ()) for key in keys]
        found.append(
            Attempt(
                number,
                trajectory,
                [len(step.action.token_ids) for step in steps],
                [*chain.from_iterable(logprobs)],
                [*chain.from_iterable(reference)],
                [*chain.from_iterable(of_step[:-1] for of_step in values)],
                values[-1][-1] if values else 0.0,
            )
        )
    return found


class Credit:
    """A credit level: the unit that gets its own return, and whether process rewards count.

    Two views of the same rewards: ``rewards`` places them on action tokens, for estimators that
    walk along a trajectory (PPO, REINFORCE++); ``compare`` sums them to one return per unit and
    compares the units of a group (GRPO and its kin, RLOO).
    """

    class Settings(NamedSection):
        """The keys of ``[credit]``."""

    settings: Settings
    gate: bool = False
    """Whether process rewards are left out where all outcomes of a group are equal."""

    pays_at_the_end: ClassVar[bool] = False
    """Whether ``rewards`` places process rewards on the last token of the trajectory."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.gate = getattr(settings, "gate", False)

    def process(self, rewards: Mapping[str, float]) -> float:
        """The combined value of a step's process rewards."""
        raise NotImplementedError

    def rewards(self, attempt: Attempt, outcome: float, *, gated: bool) -> list[float]:
        """(T,): each step's process reward on its last token, the outcome on the very last."""
        raise NotImplementedError

    def returns(self, attempt: Attempt, rewards: Sequence[float]) -> list[float]:
        """(T,): the return of the unit that each token belongs to."""
        raise NotImplementedError

    def units(self, attempt: Attempt) -> list[tuple[Hashable, int]]:
        """Each unit in order: its key (units with equal keys are compared) and its number of
        tokens.
        """
        raise NotImplementedError

    def compare(
        self,
        group: Sequence[Attempt],
        rewards: Sequence[Sequence[float]],
        baseline: Callable[[Sequence[float]], list[float]],
    ) -> list[float]:
        """Advantages of all action tokens of a group, one attempt's after another's: ``baseline``
        among units of the same key.
        """
        units = [unit for attempt in group for unit in self.units(attempt)]
        per_token = [
            value
            for attempt, given in zip(group, rewards, strict=True)
            for value in self.returns(attempt, given)
        ]
        starts = accumulate((length for _, length in units), initial=0)
        returns = [per_token[start] for start, _ in zip(starts, units, strict=False)]
        alike: dict[Hashable, list[int]] = {}
        for index, (key, _) in enumerate(units):
            alike.setdefault(key, []).append(index)
        advantages = [0.0] * len(units)
        for indices in alike.values():
            values = baseline([returns[index] for index in indices])
            for index, value in zip(indices, values, strict=True):
                advantages[index] = value
        pairs = zip(advantages, units, strict=True)
        return [value for value, (_, length) in pairs for _ in range(length)]


class OutcomeCredit(Credit):
    """The unit is the trajectory, its return the outcome. Process rewards are recorded, not
    used.
    """

    pays_at_the_end = True

    class Settings(Credit.Settings):
        name: str = "outcome"

    def process(self, rewards: Mapping[str, float]) -> float:
        return 0.0

    def rewards(self, attempt: Attempt, outcome: float, *, gated: bool) -> list[float]:
        steps = attempt.trajectory.steps
        process = 0.0 if gated else sum(self.process(step.rewards) for step in steps)
        return [0.0] * (sum(attempt.lengths) - 1) + [outcome + process]

    def returns(self, attempt: Attempt, rewards: Sequence[float]) -> list[float]:
        return [sum(attempt.step_sums(rewards))] * len(rewards)

    def units(self, attempt: Attempt) -> list[tuple[Hashable, int]]:
        return [(None, sum(attempt.lengths))]


class _Process(Credit.Settings):
    """How process rewards count.

    Attributes:
        weights: By part; a part that is not named weighs 1.
        gate: Ignore process rewards in a group whose outcomes are all equal, where their small
            differences would be the only signal. With the gate, a group without a success teaches
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

    settings: Settings

    def process(self, rewards: Mapping[str, float]) -> float:
        return self.settings.process(rewards)


class StepCredit(Credit):
    """The unit is the step: ``R_s = r_s + gamma R_(s+1)``, the outcome after the last (process
    supervision: GRPO, arXiv 2402.03300, section 4.1.3).
    """

    class Settings(_Process):
        """``gamma``: discount per step; ``compare``: a step's return with those of all steps of the
        group, of the same index, or of the same ``state_key``. Returns-to-go fall as an episode
        goes on, so comparing all steps favours the early ones. Estimators that compare no units do
        not use it.
        """

        name: str = "step"
        gamma: float = Field(1.0, ge=0.0, le=1.0)
        compare: Literal["group", "index", "state_key"] = "group"

    settings: Settings

    def process(self, rewards: Mapping[str, float]) -> float:
        return self.settings.process(rewards)

    def rewards(self, attempt: Attempt, outcome: float, *, gated: bool) -> list[float]:
        placed: list[float] = []
        for length, step in zip(attempt.lengths, attempt.trajectory.steps, strict=True):
            placed += [0.0] * (length - 1) + [0.0 if gated else self.process(step.rewards)]
        placed[-1] += outcome
        return placed

    def returns(self, attempt: Attempt, rewards: Sequence[float]) -> list[float]:
        to_go = returns_to_go(attempt.step_sums(rewards), gamma=self.settings.gamma)
        return attempt.spread(to_go)

    def units(self, attempt: Attempt) -> list[tuple[Hashable, int]]:
        return [(self._key(attempt, i), length) for i, length in enumerate(attempt.lengths)]

    def _key(self, attempt: Attempt, index: int) -> Hashable:
        if self.settings.compare == "state_key":
            state_key = attempt.trajectory.steps[index].state_key
            return state_key if state_key is not None else (attempt.number, index)
        return index if self.settings.compare == "index" else None


class TokenCredit(StepCredit):
    """The unit is the token: return-to-go discounted token by token. For estimators that walk along
    a trajectory (PPO with a critic), where process rewards stand on the token that earned them.
    """

    class Settings(StepCredit.Settings):
        """``compare`` as for steps: a token goes with its step. ``gamma`` is per token."""

        name: str = "token"

    settings: Settings

    def returns(self, attempt: Attempt, rewards: Sequence[float]) -> list[float]:
        return returns_to_go(rewards, gamma=self.settings.gamma)

    def units(self, attempt: Attempt) -> list[tuple[Hashable, int]]:
        lengths = enumerate(attempt.lengths)
        return [(self._key(attempt, i), 1) for i, length in lengths for _ in range(length)]
