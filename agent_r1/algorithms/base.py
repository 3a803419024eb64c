"""An algorithm: an advantage estimator, a policy loss, a normaliser, and perhaps a KL term.

A new one is a file with a subclass of ``PolicyGradient`` and a line in ``ALGORITHMS``, or no line
at all when the recipe names it as ``"my_algorithm.py:MyAlgorithm"``. The shortest is a function
from the returns of a group to its advantages, see ``advantage``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from agent_r1.algorithms.advantages import ZERO_STD
from agent_r1.algorithms.credit import Attempt, Credit
from agent_r1.algorithms.kl import ESTIMATORS, KLSettings
from agent_r1.config.section import NamedSection
from agent_r1.types import Estimates, Group, Trajectory

if TYPE_CHECKING:
    from torch import Tensor


def _unless_off(value: Any) -> Any:
    return None if value == "off" else value


def _rising(band: tuple[float, float]) -> tuple[float, float]:
    if not band[0] < 1 < band[1]:
        raise ValueError("two ratios, one below and one above 1, e.g. [0.5, 2]")
    return band


Band = Annotated[
    tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]], AfterValidator(_rising)
]


class Algorithm:
    """The interface of algorithms for trainer and learner.

    Advantages are made for all groups of a rollout at once, so that an algorithm may normalise over
    them. The loss is a mean over all scored groups: a group without a signal adds nothing to
    the sum, but counts in the denominator, whatever other terms are on.
    """

    compares_attempts: ClassVar[bool] = False
    """Whether a group needs two attempts or more."""
    critic: ClassVar[bool] = False
    """Whether a value head is trained; then ``Attempt.values`` are set when credit is assigned,
    and ``value_targets`` and ``value_loss`` must be written.
    """
    compares_units: ClassVar[bool] = False
    """Whether it calls ``Credit.compare``; if not, a recipe that sets its keys is refused."""
    replaces_groups: ClassVar[bool] = False
    """Whether groups without a signal are replaced by fresh ones and left out of the batch."""
    demonstrated: ClassVar[bool] = False
    """Whether it learns from demonstrations instead of what the policy samples."""
    whole_trajectories: ClassVar[bool] = False
    """Whether the loss needs all tokens of a trajectory in one micro-batch."""

    # Keys that some algorithms take from a recipe; their settings explain the names.
    kl: KLSettings | None = None
    entropy_coef: float = 0.0
    importance_cap: float | None = None
    corrects: bool = False
    """Whether tokens are weighed by ``importance``."""
    loss_mask: bool = True
    advantage_mask: bool = True
    refills: int = 0
    critic_warmup: int = 0
    value_lr: float = 0.0
    value_gradient: bool = False

    class Settings(NamedSection):
        """The keys of ``[algorithm]``."""

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    # Credit ------------------------------------------------------------------------------------

    def advantages(self, groups: Sequence[Sequence[Attempt]], credit: Credit) -> list[float]:
        """The advantage of every action token of all groups, one attempt's after another's."""
        raise NotImplementedError(f"{type(self).__name__} has no advantages(groups, credit)")

    def rewards(self, group: Sequence[Attempt], credit: Credit) -> list[list[float]]:
        """Rewards of a group's attempts, placed on their action tokens: a row (T,) per attempt."""
        true = [a.trajectory.outcome.reward for a in group if a.trajectory.outcome is not None]
        gated = credit.gate and bool(true) and max(true) - min(true) < ZERO_STD
        return [
            # The critic's last value already covers rewards that are paid at the end.
            credit.rewards(
                a,
                self.outcome(a.trajectory),
                gated=gated or (credit.pays_at_the_end and self.bootstraps(a.trajectory)),
            )
            for a in group
        ]

    def outcome(self, trajectory: Trajectory) -> float:
        """The outcome reward that is learned from."""
        assert trajectory.outcome is not None
        return trajectory.outcome.reward

    def bootstraps(self, trajectory: Trajectory) -> bool:
        """Whether the critic's value replaces the missing end of a cut-off trajectory."""
        return False

    @property
    def trains_on_all(self) -> bool:
        """Whether a group whose advantages are all 0 is still trained on."""
        in_loss = self.kl is not None and self.kl.place == "loss"
        return self.critic or in_loss or bool(self.entropy_coef)

    def has_signal(self, group: Group, known: Estimates) -> bool:
        """Whether a group has a learning signal: some advantage is not zero."""
        return any(any(known.advantages.get(key, ())) for key, _ in group.steps())

    def masks(self, trajectory: Trajectory) -> bool:
        """Whether a trajectory is compared with, but left out of the loss."""
        return False

    # Loss --------------------------------------------------------------------------------------

    def token_weights(self, num_action_tokens: list[int]) -> list[float]:
        """Weight in the loss of one action token of each trajectory: here, all alike.

        Because the weights are known before the first forward pass, the loss does not depend on
        how a batch is cut into micro-batches.
        """
        return [1.0 / sum(num_action_tokens)] * len(num_action_tokens)

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, sequences: Tensor) -> Tensor:
        """(T,): the ratio of new to old policy that is clipped; 1 where there is no old one."""
        return logprobs.new_ones(logprobs.shape)

    def clip_bounds(self) -> tuple[float, float]:
        """Ratios outside are reported as clipped."""
        return 1.0, 1.0

    def importance(
        self, old_logprobs: Tensor, sampling_logprobs: Tensor, sequences: Tensor
    ) -> Tensor:
        """(T,): what each token's loss weighs since it was sampled by another policy than the one
        that the update starts from. T are the action tokens of the whole batch.
        """
        return old_logprobs.new_ones(old_logprobs.shape)

    def policy_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor
    ) -> Tensor:
        """Loss of each action token. All arguments and the result are (T,); ``sequences`` are
        integers, equal for the tokens of one trajectory.
        """
        raise NotImplementedError(f"{type(self).__name__} has no policy_loss(...)")

    # Only with a critic ------------------------------------------------------------------------

    def value_targets(self, groups: Sequence[Sequence[Attempt]], credit: Credit) -> list[float]:
        """The critic's training target before each action token; in the order of
        ``advantages``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no value_targets(groups, credit)")

    def value_loss(self, values: Tensor, old_values: Tensor, targets: Tensor) -> Tensor:
        """Loss of each action token's value, its weight included; all (T,)."""
        raise NotImplementedError(f"{type(self).__name__} has no value_loss(...)")


