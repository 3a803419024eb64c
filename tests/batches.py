"""Small hand-made groups for tests of credit and losses: several turns, observations between,
unequal lengths, a truncated trajectory, an excluded one, a group of equal outcomes.
"""

import dataclasses
import random

from agent_r1.types import (
    Action,
    Estimates,
    Group,
    Message,
    Outcome,
    Step,
    StopReason,
    Task,
    Trajectory,
)


def make_step(num_tokens, num_observed, rewards, key, rng):
    action = Action(
        tuple(rng.randrange(1, 40) for _ in range(num_tokens)),
        tuple(rng.uniform(-3, -0.1) for _ in range(num_tokens)),
        (0.3,) * num_tokens,
        (),
        "stop",
    )
    observed = tuple(rng.randrange(1, 40) for _ in range(num_observed))
    return Step(action, Message("assistant", "said"), (), observed, dict(rewards), key)


def make_trajectory(attempt, outcome, steps, rng, stop=StopReason.DONE):
    made = [make_step(*step, rng) for step in steps]
    made[-1] = dataclasses.replace(made[-1], observation_ids=())
    result = None if outcome is None else Outcome(outcome, outcome >= 1)
    return Trajectory("t", "", attempt, (), (5, 6, 7), made, stop, result)


def make_groups(seed=0):
    rng = random.Random(seed)
    first = [
        (1.0, [(2, 3, {"format": 1.0, "reached": 0.5}, "start"), (3, 1, {"reached": 0.5}, "a")]),
        (
            0.0,
            [(4, 2, {"format": 0.0}, "start"), (1, 4, {}, "start"), (2, 0, {"format": 1.0}, "a")],
        ),
        (0.25, [(5, 0, {"format": 1.0}, "start")]),
        (None, [(3, 2, {"format": 1.0}, "start")]),
    ]
    stops = [StopReason.DONE, StopReason.MAX_TURNS, StopReason.DONE, StopReason.FAULT]
    equal = [
        (0.0, [(2, 2, {"format": 1.0}, "start"), (2, 0, {}, "b")]),
        (0.0, [(3, 2, {"format": 0.5}, "start"), (1, 0, {}, "c")]),
    ]
    return [
        Group(
            Task("one", "?"),
            [
                make_trajectory(i, outcome, steps, rng, stop)
                for i, ((outcome, steps), stop) in enumerate(zip(first, stops, strict=True))
            ],
            0,
        ),
        Group(
            Task("two", "?"),
            [make_trajectory(i, outcome, steps, rng) for i, (outcome, steps) in enumerate(equal)],
            1,
        ),
    ]


def make_known(groups):
    """Values and reference log-probabilities of each step, the same wherever its attempt stands."""
    known = Estimates()
    for group in groups:
        for key, step in group.steps():
            attempt = group.trajectories[key.attempt].attempt
            rng = random.Random(f"{group.number} {attempt} {key.step}")
            count = len(step.action.token_ids)
            known.values[key] = tuple(rng.uniform(-1, 1) for _ in range(count + 1))
            known.reference_logprobs[key] = tuple(rng.uniform(-3, -0.1) for _ in range(count))
    return known
