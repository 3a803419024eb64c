"""Environments: what an agent's actions lead to, and what that is worth.

``Env`` is the small protocol that the rollout needs. ``ToolEnv`` implements it for sets of tools;
most users subclass it and write two or three methods. Authors work with messages; tokens, limits
of length and time, and stop reasons belong to ``rollout.episode``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from agent_r1.config import NamedSection
from agent_r1.tools import Tool, ToolResult, run_calls
from agent_r1.types import Message, Outcome, Task, ToolCall


@dataclass(slots=True, frozen=True)
class Transition:
    """What an environment answers to one action.

    Attributes:
        messages: What the agent gets to see.
        rewards: Process rewards by part.
        done: Whether the task has ended.
        state_key: A name for the state now reached, equal where two states count as the same.
        faults: Tool faults, as ``"timeout:search"``; counted, never scored by themselves.
        history: All messages, the opening ones included, that the agent has before it from now on
            instead of what it had and ``messages``: a summary, a truncation, another agent's task.
            It ends with a message to the agent. A message of the agent that ``step`` was given
            stays token for token as it was sampled; whatever is used again is not trained on again.
    """

    messages: tuple[Message, ...] = ()
    rewards: dict[str, float] = field(default_factory=dict)
    done: bool = False
    state_key: str | None = None
    faults: tuple[str, ...] = ()
    history: Sequence[Message] | None = None


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


class ToolEnv:
    """Tools, the state of one task, and what results mean. Subclass it; every method has a
    sensible default except ``tasks`` and ``score``. ``interpret``, ``reply`` and ``score`` may be
    ``async``; one that waits for something should be, because a plain method holds up all episodes.

        class Arithmetic(ToolEnv):
            system = "Use the tool, then give the number alone."

            @tool
            def add(self, a: int, b: int) -> int:
                '''Add two numbers.'''
                return a + b

            @classmethod
            def tasks(cls, settings, split):
                start = {"train": 0, "validation": 500, "test": 600}[split]
                return [Task(f"{n}", f"{n} + {n} = ?", f"{2 * n}") for n in range(start, start + 9)]

            def score(self, answer):
                return float(answer == self.task.answer)
    """

    class Settings(NamedSection):
        """The keys of ``[env]``; subclass it to add some."""

    system: ClassVar[str] = ""
    """System message; empty for none."""
    tools: ClassVar[Sequence[Tool]] = ()
    """Tools that are plain functions; those defined in the class body are found by themselves."""
    reward_parts: ClassVar[tuple[str, ...]] = ()
    """Names of the process rewards that ``interpret`` and ``reply`` may give."""
    max_result_chars: ClassVar[int] = 8000
    """A longer tool result is cut, and says so."""

    task: Task
    seed: int
    answer: str | None
    """The agent's final message, or ``None`` while there is none."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, value in vars(cls).items():
            if isinstance(value, Tool) and (
                hasattr(ToolEnv, name) or name in ("task", "seed", "answer")
            ):
                raise ValueError(
                    f"{cls.__name__}: a tool cannot be named {name!r}, ToolEnv uses that"
                )

    def __init__(self, settings: NamedSection | None = None) -> None:
        self.settings: Any = settings
        own = [
            getattr(self, name)
            for owner in reversed(type(self).__mro__)
            for name, value in vars(owner).items()
            if isinstance(value, Tool)
        ]
        self._tools = {tool.name: tool for tool in [*self.tools, *own]}

    # What a subclass writes
    # ---------------------------------------------------------------------------

    @classmethod
    def tasks(cls, settings: Any, split: str) -> Sequence[Task]:
        """The tasks of a split: ``"train"``, ``"validation"`` or ``"test"``. May be a lazy
        sequence.
        """
        raise NotImplementedError(
            f"{cls.__name__} has no tasks: write the classmethod tasks(settings, split)"
        )

    def start(self) -> None:
        """Called by ``reset`` once ``self.task`` and ``self.seed`` are set: prepare the episode's
        state.
        """

    def prompt(self) -> Sequence[Message]:
        """The opening messages."""
        system = [Message("system", self.system)] if self.system else []
        return [*system, Message("user", self.task.question)]

    def interpret(self, results: Sequence[ToolResult]) -> Any:
        """What the results of one action mean, as a ``Transition``. Default: the agent sees
        them.
        """
        return self.show(results)

    def reply(self, message: Message) -> Any:
        """The answer to an action without tool calls, as a ``Transition``. Default: it is the
        final answer.
        """
        return Transition(done=True)

    def score(self, answer: str | None) -> Any:
        """The outcome reward of the final answer (``None``: a limit came first), a number or an
        ``Outcome``.

        A plain number counts as success from 1 on. An exception is a fault of the infrastructure:
        the episode is excluded, it does not score 0.
        """
        raise NotImplementedError(f"{type(self).__name__} has no score(answer)")

    def gold(self) -> list[str]:
        """Texts of actions that solve ``self.task``, for ``check_env``. Default: the gold answer
        alone.
        """
        return [self.task.answer] if self.task.answer else []

    # What they build on
    # -------------------------------------------------------------------------------

    def show(self, results: Sequence[ToolResult], **rewards: float) -> Transition:
        """A transition that shows each result, or its failure in words, to the agent."""
        messages = tuple(Message("tool", self.as_text(result)) for result in results)
        faults = tuple(
            f"{r.error}:{r.call.name}"
            # a name that the agent made up would be a metric of its own
            if isinstance(r.call, ToolCall) and r.error != "unknown_tool"
            else r.error
            for r in results
            if r.error is not None
        )
        return Transition(messages, rewards, faults=faults)

    def as_text(self, result: ToolResult) -> str:
        """The text that the agent sees of a result; override it to format values of your own
        types.
        """
        text = f"Error: {result.detail}" if result.error is not None else _to_text(result.value)
        if len(text) > (limit := self.max_result_chars):
            cut = f"[cut: the result has {len(text):,} characters, {limit:,} are shown]"
            return f"{text[:limit]}\n{cut}"
        return text

    # The protocol
    # -------------------------------------------------------------------------------------

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self._tools.values()]

    async def reset(self, task: Task, seed: int) -> Sequence[Message]:
        self.task, self.seed, self.answer = task, seed, None
        self.start()
        return self.prompt()

    async def step(self, message: Message) -> Transition:
        if message.tool_calls:
            results = await run_calls(message.tool_calls, self._tools)
            transition = await _maybe_await(self.interpret(results))
        else:
            self.answer = message.content
            transition = await _maybe_await(self.reply(message))
        if not isinstance(transition, Transition):
            raise TypeError(
                f"{type(self).__name__} must return a Transition, got {transition!r:.200}"
            )
        if not transition.done:
            self.answer = None
        return transition

    async def outcome(self) -> Outcome:
        score = await _maybe_await(self.score(self.answer))
        if isinstance(score, Outcome):
            return score
        return Outcome(float(score), success=float(score) >= 1.0)

    async def close(self) -> None:
        return None


async def _maybe_await(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _to_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[not text: {len(value):,} bytes]"
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return f"[not text: a value of type {type(value).__name__}]"
