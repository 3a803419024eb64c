"""A cassette: what tools returned, kept in a file and played back offline.

    [env.cassette]
    path = "search.jsonl"
    mode = "record"          # then "replay"

One line per call. The same call in the same place gives the same result; a call repeated within an
episode gives its first result, then its second, and so on. Failures of the infrastructure are not
recorded, because they would be played back for ever.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from agent_r1.config.section import Section
from agent_r1.errors import ConfigError, UnseenCallError
from agent_r1.tools.base import Tool, ToolResult
from agent_r1.types import ToolCall
from agent_r1.utils.scope import shared


class CassetteSettings(Section):
    """Where calls are kept and when they are made.

    Attributes:
        path: A JSONL file, looked up from the current folder.
        mode: ``record`` makes every call and keeps those that are new; ``replay`` makes none.
        unseen: What ``replay`` does with an unrecorded call: ``error`` excludes the episode,
            ``call`` makes the call and records it.
        same: Where calls count as the same: in the same ``instance`` (task and seed, on which
            everything may depend), in the same ``task`` (tools that do not depend on the seed), or
            ``anywhere`` (a search engine, a calculator).
    """

    path: str
    mode: Literal["record", "replay"] = "replay"
    unseen: Literal["error", "call"] = "error"
    same: Literal["instance", "task", "anywhere"] = "instance"


@dataclass(frozen=True)
class Slot:
    """Where a call's result is kept: the call's key and the number of earlier equal calls."""

    key: str
    number: int


class Cassette:
    """One episode's view of a tape, which all episodes share."""

    def __init__(self, settings: CassetteSettings, task_id: str, seed: int) -> None:
        self._settings = settings
        instance = f"{task_id} {seed}"
        self._place = {"instance": instance, "task": task_id, "anywhere": ""}[settings.same]
        self._tape = _tape(Path(settings.path).expanduser().resolve())
        if settings.mode == "replay" and settings.unseen == "error" and not self._tape.rows:
            raise ConfigError(
                f"env.cassette.path = {settings.path!r}: nothing is recorded there; "
                "set env.cassette.mode = 'record' first"
            )
        self._seen: Counter[str] = Counter()

    def slot(self, call: ToolCall) -> Slot:
        """The slot of a call that is about to be made; also counts the call."""
        key = _key(self._place, call.name, call.arguments)
        self._seen[key] += 1
        return Slot(key, self._seen[key] - 1)

    def replay(self, slot: Slot, tool: Tool, call: ToolCall) -> ToolResult | None:
        """The recorded result, or ``None`` if the call is to be made."""
        if self._settings.mode == "record":
            return None
        if (row := self._tape.find(slot)) is not None:
            return _restore(row, tool, call)
        if self._settings.unseen == "call":
            return None
        where = f" in {self._place!r}" if self._place else ""
        raise UnseenCallError(
            f"cassette {self._settings.path}: never recorded: "
            f"{call.name}({json.dumps(call.arguments, sort_keys=True)}){where}; record it "
            "(env.cassette.mode = 'record') or let it through (env.cassette.unseen = 'call')"
        )

    def keep(self, slot: Slot, tool: Tool, result: ToolResult) -> None:
        """Writes a result down, unless another attempt has done so for the same call."""
        if (slot.key, slot.number) not in self._tape.rows:
            self._tape.add(slot, _row(self._place, slot.number, tool, result))


_BEGINNING = b'{"in": '
"""First bytes of a recorded call."""


class _Tape:
    """All recorded calls of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        self._numbers: defaultdict[str, list[int]] = defaultdict(list)
        content = path.read_bytes() if path.exists() else b""
        self._is_torn = bool(content) and not content.endswith(b"\n")
        for number, line in enumerate(content.split(b"\n"), 1):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off by a kill, or zeros of a power cut
            try:
                slot = _key(row["in"], row["tool"], row["arguments"]), int(row["number"])
            except (KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}, line {number}: not a recorded call: {error!r}"
                ) from error
            if slot not in self.rows:
                self._note(slot, row)
        torn = _BEGINNING.startswith(content[: len(_BEGINNING)])  # in the first line
        if content.strip() and not self.rows and not torn:
            raise ConfigError(
                f"env.cassette.path: {path} holds no recorded calls but something else; name a "
                "new file"
            )

    def find(self, slot: Slot) -> dict[str, Any] | None:
        """The call's row; if this number was not recorded (the call failed), the next row; after
        the last recorded number, the last row.
        """
        known = self._numbers.get(slot.key)
        if not known:
            return None
        later = [number for number in known if number >= slot.number]
        return self.rows[slot.key, min(later) if later else max(known)]

    def add(self, slot: Slot, row: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = ("\n" if self._is_torn else "") + json.dumps(row) + "\n"
        self._is_torn = True  # until the line is written: the disk may be full
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
        self._is_torn = False
        self._note((slot.key, slot.number), row)

    def _note(self, slot: tuple[str, int], row: dict[str, Any]) -> None:
        self.rows[slot] = row
        self._numbers[slot[0]].append(slot[1])


def _tape(path: Path) -> _Tape:
    return shared(("tape", path), lambda: _Tape(path))


def _key(place: str, tool: str, arguments: dict[str, Any]) -> str:
    return json.dumps([place, tool, arguments], sort_keys=True)


def _row(place: str, number: int, tool: Tool, result: ToolResult) -> dict[str, Any]:
    assert isinstance(result.call, ToolCall)
    call = {"tool": result.call.name, "arguments": result.call.arguments}
    row = {"in": place, **call, "number": number}
    if result.error is not None:
        return {**row, "error": result.error, "detail": result.detail}
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(tool.returns)
        value = adapter.dump_python(result.value, mode="json")
        same = adapter.validate_python(value) == result.value
    except (ValueError, PydanticSchemaGenerationError):
        same = False
    if not same:
        raise ConfigError(
            f"env.cassette: what tool {tool.name!r} returned ({type(result.value).__name__}) "
            "does not come back from JSON as it was: annotate what the tool returns"
        )
    return {**row, "value": value}


def _restore(row: dict[str, Any], tool: Tool, call: ToolCall) -> ToolResult:
    if "error" in row:
        return ToolResult(call, error=row["error"], detail=row["detail"])
    try:
        return ToolResult(call, value=TypeAdapter(tool.returns).validate_python(row["value"]))
    except ValidationError as error:
        raise ConfigError(
            f"env.cassette: a recorded result of {tool.name!r} is not what the tool returns now; "
            f"record it again ({error})"
        ) from error
