"""Users: an environment with a user who can be asked. A message of the agent that is neither a call
nor an answer goes to the user, who is scripted, or played by any model on any engine.

    [env.user]
    name = "model"                    # "scripted" by default
    model = { path = "smollm2-135m" }
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Protocol

from pydantic import BeforeValidator, Field, SerializeAsAny

from agent_r1.config.registry import Registry
from agent_r1.config.section import NamedSection
from agent_r1.envs.base import Transition
from agent_r1.envs.tool_env import ToolEnv
from agent_r1.types import Message

USERS: Registry[User] = Registry(
    "user",
    {"scripted": "agent_r1.envs.user:Scripted", "model": "agent_r1.rollout.model_user:ModelUser"},
    default="scripted",
)
UserSection = Annotated[SerializeAsAny[NamedSection], BeforeValidator(USERS.section)]


class User(Protocol):
    """Somebody who answers questions."""

    async def answer(self, env: UserEnv, said: Sequence[Message], seed: int) -> str:
        """What the user says next.

        Args:
            env: The episode; ``env.brief()`` is what the user knows.
            said: Questions of the agent and what the user answered, in order; the last one is open.
            seed: Seed of all randomness.
        """
        ...


class Scripted:
    """Answers with the environment's ``scripted``."""

    class Settings(NamedSection):
        name: str = "scripted"

    def __init__(self, settings: NamedSection) -> None:
        return None

    async def answer(self, env: UserEnv, said: Sequence[Message], seed: int) -> str:
        return env.scripted(said[-1])


class UserEnv(ToolEnv):
    """A ``ToolEnv`` with a user. Write ``is_answer``, ``scripted`` and ``brief``."""

    class Settings(ToolEnv.Settings):
        """``user``: who answers; ``max_questions``: one more ends the episode."""

        user: UserSection = Field(default={}, validate_default=True)
        max_questions: int = Field(2, ge=1)

    num_questions: int
    """Questions that the agent has asked so far."""

    def is_answer(self, message: Message) -> bool:
        """Whether a message without calls ends the task; else it is a question."""
        raise NotImplementedError(f"{type(self).__name__} has no is_answer(message)")

    def scripted(self, message: Message) -> str:
        """What a scripted user says to a question."""
        raise NotImplementedError(f"{type(self).__name__} has no scripted(message)")

    def brief(self) -> str:
        """What a user played by a model must know."""
        return f"You asked an assistant: {self.task.question}"

    def question(self, message: Message) -> dict[str, float]:
        """Process rewards of a question; ``num_questions`` counts it already."""
        return {}

    def state_key(self) -> str | None:
        """The state after an answer of the user's, see ``Transition.state_key``."""
        return None

    def ending(self, message: Message) -> dict[str, float]:
        """Process rewards of the answer."""
        return {}

    def start(self) -> None:
        super().start()
        self.num_questions = 0
        self._said: list[Message] = []
        self._user: User = USERS.make(self.settings.user)

    async def reply(self, message: Message) -> Transition:
        is_answer = self.is_answer(message)
        self.num_questions += not is_answer
        if is_answer or self.num_questions > self.settings.max_questions:
            return Transition(done=True, rewards=self.ending(message))
        self._said.append(message)
        said = Message("user", await self._user.answer(self, self._said, self.seed))
        self._said.append(said)
        return Transition((said,), self.question(message), state_key=self.state_key())


def flipped(said: Sequence[Message], brief: str) -> list[Message]:
    """The conversation from the user's side, for a model in that role."""
    roles: dict[str, Any] = {"assistant": "user", "user": "assistant"}
    return [Message("system", brief), *(Message(roles[m.role], m.content) for m in said)]
