"""``ToolEnv`` is an environment for sets of tools; most users subclass it and write two or three
methods. Authors work with messages; tokens, limits of length and time, and stop reasons belong to
``rollout.episode``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

from pydantic import Field

from agent_r1.config.section import NamedSection
from agent_r1.envs.base import EnvSettings, Transition, run_plain
from agent_r1.errors import ConfigError, NotTextError, ToolFailureError
from agent_r1.tools.base import Tool, ToolResult
from agent_r1.tools.cassette import Cassette, CassetteSettings
from agent_r1.tools.dispatcher import Dispatcher
from agent_r1.tools.failure_policy import FailurePolicy
from agent_r1.tools.function_tool import FunctionTool
from agent_r1.tools.mcp.connection import Connection, connect
from agent_r1.tools.mcp.settings import McpServer
from agent_r1.tools.noise import Noise, NoiseSettings
from agent_r1.types import CallResult, MalformedCall, Message, Outcome, Task, ToolCall
from agent_r1.utils.text import as_text, clean
from agent_r1.utils.waiting import EPISODE_THREAD, OwnThread

T = TypeVar("T")
MaybeAwaited: TypeAlias = T | Awaitable[T]
"""What a method that may be ``async`` gives."""


class ToolEnv:
    """Tools, the state of one task, and the meaning of results. To subclass; every method has a
    sensible default except ``tasks`` and ``score``. ``start``, ``interpret``, ``reply``, ``score``
    and ``close`` may be ``async``.

    If some tool is a plain function, the constructor and all plain methods of an episode run in
    the episode's own thread, so that an object that ``start`` opens there (a SQLite connection) can
    be used by the tools; ``async`` methods run in the event loop. If all tools are ``async``,
    everything runs there: a plain method that waits would then hold up all episodes.

    A whole one::

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

    class Settings(EnvSettings):
        """The keys of ``[env]``; subclass it to add some.

        Attributes:
            noise: Make the tools messy on purpose, see ``noise.py``.
            cassette: Record what tools return, or play it back, see ``cassette.py``.
            failure: Failure policies of tools, by the tool's name, see
                ``tools/failure_policy.py``.
            mcp: MCP servers whose tools the agent gets as well, see ``tools/mcp/``.
        """

        noise: NoiseSettings | None = None
        cassette: CassetteSettings | None = None
        failure: dict[str, FailurePolicy] = Field(default_factory=dict)
        mcp: dict[str, McpServer] = Field(default_factory=dict)

    system: ClassVar[str] = ""
    """System message; empty for none."""
    tools: ClassVar[Sequence[FunctionTool]] = ()
    """Tools that are plain functions; those defined in the class body are found automatically."""
    reward_parts: ClassVar[tuple[str, ...]] = ()
    """Names of the process rewards that ``interpret`` and ``reply`` may give."""
    max_result_chars: ClassVar[int] = 8000
    """A longer tool result is cut, with a note."""

    task: Task
    seed: int
    answer: str | None
    """The agent's final message; ``None`` while there is none, and where a limit cut it off."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, value in vars(cls).items():
            if isinstance(getattr(value, "__func__", None), FunctionTool):
                raise ValueError(
                    f"{cls.__name__}.{name}: @tool goes on a plain method, not on a static or "
                    "class method"
                )
            if isinstance(value, FunctionTool) and (
                hasattr(ToolEnv, name) or name in ("task", "seed", "answer")
            ):
                raise ValueError(
                    f"{cls.__name__}: a tool cannot be named {name!r}, ToolEnv uses that"
                )
            above = next((vars(c)[name] for c in cls.__mro__[1:] if name in vars(c)), None)
            if (
                isinstance(above, FunctionTool)
                and value is not None
                and not isinstance(value, FunctionTool)
            ):
                raise ValueError(
                    f"{cls.__name__}.{name} takes the place of a tool and is none: decorate it "
                    f"with @tool, or write `{name} = None` to take the tool away"
                )

    def __init__(self, settings: NamedSection | None = None) -> None:
        self.settings: Any = settings
        self.episode_thread: OwnThread | None = None
        self._tools: dict[str, Tool] = {}
        own = dict.fromkeys(
            name
            for owner in reversed(type(self).__mro__)
            for name, value in vars(owner).items()
            if isinstance(value, FunctionTool)
        )
        methods = [tool for name in own if (tool := getattr(self, name)) is not None]
        for tool in [*self.tools, *methods]:
            self.add_tool(tool)
        servers = settings.mcp if isinstance(settings, ToolEnv.Settings) else {}
        self._connections: list[Connection] = connect(servers)

    def add_tool(self, tool: Tool) -> None:
        """Offers a tool to the agent.

        Raises:
            ConfigError: ``tool`` is no tool, or its name is already used.
        """
        if not hasattr(tool, "schema"):
            raise ConfigError(f"{type(self).__name__}: {tool!r} is no tool; decorate it with @tool")
        if self._tools.setdefault(tool.name, tool) is not tool:
            raise ConfigError(
                f"{type(self).__name__}: there are two tools named {tool.name!r}; the agent could "
                "not tell them apart: rename one"
            )

    @classmethod
    def is_plain(cls) -> bool:
        """Whether some tool of the class is plain code, so that episodes have a thread."""
        return any(
            map(is_plain_tool, [*cls.tools, *(getattr(cls, name, None) for name in dir(cls))])
        )

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

    @classmethod
    def check_data(cls, settings: Any) -> Iterable[str]:
        """Warnings about the data as a whole, one line each, for ``agent-r1 check`` and before a
        run; for data that no run can use, ``tasks`` raises a ``ConfigError``. Default: none.
        """
        return ()

    def start(self) -> Awaitable[None] | None:
        """Called by ``reset`` once ``self.task`` and ``self.seed`` are set: prepare the episode's
        state.
        """

    def prompt(self) -> Sequence[Message]:
        """The opening messages."""
        system = [Message("system", self.system)] if self.system else []
        return [*system, Message("user", self.task.question)]

    def interpret(self, results: Sequence[ToolResult]) -> MaybeAwaited[Transition]:
        """Turns the results of one action into a ``Transition``. Default: the agent sees the
        results.
        """
        return self.show(results)

    def reply(self, message: Message) -> MaybeAwaited[Transition]:
        """The answer to an action without tool calls, as a ``Transition``. Default: it is the
        final answer.
        """
        return Transition(done=True)

    def score(self, answer: str | None) -> MaybeAwaited[float | Outcome]:
        """The outcome reward of the final answer (``None``: a limit came first), a number or an
        ``Outcome``.

        A plain number counts as success from 1 on. An exception is a fault of the infrastructure:
        the episode is excluded, it does not score 0.
        """
        raise NotImplementedError(f"{type(self).__name__} has no score(answer)")

    def gold(self) -> Iterable[str | ToolCall | Message]:
        """Actions that solve ``self.task`` (words, a ``ToolCall``, or a whole message), for
        ``check_env`` and as demonstrations for ``agent-r1 sft``. Each is played before the next is
        asked for, so a generator may react to the last result. Default: the gold answer alone.
        """
        return [self.task.answer] if self.task.answer else []

    # What they build on
    # -------------------------------------------------------------------------------

    def show(self, results: Sequence[ToolResult], **rewards: float) -> Transition:
        """A transition that shows each result, or its failure in words, to the agent."""
        return Transition(tuple(Message("tool", self.as_text(r)) for r in results), rewards)

    def as_text(self, result: ToolResult) -> str:
        """The text that the agent sees of a result; override it to format values of your own
        types.
        """
        text = f"Error: {result.detail}"
        if result.error is None:
            try:
                text = as_text(result.value)
            except NotTextError as error:
                text = f"[not text: {error}]"
                self._unshown.append(f"fault/not_text:{_name_of(result)}")
        return self._cut(text)

    def _cut(self, text: str) -> str:
        if len(text) <= (limit := self.max_result_chars):
            return text
        cut = f"[cut: the result has {len(text):,} characters, {limit:,} are shown]"
        return f"{text[:limit]}\n{cut}"

    def _raw(self, results: Sequence[ToolResult]) -> tuple[CallResult, ...]:
        """The results as they came."""
        raw = []
        for result in results:
            text = result.detail
            if result.error is None:
                try:
                    text = as_text(result.value)
                except NotTextError as error:
                    text = f"[not text: {error}]"
            raw.append(CallResult(_name_of(result), clean(self._cut(text)), result.error))
        return tuple(raw)

    # The protocol
    # -------------------------------------------------------------------------------------

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self._tools.values()]

    async def reset(self, task: Task, seed: int) -> Sequence[Message]:
        self.task, self.seed, self.answer = task, seed, None
        self._unshown: list[str] = []
        for connection in self._connections:
            for tool in await connection.tools():
                if self._tools.setdefault(tool.name, tool) is not tool:
                    raise ConfigError(
                        f"env.mcp.{connection.name}: there is a tool {tool.name!r} already; "
                        f"env.mcp.{connection.name}.tools chooses which the agent gets"
                    )
        self._dispatcher = self._make_dispatcher()
        if self.episode_thread is None and any(map(is_plain_tool, self._tools.values())):
            self.episode_thread = OwnThread(f"episode-{type(self).__name__}")
        await run_plain(self.episode_thread, self.start)
        messages: Sequence[Message] = await run_plain(self.episode_thread, self.prompt)
        return messages

    def _make_dispatcher(self) -> Dispatcher:
        if not isinstance(self.settings, ToolEnv.Settings):  # a section that has no such keys
            return Dispatcher(self._tools)
        noise, cassette = self.settings.noise, self.settings.cassette
        return Dispatcher(
            self._tools,
            self.settings.failure,
            Noise(noise, self.seed) if noise else None,
            Cassette(cassette, self.task.id, self.seed) if cassette else None,
        )

    async def run_tools(self, calls: Sequence[ToolCall | MalformedCall]) -> list[ToolResult]:
        """Runs calls under the recipe's noise, cassette and policies."""
        EPISODE_THREAD.set(self.episode_thread)
        results = await self._dispatcher.run(calls)
        if self.episode_thread is None or not self.episode_thread.num_lost:
            return results
        for result in results:
            name = _name_of(result)
            if result.error == "exception" and is_plain_tool(self._tools.get(name)):
                raise ToolFailureError(
                    f"{name}: {result.detail} (a call hung; it was given up with its thread and "
                    "the state that was bound to it)",
                    resample=False,
                    events=tuple(event for r in results for event in r.events),
                )
        return results

    async def step(self, message: Message) -> Transition:
        events: tuple[str, ...] = ()
        raw: tuple[CallResult, ...] = ()
        if message.tool_calls:
            results = await self.run_tools(message.tool_calls)
            events = tuple(event for result in results for event in result.events)
            raw = await run_plain(self.episode_thread, self._raw, results)
            transition = await run_plain(self.episode_thread, self.interpret, results)
        else:
            self.answer = None if message.cut else message.content
            transition = await run_plain(self.episode_thread, self.reply, message)
        if not isinstance(transition, Transition):
            method = "interpret" if message.tool_calls else "reply"
            raise TypeError(
                f"{type(self).__name__}.{method} must return a Transition, as self.show(...) makes "
                f"one, got {transition!r:.200}; is its `return` missing?"
            )
        if not transition.done:
            self.answer = None
        events, self._unshown = (*events, *self._unshown), []
        events = (*events, *transition.events)
        return dataclasses.replace(transition, events=events, results=raw or transition.results)

    async def outcome(self) -> Outcome:
        score = await run_plain(self.episode_thread, self.score, self.answer)
        if isinstance(score, Outcome):
            return score
        try:
            if isinstance(score, str):
                raise TypeError(score)
            return Outcome(float(score), success=float(score) >= 1.0)
        except (TypeError, ValueError) as error:
            what = f"{type(self).__name__}.score must return a number or an Outcome"
            raise TypeError(f"{what}, got {score!r:.200}") from error

    async def close(self) -> None:
        for connection in self._connections:
            if connection.of_episode:
                await connection.close()


def _name_of(result: ToolResult) -> str:
    return result.call.name if isinstance(result.call, ToolCall) else ""


def is_plain_tool(tool: Any) -> bool:
    return isinstance(tool, FunctionTool) and tool.needs_thread
