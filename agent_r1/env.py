"""Environments: what an agent's actions lead to, and what that is worth.

``Env`` is the small protocol that the rollout needs. ``ToolEnv`` implements it for sets of tools;
most users subclass it and write two or three methods. Authors work with messages; tokens, limits
of length and time, and stop reasons belong to ``rollout.episode``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol, overload

from pydantic import BeforeValidator, Field, SerializeAsAny
from pydantic_core import to_jsonable_python

from agent_r1.cassette import Cassette, CassetteSettings
from agent_r1.config import ConfigError, NamedSection, Registry
from agent_r1.dispatch import Dispatcher
from agent_r1.failure import FailurePolicy, ToolFailureError
from agent_r1.mcp_tools import Connection, McpServer, connect
from agent_r1.noise import Noise, NoiseSettings
from agent_r1.text import NotTextError, as_text, clean, describe, place_of
from agent_r1.tools import AnyTool, Tool, ToolResult
from agent_r1.types import MalformedCall, Message, Outcome, Task, ToolCall
from agent_r1.waiting import EPISODE_THREAD, OwnThread, contained, telling


@dataclass(slots=True, frozen=True)
class Transition:
    """What an environment answers to one action.

    Attributes:
        messages: What the agent gets to see.
        rewards: Process rewards by part.
        done: Whether the task has ended; ``truncated``: by a limit of the environment's own, and
            not of itself.
        state_key: A name for the state now reached, equal where two states count as the same.
        events: What went wrong with tools, as ``"fault/timeout:search"``, ``"mistake/..."`` (the
            agent's own), ``"noise/..."`` (injected); counted, never scored by themselves.
        history: All messages, the opening ones included, that the agent has before it from now on
            instead of what it had and ``messages``: a summary, a truncation, another agent's task.
            It ends with a message to the agent. A message of the agent that ``step`` was given
            stays token for token as it was sampled; whatever is used again is not trained on again.
    """

    messages: tuple[Message, ...] = ()
    rewards: dict[str, float] = field(default_factory=dict)
    done: bool = False
    truncated: bool = False
    state_key: str | None = None
    events: tuple[str, ...] = ()
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


MEMORIES = Registry(
    "memory", {"recent": "agent_r1.recall:Recent", "summary": "agent_r1.recall:Summary"}
)
MemorySection = Annotated[SerializeAsAny[NamedSection], BeforeValidator(MEMORIES.section)]


class EnvSettings(NamedSection):
    """What every environment's section has.

    Attributes:
        memory: What stays before the agent when not all of the history does, see ``recall.py``.
    """

    memory: MemorySection | None = None


def make_env(env_class: Any, settings: NamedSection) -> Env:
    """An environment under its section, the memory that it asks for around it."""
    env: Env
    if isinstance(env_class, type) and issubclass(env_class, ToolEnv) and env_class.is_plain():
        thread = OwnThread(f"episode-{env_class.__name__}")
        env = contained(lambda: thread.wait(functools.partial(env_class, settings)))
        env.episode_thread = thread
    else:
        env = contained(lambda: env_class(settings))
    if not isinstance(settings, EnvSettings) or settings.memory is None:
        return env
    wrapped: Env = MEMORIES.resolve(settings.memory.name)(env, settings.memory)
    return wrapped


MAX_TASKS = 10**9
"""An order is drawn of all of them."""
MAX_REWARD = 1e30
"""Sums of more have no end in floating point."""
RESERVED = frozenset(
    {
        *("success", "reward", "shaped", "entropy", "action_tokens", "tokens", "turns", "loss"),
        *("resampled", "groups_used", "groups_without_signal", "grad_norm", "kl", "value_loss"),
        *("explained_variance", "clip_fraction", "logprob_error", "updates", "updates_skipped"),
        *("lr", "iterations_without_signal"),
    }
)
"""Names of figures of a run, which an environment's own metrics cannot have."""
ROLES = ("system", "user", "assistant", "tool")


def tasks_of(env_class: Any, settings: NamedSection, split: str) -> Sequence[Task]:
    """The tasks of a split, none but such; a ``ConfigError`` says what else is there."""
    where = f"{env_class.__name__}.tasks(settings, {split!r})"
    try:
        with telling(f"{where} has not returned yet"):
            tasks = contained(lambda: env_class.tasks(settings, split))
        if len(tasks) > MAX_TASKS:
            raise ConfigError(f"{where} gives {len(tasks):,} tasks; {MAX_TASKS:,} is the most")
        if not isinstance(tasks, list | tuple):
            _ = CheckedTasks(tasks, where)[: min(len(tasks), 1)]
            return CheckedTasks(tasks, where)
        wrong = next(filter(None, map(why_no_task, tasks)), None)
    except ConfigError:
        raise
    except NotImplementedError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # its author's code
        raise ConfigError(f"{where}: {describe(error)}{place_of(error)}") from error
    if wrong is not None:
        raise ConfigError(f"{where} must give a sequence of Task: {wrong}")
    return tasks


def why_no_task(task: Any) -> str | None:
    """What is wrong with a task, which is stored with its episodes; ``None`` if nothing is."""
    if not isinstance(task, Task):
        return f"it has a {type(task).__name__}"
    for name in ("id", "question", "answer", "category"):
        if not isinstance(value := getattr(task, name), str):
            return f"Task.{name} must be text, not {value!r:.100} (task {task.id!r:.100})"
    if not isinstance(task.data, dict):
        return f"Task.data must be a dictionary, not {task.data!r:.100} (task {task.id!r:.100})"
    try:
        to_jsonable_python(task.data)
    except (ValueError, RecursionError) as error:
        return f"Task.data holds what cannot be stored (task {task.id!r:.100}): {error!s:.200}"
    return None


class CheckedTasks(Sequence[Task]):
    """An author's own sequence of tasks, looked at as they are asked for.

    Raises:
        ConfigError: When one is asked for that is none.
    """

    def __init__(self, tasks: Sequence[Any], where: str) -> None:
        self._tasks, self._where = tasks, where

    def __len__(self) -> int:
        return len(self._tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        try:
            task: Task = contained(lambda: self._tasks[index])
            wrong = why_no_task(task)
        except Exception as error:  # its author's code
            wrong = f"{describe(error)}{place_of(error)}"
        if wrong is not None:
            raise ConfigError(f"{self._where}[{index}]: {wrong}")
        return task


def schemas_of(env: Any) -> list[dict[str, Any]]:
    """The schemas of an environment's tools, none but such."""
    schemas = contained(lambda: env.schemas)
    if not isinstance(schemas, list | tuple) or not all(isinstance(s, dict) for s in schemas):
        raise TypeError(f"schemas must be a list of JSON schemas, not a {type(schemas).__name__}")
    return list(schemas)


def tidy(message: Message) -> Message:
    """A message as it may be stored and shown: its text is clean; the same object if it was.

    Raises:
        TypeError: It is no message that a conversation can have.
    """
    if not isinstance(message, Message) or message.role not in ROLES:
        raise TypeError(f"not a message of a role {', '.join(ROLES)}: {message!r:.200}")
    if not isinstance(message.content, str):
        raise TypeError(f"the content of a message must be text, not {message.content!r:.200}")
    for call in message.tool_calls:
        if not isinstance(call, ToolCall | MalformedCall):
            raise TypeError(f"tool_calls of a message must be calls, not {call!r:.200}")
    content = clean(message.content)
    return message if content == message.content else dataclasses.replace(message, content=content)


def plain_outcome(outcome: Outcome) -> Outcome:
    """An environment's outcome in plain Python numbers; an error says what in it is none."""
    if isinstance(outcome.reward, str) or isinstance(outcome.success, str):
        raise TypeError(f"reward must be a number and success a truth value, not {outcome!r}")
    metrics = {str(name): float(value) for name, value in outcome.metrics.items()}
    plain = Outcome(float(outcome.reward), bool(outcome.success), metrics)
    if not all(abs(value) <= MAX_REWARD for value in [plain.reward, *metrics.values()]):
        raise ValueError(f"not finite, or beyond {MAX_REWARD:g}: {plain}")
    if taken := sorted(RESERVED & metrics.keys()):
        raise ValueError(f"a metric cannot be called {taken[0]!r}: a figure of every run is")
    return plain


def plain_rewards(transition: Transition) -> dict[str, float]:
    """The process rewards of a transition in plain Python numbers."""
    rewards = {str(part): float(value) for part, value in transition.rewards.items()}
    for part, value in rewards.items():
        if not abs(value) <= MAX_REWARD:
            raise ValueError(f"the process reward {part!r} is {value}")
    return rewards


def must_be_plain(transition: Transition) -> None:
    """Raises ``TypeError`` for a transition that could not be stored."""
    if not isinstance(transition.state_key, str | None):
        raise TypeError(f"state_key must be text, not {transition.state_key!r:.200}")
    if not all(isinstance(event, str) for event in transition.events):
        raise TypeError(f"events must be texts, not {transition.events!r:.200}")


def gold_of(env: Any) -> Iterable[str]:
    """The texts of an environment's gold actions; none if it knows of none."""
    return env.gold() if hasattr(env, "gold") else ()


async def played_gold(env: Any) -> AsyncIterator[str]:
    """The same one by one, each to be played before the next is asked for; the author's code runs
    where the rest of it does.
    """
    thread = _thread_of(env)
    texts = await _plain(thread, lambda: iter(gold_of(env)))
    while (text := await _plain(thread, next, texts, None)) is not None:
        yield text


async def close_env(env: Any) -> None:
    """Closes an environment, whose ``close`` may be plain, and ends its thread."""
    thread = _thread_of(env)
    try:
        await _plain(thread, env.close)
    finally:
        if thread is not None:
            thread.close()


def _thread_of(env: Any) -> OwnThread | None:
    """The thread of an environment's plain code, if it has one."""
    thread = getattr(env, "episode_thread", None)
    return thread if isinstance(thread, OwnThread) else None


async def _plain(thread: OwnThread | None, function: Callable[..., Any], *args: Any) -> Any:
    """What a method of the author's gives, which may be asynchronous or plain."""
    call = functools.partial(function, *args)
    if thread is None or inspect.iscoroutinefunction(function):
        value = call()
    else:
        try:
            value = await thread.run(call)
        except ValueError as error:
            if "main thread" not in str(error):
                raise
            value = call()  # signals, as math-verify uses them, are for the main thread alone
    return await value if inspect.isawaitable(value) else value


class ToolEnv:
    """Tools, the state of one task, and what results mean. Subclass it; every method has a
    sensible default except ``tasks`` and ``score``. ``start``, ``interpret``, ``reply``, ``score``
    and ``close`` may be ``async``.

    Where some tool is a plain function, all plain methods of an episode and the constructor run in
    one thread of its own, so that what ``start`` opens there (a SQLite connection) can be used by
    the tools; what is ``async`` runs in the event loop. Where all tools are ``async``,
    everything does: then a method that waits should be ``async``, too, or it holds up all episodes.

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
            failure: What a failure of each tool leads to, by its name, see ``failure.py``.
            mcp: MCP servers whose tools the agent gets besides, see ``mcp_tools.py``.
        """

        noise: NoiseSettings | None = None
        cassette: CassetteSettings | None = None
        failure: dict[str, FailurePolicy] = Field(default_factory=dict)
        mcp: dict[str, McpServer] = Field(default_factory=dict)

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
    """The agent's final message; ``None`` while there is none, and where a limit cut it off."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, value in vars(cls).items():
            if isinstance(getattr(value, "__func__", None), Tool):
                raise ValueError(
                    f"{cls.__name__}.{name}: @tool goes on a plain method, not on a static or "
                    "class method"
                )
            if isinstance(value, Tool) and (
                hasattr(ToolEnv, name) or name in ("task", "seed", "answer")
            ):
                raise ValueError(
                    f"{cls.__name__}: a tool cannot be named {name!r}, ToolEnv uses that"
                )
            above = next((vars(c)[name] for c in cls.__mro__[1:] if name in vars(c)), None)
            if isinstance(above, Tool) and value is not None and not isinstance(value, Tool):
                raise ValueError(
                    f"{cls.__name__}.{name} takes the place of a tool and is none: decorate it "
                    f"with @tool, or write `{name} = None` to take the tool away"
                )

    def __init__(self, settings: NamedSection | None = None) -> None:
        self.settings: Any = settings
        self.episode_thread: OwnThread | None = None
        self._tools: dict[str, AnyTool] = {}
        own = dict.fromkeys(
            name
            for owner in reversed(type(self).__mro__)
            for name, value in vars(owner).items()
            if isinstance(value, Tool)
        )
        methods = [tool for name in own if (tool := getattr(self, name)) is not None]
        for tool in [*self.tools, *methods]:
            self.add_tool(tool)
        servers = settings.mcp if isinstance(settings, ToolEnv.Settings) else {}
        self._connections: list[Connection] = connect(servers)

    def add_tool(self, tool: AnyTool) -> None:
        """Offers a tool to the agent.

        Raises:
            ConfigError: It is none, or there is one of that name already.
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
        return any(map(_is_plain, [*cls.tools, *(getattr(cls, name, None) for name in dir(cls))]))

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
        """What is odd about the data as a whole, a line each, for ``agent-r1 check`` and before a
        run; what no run can do with, ``tasks`` raises as a ``ConfigError``. Default: nothing.
        """
        return ()

    def start(self) -> Any:
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

    def gold(self) -> Iterable[str]:
        """Texts of actions that solve ``self.task``, for ``check_env`` and as demonstrations for
        ``agent-r1 sft``. Each is played before the next is asked for, so a generator may go by what
        the last one led to. Default: the gold answer alone.
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
                name = result.call.name if isinstance(result.call, ToolCall) else ""
                self._unshown.append(f"fault/not_text:{name}")
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
        self._unshown: list[str] = []
        for connection in self._connections:
            for tool in await connection.tools():
                if self._tools.setdefault(tool.name, tool) is not tool:
                    raise ConfigError(
                        f"env.mcp.{connection.name}: there is a tool {tool.name!r} already; "
                        f"env.mcp.{connection.name}.tools chooses which the agent gets"
                    )
        self._dispatcher = self._make_dispatcher()
        if self.episode_thread is None and any(map(_is_plain, self._tools.values())):
            self.episode_thread = OwnThread(f"episode-{type(self).__name__}")
        await _plain(self.episode_thread, self.start)
        messages: Sequence[Message] = await _plain(self.episode_thread, self.prompt)
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
            name = result.call.name if isinstance(result.call, ToolCall) else ""
            if result.error == "exception" and _is_plain(self._tools.get(name)):
                raise ToolFailureError(
                    f"{name}: {result.detail} (a call hung; it was given up with its thread and "
                    "the state that was bound to it)",
                    resample=False,
                    events=tuple(event for r in results for event in r.events),
                )
        return results

    async def step(self, message: Message) -> Transition:
        events: tuple[str, ...] = ()
        if message.tool_calls:
            results = await self.run_tools(message.tool_calls)
            events = tuple(event for result in results for event in result.events)
            transition = await _plain(self.episode_thread, self.interpret, results)
        else:
            self.answer = None if message.cut else message.content
            transition = await _plain(self.episode_thread, self.reply, message)
        if not isinstance(transition, Transition):
            raise TypeError(
                f"{type(self).__name__} must return a Transition, got {transition!r:.200}"
            )
        if not transition.done:
            self.answer = None
        events, self._unshown = (*events, *self._unshown), []
        return dataclasses.replace(transition, events=(*events, *transition.events))

    async def outcome(self) -> Outcome:
        score = await _plain(self.episode_thread, self.score, self.answer)
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
            if connection.server.per == "episode":
                await connection.close()


def _is_plain(tool: Any) -> bool:
    return isinstance(tool, Tool) and tool.needs_thread
