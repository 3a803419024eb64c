"""The life of an environment, from its tasks to its end: every call into an author's code
besides an episode's steps, with results checked and brought into the form that others rely on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

from pydantic_core import to_jsonable_python

from agent_r1.config.section import NamedSection
from agent_r1.envs.base import MEMORIES, Env, EnvSettings, Transition, run_plain
from agent_r1.envs.tool_env import ToolEnv
from agent_r1.errors import ConfigError
from agent_r1.types import CallResult, MalformedCall, Message, Outcome, Task, ToolCall
from agent_r1.utils.text import clean, describe, place_of
from agent_r1.utils.waiting import OwnThread, contained, telling


def make_env(env_class: Any, settings: NamedSection) -> Env:
    """An environment made from its section, wrapped in the memory chosen there."""
    env: Env
    if isinstance(env_class, type) and issubclass(env_class, ToolEnv) and env_class.is_plain():
        thread = OwnThread(f"episode-{env_class.__name__}")
        env = contained(lambda: thread.wait(functools.partial(env_class, settings)))
        env.episode_thread = thread
    else:
        env = contained(lambda: env_class(settings))
    if not isinstance(settings, EnvSettings) or settings.memory is None:
        return env
    make: Callable[[Env, NamedSection], Env] = MEMORIES.resolve(settings.memory.name)
    return make(env, settings.memory)


MAX_TASKS = 10**9
"""Most tasks: a random order of all is drawn."""
MAX_REWARD = 1e30
"""Largest reward: sums of larger ones overflow."""
RESERVED = frozenset(
    {
        *("success", "reward", "shaped", "entropy", "action_tokens", "tokens", "turns", "loss"),
        *("resampled", "groups_used", "groups_without_signal", "grad_norm", "kl", "value_loss"),
        *("explained_variance", "clip_fraction", "logprob_error", "updates", "updates_skipped"),
        *("lr", "iterations_without_signal", "tool_calls"),
    }
)
"""Names of figures of a run, which an environment's own metrics cannot have."""
ROLES = ("system", "user", "assistant", "tool")


def tasks_of(env_class: Any, settings: NamedSection, split: str) -> Sequence[Task]:
    """The tasks of a split, checked; a ``ConfigError`` names anything that is no task."""
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
    """An author's own sequence of tasks, each checked when it is asked for.

    Raises:
        ConfigError: An item that is asked for is no task.
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
    """The schemas of an environment's tools, checked."""
    schemas = contained(lambda: env.schemas)
    if not isinstance(schemas, list | tuple) or not all(isinstance(s, dict) for s in schemas):
        raise TypeError(f"schemas must be a list of JSON schemas, not a {type(schemas).__name__}")
    return list(schemas)


def tidy(message: Message) -> Message:
    """A message as it may be stored and shown: its text is clean; the same object if it was.

    Raises:
        TypeError: The message has a wrong type, role or content.
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
    """An environment's outcome in plain Python numbers; an error names a wrong value."""
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
    if not all(isinstance(r, CallResult) and isinstance(r.text, str) for r in transition.results):
        raise TypeError(f"results must be CallResults, not {transition.results!r:.200}")


async def close_env(env: Any) -> None:
    """Closes an environment, whose ``close`` may be plain, and ends its thread."""
    thread = thread_of(env)
    try:
        await run_plain(thread, env.close)
    finally:
        if thread is not None:
            thread.close()


def thread_of(env: Any) -> OwnThread | None:
    """The thread of an environment's plain code, if it has one."""
    thread = getattr(env, "episode_thread", None)
    return thread if isinstance(thread, OwnThread) else None
