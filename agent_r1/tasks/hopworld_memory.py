"""HopWorld with a memory limit: the environment rewrites what the agent has before it.

The agent sees its latest turns whole. Of older ones the calls and results are dropped; what the
agent said beside them, its notes, stays below the question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pydantic import Field

from agent_r1.env import Transition
from agent_r1.tasks.hopworld import HopWorld
from agent_r1.types import Message


class HopWorldMemory(HopWorld):
    """See the module's docstring."""

    class Settings(HopWorld.Settings):
        """``memory``: how many of the latest turns stay whole."""

        name: str = "hopworld-memory"
        memory: int = Field(1, ge=1)

    def start(self) -> None:
        super().start()
        self._turns: list[tuple[Message, Sequence[Message]]] = []

    async def step(self, message: Message) -> Transition:
        transition = await super().step(message)
        if transition.done:
            return transition
        self._turns.append((message, transition.messages))
        if len(self._turns) <= self.settings.memory:
            return transition
        return dataclasses.replace(transition, history=self._history())

    def _history(self) -> list[Message]:
        """The question, the notes of older turns, the latest turns."""
        *opening, question = self.prompt()
        old, kept = self._turns[: -self.settings.memory], self._turns[-self.settings.memory :]
        notes = [message.content for message, _ in old if message.content]
        text = "\n".join([question.content, *(["Your notes:", *notes] if notes else [])])
        history = [*opening, Message("user", text)]
        for message, answers in kept:
            history += [message, *answers]
        return history
