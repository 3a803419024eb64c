"""Advantage estimators: pure functions on numbers, each with its formula and source."""

from __future__ import annotations

import statistics

ZERO_STD = 1e-6
"""Returns that differ by less are the same."""


def group_relative(returns: list[float], *, normalize_std: bool = True) -> list[float]:
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
