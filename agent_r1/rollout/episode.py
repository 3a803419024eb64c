"""The loop between environment and engine: budgets, time limits, faults, and the one stop reason
of each episode.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field

from agent_r1.config.section import Section
from agent_r1.envs.base import Env, Transition
from agent_r1.envs.lifecycle import (
    close_env,
    must_be_plain,
    plain_outcome,
    plain_rewards,
    schemas_of,
    tidy,
)
from agent_r1.errors import ConfigError, ExpiredError, ToolFailureError
from agent_r1.render import Renderer
from agent_r1.rollout.engine import Sampling, Session
from agent_r1.rollout.history import render_history
from agent_r1.types import (
    Action,
    Message,
    Outcome,
    Step,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    derive_seed,
)
from agent_r1.utils.text import describe
from agent_r1.utils.waiting import within

T = TypeVar("T")
LOOK_SECONDS = 0.05
"""At least, between two looks at whether an episode's time is over."""
MAX_CHARS_PER_TOKEN = 128
"""Text with more characters than this per allowed token is refused untokenised; the longest known
token, a run of blanks, has this many.
"""


class Limits(Section):
    """When a turn and when an episode is cut off.

    Attributes:
        turns: Model calls of an episode.
        tokens_per_turn: Sampled tokens of a turn.
        tokens: Longest context of the policy at any time, the prompt included.
        seconds: Wall time of an episode.
        stop_strings: Texts that end a turn, besides the chat format's own end.
    """

    turns: int = Field(8, ge=1)
    tokens_per_turn: int = Field(256, ge=1)
    tokens: int = Field(4096, ge=1)
    seconds: float = Field(300.0, gt=0)
    stop_strings: tuple[str, ...] = ()


class _FaultError(Exception):
    """The environment or its scorer failed; ``resample``: the episode should be played again."""

    def __init__(
        self, message: str, *, resample: bool = False, events: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.resample, self.events = resample, events


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
    sampling: Sampling,
    env_seed: int,
    sampling_seed: int,
    proven: bool = False,
    paused: Callable[[], float] = lambda: 0.0,
) -> Trajectory:
    """Plays one episode to its end. ``sampling`` is shortened where less room is left; seconds
    that the engine has been ``paused`` for the learner do not count.

    An environment that fails gives a trajectory with ``stop`` FAULT, not an exception. Raised are
    errors of the engine, and a ``ConfigError``, which would fail every episode, unless ``proven``
    says that other episodes could be started.
    """
    trajectory = Trajectory(task.id, task.category, attempt)
    start = time.perf_counter()
    env: Env | None = None
    try:
        with _faults("environment"):
            env = make_env()
        clock = functools.partial(_seconds_of, paused)
        play = _Play(trajectory, env, session, renderer, limits, clock, clock() + limits.seconds)
        trajectory.stop = await play.run(task, sampling, env_seed, sampling_seed)
        session.close()  # others need not wait for the scorer
        trajectory.outcome = await _outcome(env, limits.seconds)
    except _FaultError as error:
        trajectory.stop, trajectory.fault = StopReason.FAULT, str(error)
        trajectory.resample = error.resample
    except ConfigError as error:
        if not proven:
            raise
        trajectory.stop, trajectory.fault = StopReason.FAULT, str(error)
    finally:
        session.close()
        trajectory.seconds = time.perf_counter() - start
        if env is not None:
            try:
                await _guarded(functools.partial(close_env, env), limits.seconds, "close")
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
    clock: Callable[[], float]
    deadline: float

    async def run(
        self, task: Task, sampling: Sampling, env_seed: int, sampling_seed: int
    ) -> StopReason:
        """Fills in prompt and steps; returns why the episode stopped."""
        path = list(await self._reset(task, env_seed))
        state_key: str | None = "start"
        context_ids: tuple[int, ...] | None = None
        for turn in range(self.limits.turns):
            room = min(self.limits.tokens_per_turn, self.limits.tokens - len(path))
            if room <= 0:
                return StopReason.MAX_TOKENS
            turn_sampling = dataclasses.replace(sampling, max_tokens=room)
            clock = time.perf_counter()
            try:
                seed = derive_seed(sampling_seed, turn)
                action = await self._action(path, turn_sampling, seed)
            except TimeoutError as error:
                if (why := self.session.outage) is not None:
                    raise _FaultError(f"engine: {why}") from error
                return StopReason.MAX_TIME
            if action.stop == "memory" and not action.token_ids:
                return StopReason.MAX_MEMORY
            message = self.renderer.parse(action)
            if action.stop == "length":
                message = dataclasses.replace(message, cut=True)
            seconds = time.perf_counter() - clock
            step = Step(
                action,
                message,
                state_key=state_key,
                context_ids=context_ids,
                generate_seconds=seconds,
            )
            self.trajectory.steps.append(step)
            path += action.token_ids
            if action.stop == "memory":
                return StopReason.MAX_MEMORY
            if len(path) >= self.limits.tokens and action.stop == "length":
                return StopReason.MAX_TOKENS  # a sentence that our limit cut is no answer
            try:
                transition = await self._step(message)
            except _OutOfTimeError:
                return StopReason.MAX_TIME
            if transition.done:
                return _ending(transition, message)
            if turn + 1 == self.limits.turns:
                break
            with _faults("step"):
                path = self._next_path(path, transition)
            context_ids = None if transition.history is None else tuple(path)
            if len(path) >= self.limits.tokens:
                self._note(observation_ids=())
                return StopReason.MAX_TOKENS
            state_key = transition.state_key
        return StopReason.MAX_TURNS

    def _note(self, **found: Any) -> None:
        """Fills in fields of the last step."""
        steps = self.trajectory.steps
        steps[-1] = dataclasses.replace(steps[-1], **found)

    def _next_path(self, path: list[int], transition: Transition) -> list[int]:
        """The policy's next context: the old one with the observation after it, or the history that
        the environment set instead.
        """
        steps = self.trajectory.steps
        if transition.history is not None:
            own = [(step.message, step.action.token_ids) for step in steps]
            return render_history(transition.history, schemas_of(self.env), self.renderer, own)
        ids = self.renderer.observation(steps[-1].observation, steps[-1].action)
        self._note(observation_ids=ids)
        return path + list(ids)

    async def _action(self, path: Sequence[int], sampling: Sampling, seed: int) -> Action:
        """Samples an action; a ``TimeoutError`` if the episode's time is over before. That time
        stands still while the engine is paused, so it is looked at again when it seems over.
        """
        asked = asyncio.ensure_future(self.session.generate(path, sampling, seed))
        try:
            while not asked.done():
                if (left := self._remaining()) <= 0:
                    raise TimeoutError
                await asyncio.wait({asked}, timeout=max(left, LOOK_SECONDS))
            return asked.result()
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)  # no session closes before

    def _remaining(self) -> float:
        return self.deadline - self.clock()

    async def _reset(self, task: Task, seed: int) -> tuple[int, ...]:
        """Starts the task; returns the prompt's tokens."""
        try:
            prompt = await _guarded(lambda: self.env.reset(task, seed), self._remaining(), "reset")
        except _OutOfTimeError as error:
            raise _FaultError(f"reset: not done in {self.limits.seconds:g} seconds") from error
        with _faults("reset"):
            self.trajectory.prompt = tuple(map(tidy, prompt))
            if (size := self._too_large(self.trajectory.prompt)) is not None:
                self.trajectory.prompt = ()
                raise ValueError(f"the opening messages {size}")
            prompt_ids = self.renderer.prompt(self.trajectory.prompt, schemas_of(self.env))
            self.trajectory.prompt_ids = prompt_ids
        return self.trajectory.prompt_ids

    def _too_large(self, messages: Sequence[Message]) -> str | None:
        """The problem of messages that cannot fit in any tokenisation, or ``None``."""
        size = sum(len(message.content) for message in messages)
        if size <= MAX_CHARS_PER_TOKEN * self.limits.tokens + MAX_CHARS_PER_TOKEN**2:
            return None
        return f"have {size:,} characters, limits.tokens is {self.limits.tokens}"

    async def _step(self, message: Message) -> Transition:
        """Gives the action to the environment and records the answer."""
        clock = time.perf_counter()
        try:
            work = functools.partial(self.env.step, message)
            transition = await _guarded(work, self._remaining(), "step")
        except _FaultError as error:
            self._note(events=error.events)
            raise
        finally:
            self._note(env_seconds=time.perf_counter() - clock)
        with _faults("step"):
            observation = tuple(map(tidy, transition.messages))
            if (size := self._too_large(observation)) is not None:
                raise ValueError(f"the messages {size}; shorten what the agent gets to see")
            self._note(observation=observation)
            must_be_plain(transition)
            self._note(
                results=tuple(transition.results),
                rewards=plain_rewards(transition),
                events=tuple(transition.events),
            )
        return transition


