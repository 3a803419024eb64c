"""Tasks, tools and rewards of a verifiers taskset (its v1), played by our own loop.

    [env]
    name = "verifiers"
    taskset = "gsm8k"        # an installed package, or file.py:MyTaskset
    config = { }             # of the taskset

The prompt, the tools of the task's toolsets and its ``@reward`` and ``@metric`` functions are
theirs. What needs their harness is refused: tasks in a container or with a set-up of their own,
rewards that ask for a runtime, an environment that drives its agents itself. Needs the extra
``agent-r1[verifiers]``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from agent_r1.config.registry import load_object
from agent_r1.envs.base import Transition
from agent_r1.envs.lifecycle import RESERVED
from agent_r1.envs.tool_env import ToolEnv
from agent_r1.errors import ConfigError
from agent_r1.tasks.splits import deal
from agent_r1.tools.base import ToolResult
from agent_r1.tools.function_tool import FunctionTool
from agent_r1.types import MalformedCall, Message, Outcome, Task
from agent_r1.utils.scope import kept


class VerifiersEnv(ToolEnv):
    """The outcome is the task's own weighted reward."""

    class Settings(ToolEnv.Settings):
        """Which taskset.

        Attributes:
            taskset: An installed package, or ``file.py:MyTaskset``.
            config: Keys of the taskset's own configuration.
            success: Reward from which an episode is a success.
            limit: Most tasks to read, for endless tasksets.
            holdout: Share of the tasks for validation, and the same again for test.
        """

        name: str = "verifiers"
        taskset: str
        config: dict[str, Any] = Field(default_factory=dict)
        success: float = 1.0
        limit: int = Field(10_000, ge=1)
        holdout: float = Field(0.1, gt=0, lt=0.5)

    @classmethod
    def tasks(cls, settings: Any, split: str) -> Sequence[Task]:
        tasks = [
            Task(key, task.data.prompt_text, category=task.data.name or "")
            for key, task in _load(settings).items()
        ]
        return deal(tasks, split, settings.holdout)

    def start(self) -> None:
        self._messages = list(self.prompt())

    async def reset(self, task: Task, seed: int) -> Sequence[Message]:
        self._task = _load(self.settings)[task.id]
        for toolset in type(self._task).toolsets(self._task.config):
            for tool in _tools(toolset):
                self.add_tool(tool)
        return await super().reset(task, seed)

    def prompt(self) -> Sequence[Message]:
        from verifiers.v1.types import content_text

        data = self._task.data
        system = [Message("system", data.system_prompt)] if data.system_prompt else []
        if isinstance(data.prompt, str):
            return [*system, Message("user", data.prompt)]
        return [*system, *(Message(m.role, content_text(m.content)) for m in data.prompt or [])]

    def interpret(self, results: Sequence[ToolResult]) -> Transition:
        transition = self.show(results)
        self._messages += transition.messages
        return transition

    async def step(self, message: Message) -> Transition:
        self._messages.append(message)
        return await super().step(message)

    async def score(self, answer: str | None) -> Outcome:
        trace = _trace(self._task, self._messages)
        await self._task.score(trace)
        metrics = {
            f"taskset_{name}" if name in RESERVED else name: float(value)
            for name, value in trace.metrics.items()
            if value is not None
        }
        return Outcome(trace.reward, trace.reward >= self.settings.success, metrics)


def _load(settings: Any) -> dict[str, Any]:
    """The taskset's tasks by their key."""
    return _read(settings.taskset, json.dumps(settings.config, sort_keys=True), settings.limit)