class PolicyGradient(Algorithm):
    """Learns from episodes that the policy sampled. Subclass and write ``advantages``; the loss is
    PPO's clipped loss unless you override it.
    """

    class Settings(Algorithm.Settings):
        """The keys of ``[algorithm]``.

        Attributes:
            clip_low: The ratio of new to old policy counts from 1 - clip_low
            clip_high: to 1 + clip_high.
            aggregation: Weight of a token in the loss: equal for all tokens (``token``), equal in
                sum for all trajectories (``sequence``), or 1 / (trajectories x ``fixed_length``)
                (``fixed``). The default is that of the algorithm's paper.
            fixed_length: Tokens per trajectory, for ``fixed``.
            kl: A KL term towards the reference policy; none by default.
            entropy_coef: Weight of the entropy in the loss, which rewards it; 0 for none.
            truncated: Episodes that a limit cut off are kept as scored, or masked: used in
                comparisons, but not in the loss.
            importance_cap: Upper bound of a token's weight, the ratio of the policy that the update
                starts from to the policy that sampled the token: for inexact engines and
                rollouts of an older policy. Costs a forward pass. None by default, 2 with
                ``model.matmul``, an inexact engine or ``train.staleness``; ``"off"``: never.
            importance_band: In place of the cap: tokens whose ratio is outside weigh nothing
                (IcePop, e.g. [0.5, 2]).
            sequence_band: Trajectories whose geometric mean of ratios is outside weigh nothing,
                e.g. [0.99, 1.01]; alone, or with one of the two above.
            loss_mask: False puts the environment's tokens in the loss as if sampled: for ablations.
        """

        clip_low: float = Field(0.2, gt=0)
        clip_high: float = Field(0.2, gt=0)
        aggregation: Literal["token", "sequence", "fixed"] = "token"
        fixed_length: int | None = Field(None, ge=1)
        kl: KLSettings | None = None
        entropy_coef: float = Field(0.0, ge=0)
        truncated: Literal["keep", "mask"] = "keep"
        importance_cap: Annotated[float | None, BeforeValidator(_unless_off)] = Field(None, gt=0)
        importance_band: Band | None = None
        sequence_band: Band | None = None
        loss_mask: bool = True

        @model_validator(mode="before")
        @classmethod
        def _not_fixed(cls, data: Any) -> Any:
            """Any other aggregation drops a default length."""
            if isinstance(data, dict) and data.get("aggregation", "fixed") != "fixed":
                return {"fixed_length": None, **data}
            return data

        @model_validator(mode="after")
        def _fixed(self) -> Self:
            if (self.aggregation == "fixed") != (self.fixed_length is not None):
                raise ValueError("aggregation = 'fixed' and fixed_length go together")
            corrections = ("importance_cap", "importance_band", "sequence_band")
            for key in corrections:
                if not self.loss_mask and getattr(self, key) is not None:
                    raise ValueError(f"{key} has no effect with loss_mask = false")
            if self.importance_band is not None and self.importance_cap is not None:
                raise ValueError("importance_band takes the place of importance_cap: leave out one")
            return self

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.kl, self.entropy_coef = settings.kl, settings.entropy_coef
        self.importance_cap, self.loss_mask = settings.importance_cap, settings.loss_mask
        bands = settings.importance_band, settings.sequence_band
        self.corrects = self.importance_cap is not None or any(bands)

    def masks(self, trajectory: Trajectory) -> bool:
        """Whether a trajectory is compared with, but left out of the loss."""
        return bool(self.settings.truncated == "mask" and trajectory.stop.truncated)

    def rewards(self, group: Sequence[Attempt], credit: Credit) -> list[list[float]]:
        """The same, the KL penalty taken off if it belongs there."""
        rewards = super().rewards(group, credit)
        if self.kl is not None and self.kl.place == "reward":
            estimate = ESTIMATORS[self.kl.estimator]
            for attempt, per_token in zip(group, rewards, strict=True):
                pairs = zip(attempt.logprobs, attempt.reference_logprobs, strict=True)
                for index, (logprob, reference) in enumerate(pairs):
                    per_token[index] -= self.kl.coef * estimate(logprob, reference)
        return rewards

    def token_weights(self, num_action_tokens: list[int]) -> list[float]:
        num = len(num_action_tokens)
        if self.settings.aggregation == "fixed":
            assert self.settings.fixed_length is not None, "the settings see to it"
            return [1.0 / (num * self.settings.fixed_length)] * num
        if self.settings.aggregation == "sequence":
            return [1.0 / (num * count) for count in num_action_tokens]
        return super().token_weights(num_action_tokens)

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, sequences: Tensor) -> Tensor:
        from agent_r1.algorithms.losses import importance_ratio

        return importance_ratio(logprobs, old_logprobs)

    def importance(
        self, old_logprobs: Tensor, sampling_logprobs: Tensor, sequences: Tensor
    ) -> Tensor:
        from agent_r1.algorithms import losses

        pair = old_logprobs, sampling_logprobs
        found = super().importance(*pair, sequences)
        if (cap := self.settings.importance_cap) is not None:
            found = losses.truncated_importance(*pair, cap=cap)
        if (band := self.settings.importance_band) is not None:
            found = losses.importance_in_band(*pair, low=band[0], high=band[1])
        if (band := self.settings.sequence_band) is not None:
            found = found * losses.sequences_in_band(*pair, sequences, low=band[0], high=band[1])
        return found

    def clip_bounds(self) -> tuple[float, float]:
        return 1.0 - self.settings.clip_low, 1.0 + self.settings.clip_high

    def policy_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor
    ) -> Tensor:
        from agent_r1.algorithms.losses import clipped_policy_loss

        low, high = self.settings.clip_low, self.settings.clip_high
        return clipped_policy_loss(logprobs, old_logprobs, advantages, clip_low=low, clip_high=high)


