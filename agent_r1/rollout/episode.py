"""The loop between environment and engine: budgets, time limits, faults, and the one stop reason
of each episode.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from pydantic import Field

from agent_r1.config import ConfigError, Section
from agent_r1.env import Env, Transition
from agent_r1.render import Renderer
from agent_r1.types import (
    Engine,
    Group,
    Outcome,
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
            # All sessions open before any episode starts: the first batch is the whole wave.
            sessions = [self.engine.session() for _ in wave]
            try:
                episodes = [
                    run_episode(
                        self.make_env,
                        session,
                        self.renderer,
                        tasks[index],
                        attempt=attempt,
                        limits=self.limits,
                        temperature=temperature,
                        # All attempts meet the same instance; a task drawn twice is sampled anew.
                        env_seed=derive_seed(seed, tasks[index].id),
                        sampling_seed=derive_seed(seed, index, tasks[index].id, attempt),
                    )
                    for session, (index, attempt) in zip(sessions, wave, strict=True)
                ]
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
    make_env: Callable[[], Env],
    session: Session,
    renderer: Renderer,
    task: Task,
    *,
    attempt: int,
    limits: Limits,
    temperature: float,
    env_seed: int,
    sampling_seed: int,
) -> Trajectory:
    """Plays one episode to its end.

    An environment that fails gives a trajectory with ``stop`` FAULT, not an exception. Only a
    ``ConfigError``, which would fail every episode, is raised, and what the engine raises.
    """
    trajectory = Trajectory(task.id, task.category, attempt)
    start = time.perf_counter()
    env: Env | None = None
    try:
        with _faults("environment"):
            env = make_env()
        play = _Play(trajectory, env, session, renderer, limits, start + limits.seconds)
        trajectory.stop = await play.run(task, temperature, env_seed, sampling_seed)
        session.close()  # others need not wait for the scorer
        trajectory.outcome = await _outcome(env, limits.seconds)
    except _FaultError as error:
        trajectory.stop, trajectory.fault = StopReason.FAULT, str(error)
    finally:
        session.close()
        trajectory.seconds = time.perf_counter() - start
        if env is not None:
            try:
                await _guarded(env.close, limits.seconds, "close")
            except (_FaultError, _OutOfTimeError) as error:
                trajectory.fault = trajectory.fault or f"close: {error}"
    return trajectory


@dataclass
class _Play:
    """The turns of one episode, as they are written into its trajectory."""

    trajectory: Trajectory
    env: Env
    session: Session
    renderer: Renderer
    limits: Limits
    deadline: float

    async def run(
        self, task: Task, temperature: float, env_seed: int, sampling_seed: int
    ) -> StopReason:
        """Fills in prompt and steps; returns why the episode stopped."""
        path = list(await self._reset(task, env_seed))
        state_key: str | None = "start"
        for turn in range(self.limits.turns):
            room = min(self.limits.tokens_per_turn, self.limits.tokens - len(path))
            if room <= 0:
                return StopReason.MAX_TOKENS
            if self._remaining() <= 0:
                return StopReason.MAX_TIME
            sampling = Sampling(room, self.renderer.stop_token_ids, temperature)
            clock = time.perf_counter()
            action = await self.session.generate(path, sampling, derive_seed(sampling_seed, turn))
            step = Step(action, self.renderer.parse(action), state_key=state_key)
            step.generate_seconds = time.perf_counter() - clock
            self.trajectory.steps.append(step)
            path += action.token_ids
            if len(path) >= self.limits.tokens and action.stop == "length":
                return StopReason.MAX_TOKENS  # a sentence that our limit cut is no answer
            try:
                transition = await self._step(step)
            except _OutOfTimeError:
                return StopReason.MAX_TIME
            if transition.done:
                return StopReason.DONE
            if turn + 1 == self.limits.turns:
                break
            with _faults("step"):
                observation_ids = self.renderer.observation(transition.messages, action)
            if len(path) + len(observation_ids) >= self.limits.tokens:
                return StopReason.MAX_TOKENS
            step.observation_ids = observation_ids
            path += observation_ids
            state_key = transition.state_key
        return StopReason.MAX_TURNS

    def _remaining(self) -> float:
        return self.deadline - time.perf_counter()

    async def _reset(self, task: Task, seed: int) -> tuple[int, ...]:
        """Starts the task; the prompt's tokens."""
        try:
            prompt = await _guarded(lambda: self.env.reset(task, seed), self._remaining(), "reset")
        except _OutOfTimeError as error:
            raise _FaultError(f"reset: not done in {self.limits.seconds:g} seconds") from error
        with _faults("reset"):
            self.trajectory.prompt = tuple(prompt)
            self.trajectory.prompt_ids = self.renderer.prompt(prompt, self.env.schemas)
        return self.trajectory.prompt_ids

    async def _step(self, step: Step) -> Transition:
        """Takes the action to the environment and writes down what it answered."""
        clock = time.perf_counter()
        try:
            work = functools.partial(self.env.step, step.message)
            transition = await _guarded(work, self._remaining(), "step")
        finally:
            step.env_seconds = time.perf_counter() - clock
        with _faults("step"):
            step.observation = tuple(transition.messages)
            step.rewards = {str(part): float(value) for part, value in transition.rewards.items()}
            step.faults = tuple(transition.faults)
            for part, value in step.rewards.items():
                if not math.isfinite(value):
                    raise ValueError(f"the process reward {part!r} is {value}")
        return transition


async def _outcome(env: Env, seconds: float) -> Outcome:
    """The environment's outcome in plain Python numbers."""
    try:
        outcome = await _guarded(env.outcome, seconds, "outcome")
    except _OutOfTimeError as error:
        raise _FaultError(f"outcome: no result within {seconds:g} seconds") from error
    with _faults("outcome"):
        metrics = {str(name): float(value) for name, value in outcome.metrics.items()}
        plain = Outcome(float(outcome.reward), bool(outcome.success), metrics)
        if not all(map(math.isfinite, [plain.reward, *metrics.values()])):
            raise ValueError(f"not finite: {plain}")
        return plain


async def _guarded(work: Callable[[], Awaitable[T]], seconds: float, what: str) -> T:
    """Waits for the environment; its exceptions become faults of this episode alone."""
    with _faults(what):
        try:
            async with asyncio.timeout(max(seconds, 0.0)) as limit:
                return await work()
        except TimeoutError as error:
            if limit.expired():
                raise _OutOfTimeError from error
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # we are being cancelled; else something that the environment awaited was
            raise _FaultError(f"{what}: CancelledError") from error


@contextmanager
def _faults(what: str) -> Iterator[None]:
    """Exceptions of the environment's author, here and in what it returned, become faults."""
    try:
        yield
    except (_FaultError, _OutOfTimeError, ConfigError):
        raise
    except Exception as error:
        raise _FaultError(f"{what}: {type(error).__name__}: {error}") from error
