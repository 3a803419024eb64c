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
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from agent_r1.config import ConfigError, NamedSection, load_object
from agent_r1.env import ToolEnv
from agent_r1.tasks.splits import deal
from agent_r1.tools import Tool
from agent_r1.types import Message, Outcome, Task
from agent_r1.waiting import in_thread


class Tools(ToolEnv):
    """See the module's docstring. A reward function that raises excludes the episode; it does not
    score 0.
    """

    class Settings(ToolEnv.Settings):
        """File names are looked up from the current folder. ``holdout``: share for validation, and
        for test.
        """

        name: str = "tools"
        tasks: str
        tools: tuple[str, ...] = ()
        reward: str
        system: str = ""
        holdout: float = Field(0.1, gt=0, lt=0.5)

        @model_validator(mode="after")
        def _some(self) -> Self:
            if not self.tools and not self.mcp:
                raise ValueError("no tools: name functions in env.tools, or servers in [env.mcp]")
            return self

    def __init__(self, settings: NamedSection | None = None) -> None:
        super().__init__(settings)
        for reference in self.settings.tools:
            function = load_object(reference, what="env.tools")
            if not isinstance(function, Tool):
                raise ConfigError(f"env.tools: {reference!r} is not a tool; decorate it with @tool")
            self.add_tool(function)
        self._reward = load_object(self.settings.reward, what="env.reward")

    @classmethod
    def tasks(cls, settings: Any, split: str) -> Sequence[Task]:
        return deal(load_tasks(settings.tasks, "env.tasks"), split, settings.holdout)

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


@functools.lru_cache(maxsize=8)
def load_tasks(path: str, key: str) -> list[Task]:
    """The tasks of a JSONL file; what an object has besides goes into ``data``. ``key`` is the
    setting that errors name.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise ConfigError(f"{key} = {path!r}: there is no such file")
    tasks = []
    for number, line in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row: dict[str, Any] = json.loads(line)
            known = {key: str(row.pop(key)) for key in ("id", "question", "answer")}
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{file}, line {number}: needs an object with id, question and answer ({error!r})"
            ) from error
        tasks.append(Task(**known, category=str(row.pop("category", "")), data=row))
    return tasks
