"""The conversation of one episode: its tokens so far, its limits, its turns. An environment's loop
leads it (``episode.py``), or the calls of a client (the gateway).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from agent_r1.config.section import Section
from agent_r1.envs.lifecycle import tidy
from agent_r1.render import Renderer
from agent_r1.rollout.engine import Sampling, Session
from agent_r1.rollout.faults import FaultError
from agent_r1.rollout.history import render_messages
from agent_r1.types import Action, Message, Step, StopReason, ToolCall, Trajectory, derive_seed

LOOK_SECONDS = 0.05
"""At least, between two looks at whether an episode's time is over."""
MAX_CHARS_PER_TOKEN = 128
"""Text with more characters than this per allowed token is refused untokenised; the longest known
token, a run of blanks, has this many.
"""


class Limits(Section):
    """When a turn and when an episode is cut off.

    Attributes:
        turns: Model calls of an episode.
        tokens_per_turn: Sampled tokens of a turn.
        tokens: Longest context of the policy at any time, the prompt included.
        seconds: Wall time of an episode.
        stop_strings: Texts that end a turn, besides the chat format's own end.
    """

    turns: int = Field(8, ge=1)
    tokens_per_turn: int = Field(256, ge=1)
    tokens: int = Field(4096, ge=1)
    seconds: float = Field(300.0, gt=0)
    stop_strings: tuple[str, ...] = ()


class EndedError(Exception):
    """The conversation cannot go on; ``stop`` is why."""

    def __init__(self, stop: StopReason) -> None:
        super().__init__(stop)
        self.stop = stop


