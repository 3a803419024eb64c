"""The conversation of one episode: its tokens so far, its limits, its turns. An environment's loop
leads it (``episode.py``), or the calls of a client (the gateway).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import Field

from agent_r1.config.section import Section
from agent_r1.envs.lifecycle import tidy
from agent_r1.render import Renderer
from agent_r1.rollout.engine import Sampling, Session
from agent_r1.rollout.faults import FaultError
from agent_r1.rollout.history import render_messages
from agent_r1.types import Action, Message, Step, StopReason, ToolCall, Trajectory, derive_seed

T = TypeVar("T")
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
    """The turns of one episode, written into its trajectory as they happen. An environment calls
    ``open``, then in turn ``generate`` and one of ``answer`` and ``rewrite``; for a client it is
    ``resume`` and ``generate``.

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

    def context(
        self,
        after: int | None,
        messages: Sequence[Message],
        schemas: Sequence[dict[str, Any]],
        own: Sequence[tuple[Message, tuple[int, ...]]],
    ) -> tuple[list[int], list[int]]:
        """The tokens before a turn that answers a client's messages.

        Args:
            after: The agent's turn that they come after; ``None`` for a conversation from its
                beginning.
            messages: Those after that turn; the last is to the agent. Turns of the agent that are
                among them keep their tokens if ``own`` has them.
            schemas: Of the tools, for a beginning.
            own: The agent's turns as the client knows them, with their tokens.

        Returns:
            Those that were known, up to the end of that turn, and the new ones.

        Raises:
            ValueError, TypeError: As ``open``.
        """
        new = () if after is not None else schemas
        self._must_not_be_too_large(messages, "the messages {}", new)
        known = [] if after is None else self._path_after(after)
        action = None if after is None else self.trajectory.steps[after].action
        return known, render_messages(messages, schemas, self.renderer, own, after=action)

    def resume(
        self,
        after: int | None,
        messages: Sequence[Message],
        schemas: Sequence[dict[str, Any]],
        own: Sequence[tuple[Message, tuple[int, ...]]],
    ) -> int:
        """What a client says next, as in ``context``, whose known tokens are counted. What does not
        follow the last turn is a branch, whose turn names all tokens before it.
        """
        messages = tuple(map(tidy, messages))
        known, new = self.context(after, messages, schemas, own)
        self.path = known + new
        if not self._fits(len(self.path)):
            return len(known)
        num_steps = len(self.trajectory.steps)
        is_next = not num_steps if after is None else after == num_steps - 1
        self._context_ids = None if is_next else tuple(self.path)
        if is_next and after is None:
            self.trajectory.prompt, self.trajectory.prompt_ids = messages, tuple(new)
        elif is_next:
            self.note(observation=messages, observation_ids=tuple(new))
        return len(known)

    @property
    def is_at_branch(self) -> bool:
        """Whether the next turn does not follow the last one."""
        return self._context_ids is not None

    def _path_after(self, number: int) -> list[int]:
        """All tokens up to the end of a turn."""
        steps = self.trajectory.steps
        start = next((n for n in range(number, 0, -1) if steps[n].context_ids is not None), 0)
        path = list(steps[start].context_ids or self.trajectory.prompt_ids)
        for n in range(start, number + 1):
            path += steps[n].action.token_ids
            if n < number:
                path += steps[n].observation_ids
        return path

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

    def _must_not_be_too_large(
        self, messages: Sequence[Message], what: str, schemas: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Raises ``ValueError`` for messages and tools that cannot fit in any tokenisation."""
        size = sum(len(message.content) for message in messages)
        calls = [call for message in messages for call in message.tool_calls]
        size += sum(len(repr(thing)) for thing in (*calls, *schemas)) // 2  # quotes count little
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

    async def in_time(self, work: asyncio.Future[T]) -> T:
        """What ``work`` gives; a ``TimeoutError`` if the episode's time is over before, and then it
        goes on. That time may stand still, so it is looked at again when it seems over.
        """
        while not work.done():
            if (left := self.remaining()) <= 0:
                raise TimeoutError
            await asyncio.wait({work}, timeout=max(left, LOOK_SECONDS))
        return work.result()

    async def generate(
        self,
        *,
        state_key: str | None = None,
        max_tokens: int | None = None,
        stop_strings: tuple[str, ...] = (),
    ) -> Step:
        """The agent's next turn, as it is recorded; ``max_tokens`` and ``stop_strings`` come to
        those of the limits.

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
        sampling = dataclasses.replace(
            self._sampling,
            max_tokens=min(room, max_tokens or room),
            stop_strings=(*self._sampling.stop_strings, *stop_strings),
        )
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
        """Samples an action; a ``TimeoutError`` if the episode's time is over before."""
        asked = asyncio.ensure_future(self.session.generate(self.path, sampling, seed))
        try:
            return await self.in_time(asked)
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
