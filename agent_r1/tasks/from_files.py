"""An environment without a class: a file of questions, some tools and a reward function, named in
the recipe.

    [env]
    name = "tools"
    tasks = "questions.jsonl"              # id, question, answer; one object a line
    tools = ["my_tools.py:search"]         # functions with @tool
    reward = "my_tools.py:reward"          # reward(task, answer) -> number or Outcome; may be async
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from agent_r1.config.registry import load_object
from agent_r1.config.section import NamedSection
from agent_r1.envs.tool_env import ToolEnv
from agent_r1.errors import ConfigError
from agent_r1.tasks.row_file import BadRows, RowFile, text_of
from agent_r1.tasks.splits import deal
from agent_r1.tools.function_tool import FunctionTool
from agent_r1.types import Message, Outcome, Task
from agent_r1.utils.scope import kept
from agent_r1.utils.waiting import in_thread


class Tools(ToolEnv):
    """See the module's docstring. A reward function that raises excludes the episode; it does not
    score 0.
    """

    class Settings(ToolEnv.Settings):
        """File names are looked up from the current folder.

        Attributes:
            tasks: A JSONL file: id, question, answer, and further data.
            tools: Tools, as ``file.py:function``.
            reward: A function of task and answer, as ``file.py:function``.
            system: The system message.
            holdout: Share of the tasks for validation, and the same again for test.
            bad_rows: Treatment of rows that cannot be used: ``error``, or ``skip``.
        """

        name: str = "tools"
        tasks: str
        tools: tuple[str, ...] = ()
        reward: str
        system: str = ""
        holdout: float = Field(0.1, gt=0, lt=0.5)
        bad_rows: BadRows = "error"

        @model_validator(mode="after")
        def _some(self) -> Self:
            if not self.tools and not self.mcp:
                raise ValueError("no tools: name functions in env.tools, or servers in [env.mcp]")
            return self

    def __init__(self, settings: NamedSection | None = None) -> None:
        super().__init__(settings)
        for reference in self.settings.tools:
            function = load_object(reference, what="env.tools")
            if not isinstance(function, FunctionTool):
                raise ConfigError(f"env.tools: {reference!r} is not a tool; decorate it with @tool")
            self.add_tool(function)
        self._reward = load_object(self.settings.reward, what="env.reward")

    @classmethod
    def tasks(cls, settings: Any, split: str) -> Sequence[Task]:
        return deal(
            load_tasks(settings.tasks, "env.tasks", settings.bad_rows), split, settings.holdout
        )

    def prompt(self) -> Sequence[Message]:
        system = [Message("system", self.settings.system)] if self.settings.system else []
        return [*system, Message("user", self.task.question)]

    async def score(self, answer: str | None) -> Any:
        reward = functools.partial(self._reward, self.task, answer)
        if not inspect.iscoroutinefunction(self._reward):  # it may wait for a server: others go on
            given = await in_thread(reward, "reward")
        else:
            given = reward()
        given = await given if inspect.isawaitable(given) else given
        if isinstance(given, bool | int | float | Outcome) or hasattr(given, "__float__"):
            return given
        raise TypeError(
            f"env.reward = {self.settings.reward!r} returned {given!r:.80}, not a number or Outcome"
        )


def load_tasks(path: str, key: str, bad_rows: BadRows = "error") -> list[Task]:
    """The tasks of a JSONL file; further fields go into ``data``. ``key`` is the
    setting that errors name.
    """
    return [task for _, task in load_rows(path, key, bad_rows)]


@kept
def load_rows(path: str, key: str, bad_rows: BadRows) -> list[tuple[int, Task]]:
    """As ``load_tasks``, with line numbers."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{key} = {path!r}: there is no such file")
    rows = RowFile(file, bad_rows)
    tasks: list[tuple[int, Task]] = []
    lines: dict[str, int] = {}
    for number, row in rows:
        try:
            known = {field: text_of(row, field) for field in ("id", "question")}
            known["answer"] = text_of(row, "answer", empty=True)  # a reward may use other fields
        except ValueError as error:
            rows.bad(number, f"{error}; a row needs id, question and answer")
            continue
        if (first := lines.setdefault(known["id"], number)) != number:
            rows.bad(number, f"the id {known['id']!r} is that of line {first}, too")
            continue
        data = {name: value for name, value in row.items() if name not in (*known, "category")}
        category = str(row.get("category", ""))
        tasks.append((number, Task(**known, category=category, data=data)))
    if not tasks:
        raise ConfigError(
            f"{key} = {path!r}: there is no row in it that can be used: {rows.why_empty()}"
        )
    return tasks
