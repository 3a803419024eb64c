"""A cassette: what tools returned, kept in a file and played back offline.

    [env.cassette]
    path = "search.jsonl"
    mode = "record"          # then "replay"

One line a call, in the order they were made. The same call, in the same task, gives the same
result; where a call is repeated within an episode, its first result, its second, and so on.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from agent_r1.config import ConfigError, Section
from agent_r1.tools import AnyTool, ToolResult
from agent_r1.types import ToolCall


class CassetteSettings(Section):
    """Where calls are kept and when they are made.

    Attributes:
        path: A JSONL file, looked up from the current folder.
        mode: ``record`` makes every call and keeps those that are new; ``replay`` makes none.
        unseen: What ``replay`` does with a call it has not got: an ``error`` excludes the episode,
            ``call`` makes it and keeps it.
        same: Where calls count as the same: within the same ``task`` (tools that see the task's
            state), or ``anywhere`` (a search engine, a calculator).
    """

    path: str
    mode: Literal["record", "replay"] = "replay"
    unseen: Literal["error", "call"] = "error"
    same: Literal["task", "anywhere"] = "task"


class UnseenCallError(RuntimeError):
    """A call that the cassette has not got; the episode is excluded."""


class Cassette:
    """One episode's view of a tape, which all episodes share."""

    def __init__(self, settings: CassetteSettings, task_id: str) -> None:
        self._settings = settings
        self._task_id = task_id if settings.same == "task" else ""
        self._tape = _tape(str(Path(settings.path).expanduser().resolve()))
        if settings.mode == "replay" and settings.unseen == "error" and not self._tape.calls:
            raise ConfigError(
                f"env.cassette.path = {settings.path!r}: nothing is recorded there; "
                "set env.cassette.mode = 'record' first"
            )
        self._seen: Counter[str] = Counter()

    async def run(self, tool: AnyTool, call: ToolCall, timeout: float) -> ToolResult:
        """The recorded result of the call, or the tool's own, which is then kept."""
        arguments = json.dumps(call.arguments, sort_keys=True, ensure_ascii=False)
        key = json.dumps([self._task_id, call.name, arguments], ensure_ascii=False)
        number = self._seen[key]
        self._seen[key] += 1
        kept = self._tape.calls.get(key, [])
        if self._settings.mode == "replay" and kept:
            return _restore(kept[min(number, len(kept) - 1)], tool, call)
        if self._settings.mode == "replay" and self._settings.unseen == "error":
            raise UnseenCallError(
                f"cassette {self._settings.path}: never recorded: {call.name}({arguments})"
                f"{f' of task {self._task_id!r}' if self._task_id else ''}; record it "
                "(env.cassette.mode = 'record') or let it through (env.cassette.unseen = 'call')"
            )
        result = await tool.run(call, timeout)
        if number == len(self._tape.calls.get(key, [])):  # another attempt may have been first
            self._tape.add(key, _row(self._task_id, tool, result))
        return result


class _Tape:
    """All recorded calls of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.calls: dict[str, list[dict[str, Any]]] = {}
        content = path.read_bytes() if path.exists() else b""
        self._is_torn = bool(content) and not content.endswith(b"\n")
        for number, line in enumerate(content.split(b"\n"), 1):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            try:
                arguments = json.dumps(row["arguments"], sort_keys=True, ensure_ascii=False)
                key = json.dumps([row["task"], row["tool"], arguments], ensure_ascii=False)
            except (KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}, line {number}: not a recorded call: {error!r}"
                ) from error
            self.calls.setdefault(key, []).append(row)

    def add(self, key: str, row: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = ("\n" if self._is_torn else "") + json.dumps(row, ensure_ascii=False) + "\n"
        self._is_torn = False
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
        self.calls.setdefault(key, []).append(row)


_tape = functools.cache(lambda path: _Tape(Path(path)))


def _row(task_id: str, tool: AnyTool, result: ToolResult) -> dict[str, Any]:
    assert isinstance(result.call, ToolCall)
    row = {"task": task_id, "tool": result.call.name, "arguments": result.call.arguments}
    if result.error is not None:
        return {**row, "error": result.error, "detail": result.detail}
    try:
        return {**row, "value": _adapter(tool).dump_python(result.value, mode="json")}
    except (ValueError, PydanticSchemaGenerationError) as error:
        raise ConfigError(
            f"env.cassette: what tool {tool.name!r} returned cannot be kept as JSON "
            f"({type(result.value).__name__}): annotate what it returns ({error})"
        ) from error


def _restore(row: dict[str, Any], tool: AnyTool, call: ToolCall) -> ToolResult:
    if "error" in row:
        return ToolResult(call, error=row["error"], detail=row["detail"])
    try:
        return ToolResult(call, value=_adapter(tool).validate_python(row["value"]))
    except ValidationError as error:
        raise ConfigError(
            f"env.cassette: a recorded result of {tool.name!r} is not what the tool returns now; "
            f"record it again ({error})"
        ) from error


def _adapter(tool: AnyTool) -> TypeAdapter[Any]:
    return TypeAdapter(tool.returns)
