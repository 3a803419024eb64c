"""Advantage estimators: pure functions on numbers, each with its formula and source. No torch."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

ZERO_STD = 1e-6
"""Returns with a smaller deviation are equal."""


def group_relative(returns: Sequence[float], *, normalize_std: bool = True) -> list[float]:
    """``A_i = (R_i - mean(R)) / std(R)`` over a group (GRPO, arXiv 2402.03300, section 4.1.2).

    ``std`` is the sample standard deviation, as in the public implementations. With
    ``normalize_std=False`` the division is left out (Dr. GRPO, arXiv 2503.20783). A group of equal
    returns, or of one, has no signal: all its advantages are exactly 0.

    Example:
        >>> group_relative([1.0, 0.0, 0.0, 1.0], normalize_std=False)
        [0.5, -0.5, -0.5, 0.5]
    """
    if len(returns) < 2 or (std := statistics.stdev(returns)) < ZERO_STD:
        return [0.0] * len(returns)
    mean = statistics.fmean(returns)
    scale = std if normalize_std else 1.0
    return [(value - mean) / scale for value in returns]


def leave_one_out(returns: Sequence[float]) -> list[float]:
    """``A_i = R_i - mean of the others' R`` (RLOO, arXiv 2402.14740, section 4.2). A group of equal
    returns, or of one, gives exactly 0.

    Example:
        >>> leave_one_out([3.0, 0.0, 0.0])
        [3.0, -1.5, -1.5]
    """
    scale = len(returns) / max(1, len(returns) - 1)
    return [scale * value for value in group_relative(returns, normalize_std=False)]


def whiten(advantages: Sequence[float], counted: Sequence[bool] | None = None) -> list[float]:
    """``(A - mean(A)) / std(A)`` over all tokens of a batch (REINFORCE++, arXiv 2501.03262, eq. 8;
    also usual in PPO). The population standard deviation; all 0 if they are equal.

    ``counted``: the entries that mean and deviation are taken over, by default all. Masked
    tokens, which the loss leaves out, must not change the others.

    Example:
        >>> whiten([1.0, 3.0, 99.0], [True, True, False])[:2]
        [-1.0, 1.0]
    """
    kept = advantages if counted is None else list(itertools.compress(advantages, counted))
    if not kept:
        return [0.0] * len(advantages)
    mean = math.fsum(kept) / len(kept)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in kept) / len(kept))
    centred = [value - mean for value in advantages]
    return [value / std if std >= ZERO_STD else 0.0 for value in centred]


def returns_to_go(
    rewards: Sequence[float], *, gamma: float, last_value: float = 0.0
) -> list[float]:
    """``G_t = r_t + gamma G_(t+1)``, where ``last_value`` is what comes after the last reward.

    Example:
        >>> returns_to_go([1.0, 0.0, 4.0], gamma=0.5)
        [2.0, 2.0, 4.0]
    """
    to_go: list[float] = []
    value = last_value
    for reward in reversed(rewards):
        value = reward + gamma * value
        to_go.append(value)
    return to_go[::-1]


def gae(
    rewards: Sequence[float],
    values: Sequence[float],
    *,
    last_value: float,
    gamma: float,
    lam: float,
) -> list[float]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), over one trajectory.

    ``A_t = delta_t + gamma lam A_(t+1)`` with ``delta_t = r_t + gamma V_(t+1) - V_t``. Text
    between two entries (an observation between two action tokens) does not count as time.

    Args:
        rewards: (T,), after each action.
        values: (T,), of the state before each action.
        last_value: Value of the last state: 0 when the task ended, the critic's when a limit
            cut the task off.
        gamma, lam: Discount, and trade-off between bias (0) and variance (1).
    """
    deltas = [
        reward + gamma * after - before
        for reward, before, after in zip(rewards, values, [*values[1:], last_value], strict=True)
    ]
    return returns_to_go(deltas, gamma=gamma * lam)
