"""The loop between environment and engine: budgets, time limits, faults, and the one stop reason
of each episode.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import Field

from agent_r1.config import Section
from agent_r1.env import Env, Transition
from agent_r1.render import Renderer
from agent_r1.types import (
    Engine,
    Group,
    Sampling,
    Session,
    Step,
    StopReason,
    Task,
    Trajectory,
    derive_seed,
)

T = TypeVar("T")


class Limits(Section):
    """When an episode is cut off. ``tokens`` counts the whole episode, the prompt included."""

    turns: int = Field(8, ge=1)
    tokens_per_turn: int = Field(256, ge=1)
    tokens: int = Field(4096, ge=1)
    seconds: float = Field(300.0, gt=0)


@dataclass(frozen=True)
class Rollout:
    """Everything that the episodes of a run have in common."""

    make_env: Callable[[], Env]
    engine: Engine
    renderer: Renderer
    limits: Limits
    concurrency: int = 256
    """Episodes at once; they run in waves of this size."""

    async def run(
        self, tasks: Sequence[Task], *, attempts: int, temperature: float, seed: int
    ) -> list[Group]:
        """All attempts at all tasks, one group a task. Sampling is keyed by (seed, task, attempt,
        turn).
        """
        plan = [(index, attempt) for index in range(len(tasks)) for attempt in range(attempts)]
        groups = [Group(task, []) for task in tasks]
        for start in range(0, len(plan), self.concurrency):
            wave = plan[start : start + self.concurrency]
            # All sessions open before any episode starts, so that the first batch is the whole
            # wave.
            sessions = [self.engine.session() for _ in wave]
            episodes = [
                run_episode(
                    self.make_env(),
                    session,
                    self.renderer,
                    tasks[index],
                    attempt=attempt,
                    limits=self.limits,
                    temperature=temperature,
                    seed=derive_seed(seed, tasks[index].id, attempt),
                )
                for session, (index, attempt) in zip(sessions, wave, strict=True)
            ]
            try:
                trajectories = await asyncio.gather(*episodes)
            finally:
                for session in sessions:
                    session.close()
            for (index, _), trajectory in zip(wave, trajectories, strict=True):
                groups[index].trajectories.append(trajectory)
        return groups


class _FaultError(Exception):
    """The environment or its scorer failed."""


class _OutOfTimeError(Exception):
    """The episode's time limit struck while the environment worked."""


async def run_episode(
    env: Env,
    session: Session,
    renderer: Renderer,
    task: Task,
    *,
    attempt: int,
    limits: Limits,
    temperature: float,
    seed: int,
) -> Trajectory:
    """Plays one episode to its end. An environment that fails gives a trajectory with ``stop``
    FAULT, not an exception.
    """
    trajectory = Trajectory(task.id, task.category, attempt)
    start = time.perf_counter()
    try:
        trajectory.stop = await _play(
            trajectory,
            env,
            session,
            renderer,
            task,
            limits,
            temperature,
            seed,
            deadline=start + limits.seconds,
        )
        session.close()  # others need not wait for the scorer
        try:
            outcome = await _guarded(env.outcome(), limits.seconds, "outcome")
        except _OutOfTimeError as error:
            raise _FaultError(f"outcome: no result within {limits.seconds:g} seconds") from error
        if not math.isfinite(outcome.reward):
            raise _FaultError(f"outcome: the reward is {outcome.reward}")
        trajectory.outcome = outcome
    except _FaultError as error:
        trajectory.stop, trajectory.fault = StopReason.FAULT, str(error)
    finally:
        session.close()
        trajectory.seconds = time.perf_counter() - start
        try:
            await _guarded(env.close(), limits.seconds, "close")
        except (_FaultError, _OutOfTimeError) as error:
            trajectory.fault = trajectory.fault or str(error)
    return trajectory


async def _play(
    trajectory: Trajectory,
    env: Env,
    session: Session,
    renderer: Renderer,
    task: Task,
    limits: Limits,
    temperature: float,
    seed: int,
    *,
    deadline: float,
) -> StopReason:
    """Fills in prompt and steps; returns why the episode stopped."""

    def remaining() -> float:
        return deadline - time.perf_counter()

    try:
        prompt = await _guarded(env.reset(task, seed), remaining(), "reset")
    except _OutOfTimeError as error:
        raise _FaultError(f"reset: not done within {limits.seconds:g} seconds") from error
    trajectory.prompt = tuple(prompt)
    trajectory.prompt_ids = renderer.prompt(prompt, env.schemas)
    path = list(trajectory.prompt_ids)
    for turn in range(limits.turns):
        room = min(limits.tokens_per_turn, limits.tokens - len(path))
        if room <= 0:
            return StopReason.MAX_TOKENS
        if remaining() <= 0:
            return StopReason.MAX_TIME
        sampling = Sampling(room, renderer.stop_token_ids, temperature)
        clock = time.perf_counter()
        action = await session.generate(path, sampling, derive_seed(seed, turn))
        step = Step(action, renderer.parse(action), generate_seconds=time.perf_counter() - clock)
        trajectory.steps.append(step)
        path += action.token_ids
        clock = time.perf_counter()
        try:
            transition = await _guarded(env.step(step.message), remaining(), "step")
        except _OutOfTimeError:
            return StopReason.MAX_TIME
        finally:
            step.env_seconds = time.perf_counter() - clock
        _record(step, transition)
        if transition.done:
            return StopReason.DONE
        if turn + 1 == limits.turns:
            break
        observation_ids = renderer.observation(transition.messages, action)
        if len(path) + len(observation_ids) >= limits.tokens:
            return StopReason.MAX_TOKENS
        step.observation_ids = observation_ids
        path += observation_ids
    return StopReason.MAX_TURNS


def _record(step: Step, transition: Transition) -> None:
    for part, value in transition.rewards.items():
        if not math.isfinite(value):
            raise _FaultError(f"step: the process reward {part!r} is {value}")
    step.observation = transition.messages
    step.rewards = dict(transition.rewards)
    step.state_key = transition.state_key
    step.faults = transition.faults


async def _guarded(work: Awaitable[T], seconds: float, what: str) -> T:
    """Waits for the environment; its exceptions become faults of this episode alone."""
    try:
        async with asyncio.timeout(max(seconds, 0.0)) as limit:
            return await work
    except Exception as error:
        if limit.expired():
            raise _OutOfTimeError from error
        raise _FaultError(f"{what}: {type(error).__name__}: {error}") from error
