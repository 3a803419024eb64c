"""Small hand-made groups for tests of credit and losses: several turns, observations between,
unequal lengths, a truncated trajectory, an excluded one, a group of equal outcomes.
"""

import random

from agent_r1.types import Action, Group, Message, Outcome, Step, StopReason, Task, Trajectory


def make_step(num_tokens, num_observed, rewards, key, rng):
    action = Action(
        tuple(rng.randrange(1, 40) for _ in range(num_tokens)),
        tuple(rng.uniform(-3, -0.1) for _ in range(num_tokens)),
        (0.3,) * num_tokens,
        0,
        "stop",
    )
    observed = tuple(rng.randrange(1, 40) for _ in range(num_observed))
    step = Step(action, Message("assistant", "said"), (), observed, dict(rewards), key)
    step.values = tuple(rng.uniform(-1, 1) for _ in range(num_tokens + 1))
    step.reference_logprobs = tuple(rng.uniform(-3, -0.1) for _ in range(num_tokens))
    return step


def make_trajectory(attempt, outcome, steps, rng, stop=StopReason.DONE):
    made = [make_step(*step, rng) for step in steps]
    made[-1].observation_ids = ()
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
        ),
        Group(
            Task("two", "?"),
            [make_trajectory(i, outcome, steps, rng) for i, (outcome, steps) in enumerate(equal)],
        ),
    ]


def flat(nested):
    """Numbers per group, trajectory, step and token in a row."""
    return [x for group in nested for trajectory in group for step in trajectory for x in step]