class Conversation:
    """The turns of one episode, written into its trajectory as they happen: ``open``, then in turn
    ``generate`` and one of ``answer`` and ``rewrite``.

    Attributes:
        trajectory: Gets the prompt and the steps.
        path: The policy's context at the moment: all tokens so far.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        session: Session,
        renderer: Renderer,
        *,
        limits: Limits,
        sampling: Sampling,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        """``seed`` is that of sampling; ``clock`` gives seconds, and stands still while the episode
        is not to be charged for them; its time begins now.
        """
        self.trajectory, self.session, self.renderer = trajectory, session, renderer
        self.limits, self._sampling, self._seed = limits, sampling, seed
        self._clock, self._deadline = clock, clock() + limits.seconds
        self.path: list[int] = []
        self._context_ids: tuple[int, ...] | None = None
        self._is_full = False

    # What is said to the agent -------------------------------------------------------------------

    def open(self, messages: Sequence[Message], schemas: Sequence[dict[str, Any]]) -> None:
        """The opening messages, and the schemas of the tools that the agent has.

        Raises:
            ValueError, TypeError: They are no messages, or too long for any tokeniser.
        """
        prompt = tuple(map(tidy, messages))
        self._must_not_be_too_large(prompt, "the opening messages {}")
        self.trajectory.prompt = prompt
        self.trajectory.prompt_ids = self.renderer.prompt(prompt, schemas)
        self.path = list(self.trajectory.prompt_ids)

    def see(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Records messages as what the environment answered to the last turn, unrendered; raises as
        ``open``.
        """
        seen = tuple(map(tidy, messages))
        too_large = "the messages {}; shorten what the agent gets to see"
        self._must_not_be_too_large(seen, too_large)
        self.note(observation=seen)
        return seen

    def answer(self) -> None:
        """What was seen last follows the last turn; without room for it there is no next turn."""
        last = self.trajectory.steps[-1]
        ids = self.renderer.observation(last.observation, last.action)
        self._context_ids = None
        if self._fits(len(self.path) + len(ids)):
            self.note(observation_ids=ids)
            self.path += ids

    def rewrite(self, history: Sequence[Message], schemas: Sequence[dict[str, Any]]) -> None:
        """The whole conversation anew. The agent's own turns in it keep their sampled tokens, and
        are not trained on a second time.
        """
        path = render_messages(history, schemas, self.renderer, self.own_turns())
        if self._fits(len(path)):
            self.path, self._context_ids = path, tuple(path)

    def own_turns(self) -> list[tuple[Message, tuple[int, ...]]]:
        """What the agent said, with its tokens as sampled."""
        return [(step.message, step.action.token_ids) for step in self.trajectory.steps]

    def note(self, **found: Any) -> None:
        """Fills in fields of the last step."""
        steps = self.trajectory.steps
        steps[-1] = dataclasses.replace(steps[-1], **found)

    def _fits(self, length: int) -> bool:
        self._is_full = length >= self.limits.tokens
        return not self._is_full

    def _must_not_be_too_large(self, messages: Sequence[Message], what: str) -> None:
        """Raises ``ValueError`` for messages that cannot fit in any tokenisation."""
        size = sum(len(message.content) for message in messages)
        if size > MAX_CHARS_PER_TOKEN * self.limits.tokens + MAX_CHARS_PER_TOKEN**2:
            why = f"have {size:,} characters, limits.tokens is {self.limits.tokens}"
            raise ValueError(what.format(why))

    # What the agent says -------------------------------------------------------------------------

    @property
    def is_at_last_turn(self) -> bool:
        """Whether the turns are used up."""
        return len(self.trajectory.steps) >= self.limits.turns

    def remaining(self) -> float:
        """Seconds left to the episode; below 0 when they are over."""
        return self._deadline - self._clock()

    async def generate(self, *, state_key: str | None = None) -> Step:
        """The agent's next turn, as it is recorded.

        Raises:
            EndedError: No turn, or one that ends the episode: a limit is reached.
            FaultError: The engine itself does not work.
        """
        if self.is_at_last_turn:
            raise EndedError(StopReason.MAX_TURNS)
        limits, number = self.limits, len(self.trajectory.steps)
        room = min(limits.tokens_per_turn, limits.tokens - len(self.path))
        if self._is_full or room <= 0:
            raise EndedError(StopReason.MAX_TOKENS)
        sampling = dataclasses.replace(self._sampling, max_tokens=room)
        start = time.perf_counter()
        try:
            action = await self._action(sampling, derive_seed(self._seed, number))
        except TimeoutError as error:
            if (why := self.session.outage) is not None:
                raise FaultError(f"engine: {why}") from error
            raise EndedError(StopReason.MAX_TIME) from error
        if action.stop == "memory" and not action.token_ids:
            raise EndedError(StopReason.MAX_MEMORY)
        step = Step(
            action,
            _named(self.renderer.parse(action), number, is_cut=action.stop == "length"),
            state_key=state_key,
            context_ids=self._context_ids,
            generate_seconds=time.perf_counter() - start,
        )
        self.trajectory.steps.append(step)
        self.path += action.token_ids
        if action.stop == "memory":
            raise EndedError(StopReason.MAX_MEMORY)
        if len(self.path) >= limits.tokens and action.stop == "length":
            raise EndedError(StopReason.MAX_TOKENS)  # a sentence that our limit cut is no answer
        return step

    async def _action(self, sampling: Sampling, seed: int) -> Action:
        """Samples an action; a ``TimeoutError`` if the episode's time is over before. That time
        may stand still, so it is looked at again when it seems over.
        """
        asked = asyncio.ensure_future(self.session.generate(self.path, sampling, seed))
        try:
            while not asked.done():
                if (left := self.remaining()) <= 0:
                    raise TimeoutError
                await asyncio.wait({asked}, timeout=max(left, LOOK_SECONDS))
            return asked.result()
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)  # no session closes before


def _named(message: Message, turn: int, *, is_cut: bool) -> Message:
    """The message of a turn, each of its calls with an id."""
    calls = tuple(
        dataclasses.replace(call, id=f"call_{turn}_{number}")
        if isinstance(call, ToolCall)
        else call
        for number, call in enumerate(message.tool_calls)
    )
    return dataclasses.replace(message, tool_calls=calls, cut=is_cut)