@kept
def _read(reference: str, config_json: str, limit: int) -> dict[str, Any]:
    try:
        from verifiers.v1.configs.taskset import TasksetConfig
        from verifiers.v1.utils.generic import concrete_type
        from verifiers.v1.utils.loaders import taskset_class
    except ModuleNotFoundError as error:
        raise ConfigError(
            "env 'verifiers' needs the package: pip install 'agent-r1[verifiers]'"
        ) from error
    if ":" in reference:
        found = load_object(reference, what="env.taskset")
    else:
        try:
            found = taskset_class(reference)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"env.taskset = {reference!r}: {error}") from error
    config = (concrete_type(found, TasksetConfig) or TasksetConfig)(**json.loads(config_json))
    _refuse_env(reference)
    tasks = list(found(config).take(limit))
    if not tasks:
        raise ConfigError(f"env.taskset = {reference!r} has no tasks")
    _refuse(reference, tasks[0])
    return {task.key: task for task in tasks}


def _refuse_env(reference: str) -> None:
    """Raises for a package whose environment plays its episodes itself."""
    from verifiers.v1.envs.single_agent import SingleAgentEnv
    from verifiers.v1.utils.loaders import environment_class

    if ":" not in reference and environment_class(reference) is not SingleAgentEnv:
        raise ConfigError(f"env.taskset = {reference!r}: its environment drives the agents itself")


def _refuse(reference: str, task: Any) -> None:
    """Raises for a task that needs verifiers' own harness."""
    from verifiers.v1 import Task as Theirs

    where = f"env.taskset = {reference!r}"
    if task.NEEDS_CONTAINER or task.data.image:
        raise ConfigError(f"{where}: its tasks need a container of verifiers' harness")
    for hook in ("setup", "finalize"):
        if getattr(type(task), hook) is not getattr(Theirs, hook):
            raise ConfigError(f"{where}: its tasks' {hook} needs a runtime of verifiers' harness")
    if task.data.prompt is None:
        raise ConfigError(f"{where}: its tasks have no prompt; their user speaks first")
    scorers = [*task.hooks("reward"), *task.hooks("metric")]
    for function in (*scorers, *(judge.score for judge in task.plugged_judges())):
        runtime = inspect.signature(function).parameters.get("runtime")
        if runtime is not None and runtime.default is inspect.Parameter.empty:
            raise ConfigError(f"{where}: {function.__name__} needs a runtime of verifiers' harness")


def _tools(toolset: Any) -> list[FunctionTool]:
    """The toolset's tools, under the names that verifiers gives them."""
    from verifiers.v1.utils.decorators import discover_decorated

    prefix = f"{toolset.server_name}_" if toolset.server_name else ""
    tools = []
    for function in discover_decorated(toolset, "tool"):
        tool = FunctionTool(function)
        tool.name = prefix + (getattr(function, "tool_name", None) or function.__name__)
        tools.append(tool)
    return tools


def _trace(task: Any, messages: Sequence[Message]) -> Any:
    """The conversation as verifiers records one of its own."""
    import verifiers.v1 as vf
    from verifiers.v1 import graph, trace

    calls: list[str] = []
    nodes = []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            made = [_call(call, f"{index}-{n}") for n, call in enumerate(message.tool_calls)]
            calls = [call["id"] for call in made]
            content = {"content": message.content, "tool_calls": made or None}
        elif message.role == "tool":
            content = {"content": message.content, "tool_call_id": calls.pop(0) if calls else ""}
        else:
            content = {"content": message.content}
        nodes.append(
            graph.MessageNode(
                parent=index - 1 if index else None,
                message={"role": message.role, **content},
                sampled=message.role == "assistant",
            )
        )
    last = next((m for m in reversed(messages) if m.role == "assistant"), None)
    ended = [trace.ModelCall(finish_reason="length" if last.cut else "stop")] if last else []
    seeded = trace.TraceTask(type=type(task).__name__, data=task.data, key=task.key)
    agent = trace.AgentInfo(config=vf.AgentConfig())
    return trace.Trace(
        task=seeded, agent=agent, nodes=nodes, calls=ended, is_completed=True, ok=True
    )


def _call(call: Any, number: str) -> dict[str, Any]:
    if isinstance(call, MalformedCall):
        return {"id": number, "name": "", "arguments": call.text}
    return {"id": number, "name": call.name, "arguments": json.dumps(call.arguments)}