def _seconds_of(paused: Callable[[], float]) -> float:
    """The time of an episode, which stands still while the engine is ``paused``."""
    return time.perf_counter() - paused()


def _ending(transition: Transition, message: Message) -> StopReason:
    """The stop reason of an episode that the environment called done. If the token limit cut the
    last turn, the task itself did not end, unless that turn holds a whole call or the environment
    answered it.
    """
    if transition.truncated:
        return StopReason.MAX_TURNS
    acted = transition.messages or any(isinstance(c, ToolCall) for c in message.tool_calls)
    return StopReason.MAX_TOKENS if message.cut and not acted else StopReason.DONE


async def _outcome(env: Env, seconds: float) -> Outcome:
    """The environment's outcome in plain Python numbers."""
    try:
        outcome = await _guarded(env.outcome, seconds, "outcome")
    except _OutOfTimeError as error:
        raise _FaultError(f"outcome: no result within {seconds:g} seconds") from error
    with _faults("outcome"):
        return plain_outcome(outcome)


async def _guarded(work: Callable[[], Awaitable[T]], seconds: float, what: str) -> T:
    """Waits for the environment; its exceptions become faults of this episode alone."""
    with _faults(what):
        try:
            return await within(seconds, work)
        except ExpiredError as error:
            raise _OutOfTimeError from error


@contextmanager
def _faults(what: str) -> Iterator[None]:
    """Exceptions of the environment's author, here and in what it returned, become faults."""
    try:
        yield
    except (_FaultError, _OutOfTimeError, ConfigError):
        raise
    except ToolFailureError as error:
        raise _FaultError(
            f"{what}: {error}", resample=error.resample, events=error.events
        ) from error
    except Exception as error:
        raise _FaultError(f"{what}: {describe(error)}{_hint(error)}") from error


def _hint(error: Exception) -> str:
    """What helps where a client was made in one run and used in the next."""
    if "loop" not in str(error) or not isinstance(error, RuntimeError):
        return ""
    return (
        "; something was made in another event loop, in a run before this one: make it by "
        "agent_r1.shared(key, make), once a run"
    )
