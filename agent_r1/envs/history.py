"""Memory as a setting of any environment: the part of a long history that the agent still sees.

    [env.memory]
    name = "recent"          # the last turns whole; of older ones, the agent's text
    turns = 1

    [env.memory]
    name = "summary"         # the agent writes what it needs to keep; the outcome is its reward
    every = 2

Both wrap an environment and are environments themselves. A custom memory is a class like these,
named as ``file.py:Class``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import Field

from agent_r1.config.section import NamedSection
from agent_r1.envs.base import Env, Transition
from agent_r1.envs.gold import Gold, as_message, gold_of
from agent_r1.envs.lifecycle import close_env
from agent_r1.types import Message, Outcome, Task
from agent_r1.utils.waiting import OwnThread


class Recent:
    """The latest turns stay whole. Older turns lose their calls and results; the agent's
    text beside the calls, its notes, stays below the question.
    """

    class Settings(NamedSection):
        """``turns``: how many stay whole."""

        name: str = "recent"
        turns: int = Field(1, ge=1)

    def __init__(self, env: Env, settings: Any) -> None:
        self._env, self._settings = env, settings

    @property
    def episode_thread(self) -> OwnThread | None:
        """The thread of the environment's plain code."""
        return getattr(self._env, "episode_thread", None)

    @property
    def schemas(self) -> Sequence[dict[str, Any]]:
        return self._env.schemas

    async def reset(self, task: Task, seed: int) -> Sequence[Message]:
        self._opening = await self._env.reset(task, seed)
        self._turns: list[tuple[Message, Sequence[Message]]] = []
        return self._opening

    async def step(self, message: Message) -> Transition:
        transition = await self._env.step(message)
        if transition.done:
            return transition
        if transition.history is not None:  # the environment's own rewriting goes first
            self._opening, self._turns = transition.history, []
            return transition
        self._turns.append((message, transition.messages))
        if len(self._turns) <= self._settings.turns:
            return transition
        return dataclasses.replace(transition, history=self._history())

    def _history(self) -> list[Message]:
        """The question, the notes of older turns, the latest turns."""
        older = self._turns[: -self._settings.turns]
        notes = [message.content for message, _ in older if message.content]
        return _with_notes(self._opening, "Your notes:", notes) + self._latest()

    def _latest(self) -> list[Message]:
        """The turns that stay whole, as messages."""
        turns = self._turns[-self._settings.turns :] if self._settings.turns else []
        return [said for message, answers in turns for said in (message, *answers)]

    async def outcome(self) -> Outcome:
        return await self._env.outcome()

    async def close(self) -> None:
        await close_env(self._env)

    def gold(self) -> Iterable[Gold]:
        return gold_of(self._env)


class Summary(Recent):
    """After some turns the agent is asked to write down what it needs; from then on it sees the
    question, its summary and the latest turns, nothing else. Tool calls in a summary are not
    made.
    """

    class Settings(NamedSection):
        """``every``: turns between summaries; ``turns``: how many stay whole beside one;
        ``instruction``: what the agent is asked.
        """

        name: str = "summary"
        every: int = Field(2, ge=1)
        turns: int = Field(1, ge=0)
        instruction: str = "Write down what you know and what is left to find out."

    async def reset(self, task: Task, seed: int) -> Sequence[Message]:
        self._num_turns, self._asked = 0, False
        self._state_key: str | None = None
        return await super().reset(task, seed)

    async def step(self, message: Message) -> Transition:
        if self._asked:
            self._asked = False
            history = _with_notes(self._opening, "Your summary:", [message.content])
            return Transition(history=history + self._latest(), state_key=self._state_key)
        transition = await self._env.step(message)
        if transition.done:
            return transition
        if transition.history is not None:
            self._opening, self._turns = transition.history, []
        else:
            self._turns.append((message, transition.messages))
        self._num_turns += 1
        if self._num_turns % self._settings.every:
            return transition
        self._asked, self._state_key = True, transition.state_key
        asks = Message("user", self._settings.instruction)
        state = None if self._state_key is None else f"{self._state_key}, summary"
        if transition.history is not None:
            history = [*transition.history, asks]
            return dataclasses.replace(transition, history=history, state_key=state)
        messages = (*transition.messages, asks)
        return dataclasses.replace(transition, messages=messages, state_key=state)

    def gold(self) -> Iterator[Gold]:
        """The environment's own solution; each summary repeats all that was said so far."""
        said: list[str] = []
        for action in gold_of(self._env):
            if self._asked:
                yield "\n".join(said) or "Nothing yet."
            yield action
            said.append(as_message(action).content)


def _with_notes(opening: Sequence[Message], title: str, notes: Sequence[str]) -> list[Message]:
    *before, last = opening
    text = "\n".join([last.content, *([title, *notes] if any(notes) else [])])
    return [*before, dataclasses.replace(last, content=text)]
