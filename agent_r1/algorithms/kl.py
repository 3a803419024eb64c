"""Estimators of KL(policy || reference) from one sampled token: Schulman, "Approximating KL
divergence" (2020). Written for numbers and for tensors alike, so that the reward and the loss use
the same.

With ``d = log policy - log reference``: k1 is unbiased and noisy, k2 has the exact gradient when it
stands in the loss, k3 is unbiased and never negative. In the loss, the gradient of k1 is 0 on
average and that of k3 is that of the reversed divergence; in the reward, k1 is the exact choice.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field

from agent_r1.config.section import Section

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value", float, "Tensor")
MAX_GAP = 5.0
"""Nats by which the reference may prefer a token before k3 continues as a straight line: at 14 nats
the exponential is a million, and one token would dominate the whole update.
"""


def k1(logprob: Value, reference: Value) -> Value:
    """``d``."""
    return logprob - reference


def k2(logprob: Value, reference: Value) -> Value:
    """``d^2 / 2``."""
    difference = logprob - reference
    return difference * difference / 2


def k3(logprob: Value, reference: Value) -> Value:
    """``exp(-d) - 1 + d``; for ``-d`` above ``MAX_GAP`` the tangent there, whose slope
    bounds the pull of one token.
    """
    gap = reference - logprob
    bounded: Value
    bounded = min(gap, MAX_GAP) if isinstance(gap, float | int) else gap.clamp(max=MAX_GAP)
    power: Value = math.e**bounded
    return power * (1.0 + gap - bounded) - gap - 1.0


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


class KLSettings(Section):
    """A KL term towards the reference policy.

    Attributes:
        coef: Weight of the term.
        estimator: Schulman's ``k1`` (unbiased, noisy: for the reward), ``k2`` (exact gradient in
            the loss) or ``k3`` (unbiased, never negative).
        place: A term of the loss, or taken off the reward of every action token.
    """

    coef: float = Field(gt=0)
    estimator: Literal["k1", "k2", "k3"] = "k3"
    place: Literal["loss", "reward"] = "loss"
