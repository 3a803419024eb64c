"""Stand-ins for pure logic: one token per character, and an engine that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from agent_r1.render.calls import parse_hermes
from agent_r1.rollout.engine import Sampling, Traits
from agent_r1.types import Action, Message

END = 0
"""The stop token of ``CharRenderer``."""


class CharRenderer:
    """Token id = code point; id 0 ends a turn. So the expected ids of a test can be read."""

    stop_token_ids = (END,)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[int, ...]:
        return tuple(ord(c) for c in "".join(f"[{m.role}]{m.content}" for m in messages))

    def observation(self, messages: Sequence[Message], action: Action) -> tuple[int, ...]:
        closing = () if action.token_ids[-1:] == (END,) else (END,)
        return closing + self.prompt(messages, [])

    def parse(self, action: Action) -> Message:
        return parse_hermes("".join(chr(i) for i in action.token_ids if i != END))

    def encode_message(self, message: Message) -> tuple[int, ...]:
        return self.encode_action(message.content)

    def encode_action(self, text: str) -> tuple[int, ...]:
        return (*(ord(c) for c in text), END)


class ScriptedEngine:
    """Says its lines one after another, the same to every session; the limit of tokens holds."""

    traits = Traits()

    def __init__(self, *lines: str) -> None:
        self.lines = lines
        self.prefixes: list[list[int]] = []

    async def start(self, longest: int | None = None) -> None:
        return None

    def session(self, number: int = 0) -> ScriptedSession:
        return ScriptedSession(self)

    def report(self) -> dict[str, float]:
        return {}

    async def idle(self) -> None:
        return None

    async def pause(self) -> None:
        return None

    def resume(self) -> None:
        return None

    async def sync(self, weights: object, version: int) -> None:
        return None

    def advice(self, figures: object, seconds: float) -> tuple[str, ...]:
        return ()

    async def close(self) -> None:
        return None


class ScriptedSession:
    outage = None

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine
        self._turn = 0

    async def generate(self, prefix: Sequence[int], sampling: Sampling, seed: int) -> Action:
        await asyncio.sleep(0)
        self._engine.prefixes.append(list(prefix))
        line = self._engine.lines[min(self._turn, len(self._engine.lines) - 1)]
        self._turn += 1
        return make_action(line, max_tokens=sampling.max_tokens)

    def close(self) -> None:
        return None


def make_action(text: str, *, max_tokens: int = 10_000, logprob: float = -0.5) -> Action:
    """The action that ``text`` and its end are; cut at the limit."""
    ids = (*(ord(c) for c in text), END)
    cut = ids[:max_tokens]
    stop = "stop" if len(cut) == len(ids) else "length"
    return Action(cut, (logprob,) * len(cut), (0.1,) * len(cut), (), stop)