class GroupAlgorithm(PolicyGradient):
    """Advantages relative to the group: returns of its units against a baseline."""

    compares_attempts = True
    compares_units = True

    def baseline(self, returns: Sequence[float]) -> list[float]:
        """Advantages of returns that are compared with one another."""
        raise NotImplementedError

    def compared(self, returns: Sequence[float]) -> list[float]:
        """What ``baseline`` gives, proven to be a finite number for each return.

        Raises:
            ValueError: It is not; names what it gave, for which returns.
        """
        given = self.baseline(list(returns))
        values = [] if given is None else [float(value) for value in given]
        if len(values) != len(returns) or not all(map(math.isfinite, values)):
            raise ValueError(
                f"{self.settings.name.rpartition('/')[2]} must give {len(returns)} finite "
                f"advantages for as many returns; for {list(returns)} it gave {given!r}"
            )
        return values

    def advantages(self, groups: Sequence[Sequence[Attempt]], credit: Credit) -> list[float]:
        of_groups = (credit.compare(g, self.rewards(g, credit), self.compared) for g in groups)
        return [*itertools.chain.from_iterable(of_groups)]


def advantage(function: Callable[[Sequence[float]], list[float]]) -> type[GroupAlgorithm]:
    """Makes an algorithm of a function from the returns of a group to its advantages, with PPO's
    clipped loss. A recipe names it as ``"my_file.py:my_function"``. The returns are those of the
    attempts; with step or token credit those of all steps or tokens that are compared.

    Example:
        >>> @advantage
        ... def best_of(returns):
        ...     return [float(value == max(returns)) for value in returns]
    """

    def baseline(self: GroupAlgorithm, returns: Sequence[float]) -> list[float]:
        return function(returns)

    members = {
        "baseline": baseline,
        "__doc__": function.__doc__,
        "__module__": function.__module__,
    }
    return type(function.__name__, (GroupAlgorithm,), members)
