"""Environments: the results of an agent's actions, and their rewards. ``Env`` is the small
protocol that the rollout needs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from pydantic import BeforeValidator, SerializeAsAny

from agent_r1.config.registry import Registry
from agent_r1.config.section import NamedSection
from agent_r1.types import CallResult, Message, Outcome, StopReason, Task
from agent_r1.utils.waiting import OwnThread

if TYPE_CHECKING:
    from agent_r1.rollout.conversation import Conversation


@dataclass(slots=True, frozen=True)
class Transition:
    """An environment's answer to one action.

    Attributes:
        messages: Messages that the agent sees.
        rewards: Process rewards by part.
        done: Whether the episode has ended.
        truncated: The environment's own limit ended the episode, not the task.
        state_key: A name for the state now reached, equal where two states count as the same.
        events: What went wrong with tools, as ``"fault/timeout:search"``, ``"mistake/..."`` (the
            agent's own), ``"noise/..."`` (injected); counted, never scored by themselves.
        history: If set, replaces the whole conversation from now on, the opening messages included;
            ``messages`` is ignored. For summaries, truncation, another agent's task. It ends with a
            message to the agent. The agent's own messages that stay in it keep their sampled
            tokens, and are not trained on a second time.
        results: Raw results of the action's calls, for people who look at the episode; ``ToolEnv``
            fills them in.
    """

    messages: tuple[Message, ...] = ()
    rewards: dict[str, float] = field(default_factory=dict)
    done: bool = False
    truncated: bool = False
    state_key: str | None = None
    events: tuple[str, ...] = ()
    history: Sequence[Message] | None = None
    results: tuple[CallResult, ...] = ()


class Env(Protocol):
    """One episode at a time: ``reset``, then ``step`` per action, then ``outcome`` once, then
    ``close``.
    """

    @property
    def schemas(self) -> Sequence[dict[str, Any]]:
        """JSON schemas of the tools, for the prompt."""
        ...

    async def reset(self, task: Task, seed: int) -> Sequence[Message]:
        """Starts the task; all randomness of the episode comes from ``seed``. Returns the opening
        messages.
        """
        ...

    async def step(self, message: Message) -> Transition:
        """Takes the agent's message to the next state."""
        ...

    async def outcome(self) -> Outcome:
        """The outcome reward, whether the environment ended the episode or a limit did."""
        ...

    async def close(self) -> None:
        """Frees what the episode held."""
        ...


@runtime_checkable
class Leader(Protocol):
    """An environment that leads its conversation itself, since its agent asks for the turns; it has
    no ``reset`` and no ``step``.
    """

    async def lead_conversation(
        self, task: Task, seed: int, conversation: Conversation
    ) -> StopReason:
        """Plays to the end; returns why the episode stopped. Raises ``FaultError``."""
        ...

    def taken_up(self) -> Sequence[str]:
        """How each of the agent's calls was taken up, a line each, for ``agent-r1 check``."""
        ...


MEMORIES: Registry[Env] = Registry(
    "memory", {"recent": "agent_r1.envs.history:Recent", "summary": "agent_r1.envs.history:Summary"}
)


MemorySection = Annotated[SerializeAsAny[NamedSection], BeforeValidator(MEMORIES.section)]


class EnvSettings(NamedSection):
    """What every environment's section has.

    Attributes:
        memory: How the history that the agent sees is shortened, see ``history.py``.
    """

    memory: MemorySection | None = None


async def run_plain(thread: OwnThread | None, function: Callable[..., Any], *args: Any) -> Any:
    """Calls an author's method, asynchronous or plain, and returns its result."""
    call = functools.partial(function, *args)
    if thread is None or inspect.iscoroutinefunction(function):
        value = call()
    else:
        try:
            value = await thread.run(call)
        except ValueError as error:
            if "main thread" not in str(error):
                raise
            value = call()  # signals, as math-verify uses them, need the main thread
    return await value if inspect.isawaitable(value) else value
