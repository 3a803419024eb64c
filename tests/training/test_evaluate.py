"""Scores and their intervals."""

import pytest

from agent_r1.errors import RunError
from agent_r1.training.evaluate import must_be_scored, score, wilson
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
    only_some = score([episode(1, f1=0.5), episode(0), fault])
    assert only_some.metrics == {"f1": 0.5}  # the mean of those that have it
    nothing = score([fault])
    assert nothing.faults == 1
    assert nothing.success is None


def test_an_evaluation_of_nothing_is_an_error_with_the_first_reason():
    faults = [Trajectory("t", "", 0, fault=reason) for reason in ("score: it is down", "later")]
    must_be_scored([*faults, episode(0)], "evaluation")
    with pytest.raises(RunError, match="not one of 2 episodes could be scored; the first: score: "):
        must_be_scored(faults, "evaluation")
