"""A trained agent behind the gateway's interfaces, for the app that it came from: no episodes, no
rewards, one key.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from agent_r1.gateway.call import Call, RefusedCallError
from agent_r1.gateway.server import Gateway
from agent_r1.gateway.session import Asked, ClientSession
from agent_r1.rollout.conversation import Conversation, Limits
from agent_r1.rollout.engine import Engine, Sampling
from agent_r1.rollout.rollout import Rollout
from agent_r1.types import Action, Trajectory

MAX_CONVERSATIONS = 256
"""Conversations that go on with the very tokens that were sampled; of more, those that were used
longest ago begin anew.
"""
ENDLESS = 10**9
"""Turns and seconds of a conversation."""


class ServedAgent:
    """Finds the conversation that a call goes on with, or begins one."""

    def __init__(self, rollout: Rollout, temperature: float) -> None:
        self._rollout, self._number = rollout, 0
        limits = rollout.limits.model_dump()
        self._limits = Limits(**{**limits, "turns": ENDLESS, "seconds": float(ENDLESS)})
        self._sampling = rollout.sampling(temperature)
        self._sessions: list[ClientSession] = []
        """The one that was used last stands last."""

    def ask(self, call: Call, *, dialect: str, name: str, is_repeated: bool) -> Asked:
        """See ``ClientSession.ask``."""
        session = next((s for s in self._sessions if is_repeated and s.has_asked(name)), None)
        session = session or self._nearest(call)
        asked = session.ask(call, dialect=dialect, name=name, is_repeated=is_repeated)
        if session in self._sessions:
            self._sessions.remove(session)
        self._sessions.append(session)
        for old in self._sessions[:-MAX_CONVERSATIONS]:
            if not old.is_busy:
                self._sessions.remove(old)
        return asked

    def count(self, call: Call) -> int:
        """See ``ClientSession.count``."""
        return self._nearest(call).count(call)

    def reward(self, value: Any, name: str | None, success: Any, metrics: Any) -> None:
        raise RefusedCallError("nothing is trained here: there are no rewards", status=404)

    async def close(self) -> None:
        for session in self._sessions:
            await session.close()

    def _nearest(self, call: Call) -> ClientSession:
        """The conversation that knows the longest beginning of a call; a new one if none does."""
        known = {session: session.num_known(call) for session in self._sessions}
        nearest = max(known, key=lambda session: known[session], default=None)
        if nearest is not None and known[nearest]:
            return nearest
        self._number += 1
        return ClientSession(
            Conversation(
                Trajectory("served", "", 0),
                _Opened(self._rollout.engine),
                self._rollout.renderer,
                limits=self._limits,
                sampling=self._sampling,
                seed=self._number,
                clock=time.perf_counter,
            )
        )


class _Opened:
    """An engine's session that is open while it samples: nobody waits for an app that thinks."""

    outage = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def generate(self, prefix: Sequence[int], sampling: Sampling, seed: int) -> Action:
        session = self._engine.session()
        try:
            return await session.generate(prefix, sampling, seed)
        finally:
            session.close()

    def close(self) -> None:
        return None


async def serve(
    rollout: Rollout, *, temperature: float, port: int, key: str, tell: Callable[[str], None]
) -> None:
    """Serves until it is cancelled; tells the address once it answers."""
    await rollout.engine.start(rollout.limits.tokens)
    gateway, agent = Gateway(port), ServedAgent(rollout, temperature)
    await gateway.start()
    gateway.open(key, agent)
    tell(gateway.url)
    try:
        await asyncio.Event().wait()
    finally:
        await gateway.close()
        await rollout.engine.close()
