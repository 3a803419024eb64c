"""The loop between environment and engine: time limits, faults, and the one stop reason of each
episode.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

from agent_r1.envs.base import Env, Leader, Transition
from agent_r1.envs.lifecycle import (
    close_env,
    must_be_plain,
    plain_outcome,
    plain_rewards,
    schemas_of,
)
from agent_r1.errors import ConfigError
from agent_r1.render import Renderer
from agent_r1.rollout.conversation import Conversation, EndedError, Limits
from agent_r1.rollout.engine import Sampling, Session
from agent_r1.rollout.faults import FaultError, OutOfTimeError, faults, guarded
from agent_r1.types import Message, Outcome, StopReason, Task, ToolCall, Trajectory


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
        with faults("environment"):
            env = make_env()
        conversation = Conversation(
            trajectory,
            session,
            renderer,
            limits=limits,
            sampling=sampling,
            seed=sampling_seed,
            clock=functools.partial(_seconds_of, paused),
        )
        if isinstance(env, Leader):
            trajectory.stop = await env.lead_conversation(task, env_seed, conversation)
        else:
            trajectory.stop = await _Play(env, conversation).run(task, env_seed)
        session.close()  # others need not wait for the scorer
        trajectory.outcome = await _outcome(env, limits.seconds)
    except FaultError as error:
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
                await guarded(functools.partial(close_env, env), limits.seconds, "close")
            except (FaultError, OutOfTimeError) as error:
                trajectory.fault = trajectory.fault or f"close: {error}"
    return trajectory


@dataclass(frozen=True)
class _Play:
    """An environment that leads a conversation."""

    env: Env
    conversation: Conversation

    async def run(self, task: Task, seed: int) -> StopReason:
        """Plays to the end; returns why the episode stopped."""
        await self._reset(task, seed)
        state_key: str | None = "start"
        try:
            while True:
                step = await self.conversation.generate(state_key=state_key)
                transition = await self._step(step.message)
                if transition.done:
                    return _ending(transition, step.message)
                if self.conversation.is_at_last_turn:
                    return StopReason.MAX_TURNS
                with faults("step"):
                    self._go_on(transition)
                state_key = transition.state_key
        except EndedError as end:
            return end.stop
        except OutOfTimeError:
            return StopReason.MAX_TIME

    def _go_on(self, transition: Transition) -> None:
        """Lets the agent see what the environment answered."""
        if transition.history is None:
            self.conversation.answer()
        else:
            self.conversation.rewrite(transition.history, schemas_of(self.env))

    async def _reset(self, task: Task, seed: int) -> None:
        """Starts the task."""
        seconds = self.conversation.remaining()
        try:
            prompt = await guarded(lambda: self.env.reset(task, seed), seconds, "reset")
        except OutOfTimeError as error:
            limit = self.conversation.limits.seconds
            raise FaultError(f"reset: not done in {limit:g} seconds") from error
        with faults("reset"):
            self.conversation.open(prompt, schemas_of(self.env))

    async def _step(self, message: Message) -> Transition:
        """Gives the action to the environment and records the answer."""
        note, start = self.conversation.note, time.perf_counter()
        try:
            work = functools.partial(self.env.step, message)
            transition = await guarded(work, self.conversation.remaining(), "step")
        except FaultError as error:
            note(events=error.events)
            raise
        finally:
            note(env_seconds=time.perf_counter() - start)
        with faults("step"):
            self.conversation.see(transition.messages)
            must_be_plain(transition)
            note(
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
        outcome = await guarded(env.outcome, seconds, "outcome")
    except OutOfTimeError as error:
        raise FaultError(f"outcome: no result within {seconds:g} seconds") from error
    with faults("outcome"):
        return plain_outcome(outcome)
