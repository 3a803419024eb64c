"""Scores and their intervals."""

import pytest

from agent_r1.evaluate import score, wilson
from agent_r1.types import Outcome, StopReason, Trajectory


def episode(success, **metrics):
    outcome = Outcome(2.0 * success, bool(success), metrics)
    return Trajectory("t", "", 0, stop=StopReason.DONE, outcome=outcome)


def test_wilson_by_hand():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(5, 5)[1] == 1.0


def test_faults_are_counted_apart_and_never_score():
    fault = Trajectory("t", "", 0, stop=StopReason.FAULT, fault="down")
    result = score([episode(1, f1=0.5), episode(0, f1=0.0), fault])
    assert (result.tasks, result.faults) == (2, 1)
    assert (result.success, result.reward, result.metrics) == (0.5, 1.0, {"f1": 0.25})
    nothing = score([fault])
    assert nothing.faults == 1
    assert nothing.success is None
