"""One client's side of an episode: its calls become turns of a conversation."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from agent_r1.envs.base import Transition
from agent_r1.envs.lifecycle import plain_outcome, plain_rewards
from agent_r1.gateway.call import Call, RefusedCallError, Turn, in_order, spoken
from agent_r1.rollout.conversation import Conversation, EndedError
from agent_r1.types import Message, Outcome, StopReason
from agent_r1.utils.text import describe

MAX_WAITING = 64
"""Calls of one client at once; its turns are sampled one after the other."""
WHY = {
    StopReason.MAX_TURNS: "the episode's turns are used up (limits.turns)",
    StopReason.MAX_TIME: "the episode's time is over (limits.seconds)",
    StopReason.MAX_MEMORY: "the engine has no memory for a longer context",
}


@dataclass(frozen=True, slots=True)
class Record:
    """How one call was taken up.

    Attributes:
        dialect: E.g. ``chat``.
        num_messages: Messages of the client; the first ``num_matched`` were a known beginning.
        after: The step that the call goes on from; ``None`` for a new beginning.
        is_branch: Other turns came between that step and this call, or the beginning is not the
            episode's first.
        step: Number of the step that the call became.
        num_context: Tokens of context; the first ``num_known`` are those of an earlier turn.
    """

    dialect: str
    num_messages: int
    num_matched: int
    after: int | None
    is_branch: bool
    step: int
    num_context: int
    num_known: int


class ClientSession:
    """An episode that a client leads by its calls.

    The longest known beginning of a call's messages is gone on from with its very tokens: role,
    content and calls count, neither the ids of calls nor thoughts. What does not go on from the
    last turn is a branch.

    Attributes:
        records: How each call was taken up.
        stopped: The limit that the last call met; ``None`` if it got a turn.
        met: The limit that some call met last, if any did.
        error: What the engine raised, if it failed.
        outcome: The outcome reward that the client sent, if it did.
    """

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.records: list[Record] = []
        self.stopped: StopReason | None = None
        self.met: StopReason | None = None
        self.error: Exception | None = None
        self.outcome: Outcome | None = None
        self._said: list[Message] = []
        self._known: dict[str, int] = {}
        self._conversations: dict[int, tuple[Message, ...]] = {}
        self._lock = asyncio.Lock()
        self._at_work: set[asyncio.Future[list[Turn]]] = set()
        self._name = secrets.token_hex(6)
        self._asked: dict[str, Asked] = {}
        self._is_closed = False
        self._answered = time.perf_counter()

    async def close(self) -> None:
        """Ends what is being sampled; from now on calls are refused. When it returns, nobody uses
        the engine's session any more.
        """
        self._is_closed = True
        at_work = [*self._at_work]
        for turns in at_work:
            turns.cancel()
        await asyncio.gather(*at_work, return_exceptions=True)

    # Turns -------------------------------------------------------------------------------------

    def ask(self, call: Call, *, dialect: str, name: str, is_repeated: bool) -> Asked:
        """The turns that answer a call: those of an earlier one if the client only asks again.

        Args:
            call: What is asked.
            dialect: Of the client.
            name: Equal for equal requests.
            is_repeated: The client says that it has asked before; without that, an answer that
                nobody heard is told again.
        """
        before = self._asked.get(name)
        if before is not None and not before.has_failed:
            is_unheard = not before.is_heard and not before.num_listening
            if is_repeated or is_unheard:
                return before
        if len(self._at_work) >= MAX_WAITING:
            raise RefusedCallError(
                f"{MAX_WAITING} calls of this episode wait already",
                status=429,
                code="too_many_requests",
                is_final=False,
            )
        turns = asyncio.ensure_future(self._turns(call, dialect))
        self._at_work.add(turns)
        turns.add_done_callback(self._at_work.discard)
        asked = self._asked[name] = Asked(turns)
        return asked

    def has_asked(self, name: str) -> bool:
        """Whether a request of that name was taken up."""
        return name in self._asked

    @property
    def was_cut(self) -> bool:
        """Whether the last turn is cut by a limit, which some clients take for a failure."""
        return bool(self._said) and self._said[-1].cut

    @property
    def is_busy(self) -> bool:
        """Whether turns are being sampled."""
        return bool(self._at_work)

    def num_known(self, call: Call) -> int:
        """How many messages of a call are a known beginning."""
        try:
            return self._longest_known(call.tools, self._whole(call))[0]
        except RefusedCallError:  # it names a response of another conversation
            return 0

    def count(self, call: Call) -> int:
        """Tokens of context that a call would have."""
        messages = self._whole(call)
        matched, after, _ = self._longest_known(call.tools, messages)
        with _readable():
            known, new = self.conversation.context(
                after, messages[matched:], call.tools, self._own()
            )
        return len(known) + len(new)

    def _own(self) -> list[tuple[Message, tuple[int, ...]]]:
        """The agent's turns as the client knows them, with their tokens."""
        steps = self._steps
        return [(m, step.action.token_ids) for m, step in zip(self._said, steps, strict=True)]

    async def _turns(self, call: Call, dialect: str) -> list[Turn]:
        async with self._lock:
            left = self.conversation.limits.turns - len(self._steps)
            if 0 < left < call.n:
                raise RefusedCallError(f"n = {call.n}: {left} turns are left (limits.turns)")
            return [await self._turn(call, dialect) for _ in range(call.n)]

    async def _turn(self, call: Call, dialect: str) -> Turn:
        if self._is_closed:
            raise RefusedCallError("the episode is over", status=409, code="episode_over")
        conversation, number = self.conversation, len(self.conversation.trajectory.steps)
        if conversation.is_at_last_turn:
            raise self._ended(StopReason.MAX_TURNS)
        messages = self._whole(call)
        matched, after, digest = self._longest_known(call.tools, messages)
        if after is not None:  # those that were known need no second copy
            messages = (*self._conversations[after], *messages[matched:])
        with _readable():
            num_known = conversation.resume(after, messages[matched:], call.tools, self._own())
        num_context, is_branch = len(conversation.path), conversation.is_at_branch
        if number and not is_branch:
            conversation.note(env_seconds=time.perf_counter() - self._answered)
        try:
            step = await conversation.generate(max_tokens=call.max_tokens, stop_strings=call.stop)
        except EndedError as end:
            self._keep_up()
            raise self._ended(end.stop) from end
        except Exception as error:
            self.error = error
            raise RefusedCallError(describe(error), status=503, code="engine_failed") from error
        self.stopped, self._answered = None, time.perf_counter()
        self._keep_up()
        said, stop = _cut_at(call.stop, self._said[-1])
        self._said[-1] = said
        self._known[_next(digest, said)] = number
        self._conversations[number] = (*messages, said)
        self.records.append(
            Record(
                dialect,
                len(messages),
                matched,
                after,
                is_branch,
                number,
                num_context,
                num_known,
            )
        )
        name = f"{self._name}_{number}"
        return Turn(number, name, said, step, num_context, num_known, stop)

    def _ended(self, stop: StopReason) -> RefusedCallError:
        """A limit is met: the call gets no turn."""
        self.stopped = self.met = stop
        return _refusal(stop, self.conversation.limits.tokens)

    @property
    def _steps(self) -> list[Any]:
        return self.conversation.trajectory.steps

    def _keep_up(self) -> None:
        """Notes what the client sees of the steps, also of one that a limit took from it."""
        self._said += [spoken(step.message) for step in self._steps[len(self._said) :]]

    def _whole(self, call: Call) -> tuple[Message, ...]:
        """All messages of a call that may name what came before; a system message of its own
        replaces the one before.
        """
        if call.previous is None:
            return call.messages
        name, _, number = call.previous.rpartition("_")
        is_ours = name == self._name and number.isdecimal()
        before = self._conversations.get(int(number[:9])) if is_ours else None
        if before is None:
            raise RefusedCallError(f"there is no response {call.previous!r:.80} here", status=404)
        if [m.role for m in (call.messages[:1] + before[:1])] == ["system", "system"]:
            return (call.messages[0], *before[1:], *call.messages[1:])
        new = zip(call.messages, call.result_ids, strict=True)
        return in_order([*((message, "") for message in before), *new])

    def _longest_known(
        self, tools: Sequence[dict[str, Any]], messages: Sequence[Message]
    ) -> tuple[int, int | None, str]:
        """How many messages are a known beginning, which ends with which step, and the name of all
        of them.
        """
        matched, after = 0, None
        digest = _digest("", [*tools])
        for number, message in enumerate(messages, 1):
            digest = _next(digest, message)
            if message.role == "assistant" and (step := self._known.get(digest)) is not None:
                matched, after = number, step
        return matched, after, digest

    def taken_up(self) -> list[str]:
        """How each call was taken up, a line each, and what that saved."""
        lines = []
        for number, record in enumerate(self.records, 1):
            what = "goes on from" if not record.is_branch else "branches off after"
            how = "a new beginning" if record.after is None else f"{what} turn {record.after + 1}"
            why = f" ({self._why(record)})" if record.is_branch else ""
            lines.append(
                f"call {number} ({record.dialect}), {record.num_messages} messages: {how}{why}; "
                f"{record.num_known} of {record.num_context} tokens are known"
            )
        if total := sum(record.num_context for record in self.records):
            known = sum(record.num_known for record in self.records)
            lines.append(f"share of context tokens that turns before have: {known / total:.2f}")
        return lines

    def _why(self, record: Record) -> str:
        """Why a call does not go on from the last turn."""
        if record.after is not None:
            return "other turns came between"
        asked = self._conversations[record.step][:-1]
        known = [self._conversations[r.step] for r in self.records if r.step < record.step]
        if not known:
            return "the turn before it was cut"
        nearest = max(known, key=lambda other: _num_equal(asked, other))
        same = _num_equal(asked, nearest)
        if same >= min(len(asked), len(nearest)):
            return "the tools are others, or no turn of the agent is in it"
        return f"its message {same + 1}, of the role {asked[same].role}, is another than before"

    # Rewards -----------------------------------------------------------------------------------

    def reward(self, value: Any, name: str | None, success: Any, metrics: Any) -> None:
        """A process reward of the last turn, under its name, or without one the outcome's."""
        if self._is_closed:
            raise RefusedCallError("the episode is over", status=409, code="episode_over")
        try:
            if not isinstance(name, str | None) or not isinstance(success, bool | None):
                raise TypeError("name is a text, success true or false")
            if name is None:
                is_success = float(value) >= 1.0 if success is None else success
                self.outcome = plain_outcome(Outcome(value, is_success, dict(metrics or {})))
                return
            given = plain_rewards(Transition(rewards={name: value}))
        except (TypeError, ValueError, OverflowError) as error:
            raise RefusedCallError(f"reward: {describe(error)}") from error
        if not self._steps:
            raise RefusedCallError("there is no turn yet that could be rewarded", status=409)
        rewards = self._steps[-1].rewards
        self.conversation.note(rewards={**rewards, name: rewards.get(name, 0.0) + given[name]})


class Asked:
    """A request that was taken up.

    Attributes:
        turns: Its answer.
        is_heard: A client got it whole.
        is_abandoned: Nobody waited any more, and its sampling was ended.
        num_listening: Clients that wait for it or get it at the moment.
    """

    def __init__(self, turns: asyncio.Future[list[Turn]]) -> None:
        self.turns, self.is_heard, self.num_listening = turns, False, 0
        self.is_abandoned = False
        turns.add_done_callback(lambda done: done.cancelled() or done.exception())

    @property
    def has_failed(self) -> bool:
        done = self.turns.done()
        return self.is_abandoned or (
            done and (self.turns.cancelled() or self.turns.exception() is not None)
        )

    def leave(self) -> None:
        """A client hears or waits no more. Nobody samples for nobody."""
        self.num_listening -= 1
        if not self.num_listening and not self.turns.done():
            self.is_abandoned = True
            self.turns.cancel()


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """What cannot be rendered is the client's mistake."""
    try:
        yield
    except (ValueError, TypeError, TemplateError) as error:
        raise RefusedCallError(describe(error)) from error


def _refusal(stop: StopReason, longest: int) -> RefusedCallError:
    if stop is StopReason.MAX_TOKENS:
        return RefusedCallError(
            f"the conversation is longer than {longest} tokens (limits.tokens)",
            code="context_length_exceeded",
        )
    return RefusedCallError(WHY[stop], status=409, code="episode_over")


def _cut_at(stops: Sequence[str], message: Message) -> tuple[Message, str | None]:
    """A message up to the first of the texts that end it, and which that is: clients do not expect
    to see it.
    """
    places = [(message.content.find(stop), stop) for stop in stops if stop in message.content]
    if not places:
        return message, None
    place, stop = min(places)
    return dataclasses.replace(message, content=message.content[:place]), stop


def _num_equal(one: Sequence[Message], other: Sequence[Message]) -> int:
    """How many messages two conversations have in common from their beginning."""
    pairs = itertools.takewhile(
        lambda pair: _next("", pair[0]) == _next("", pair[1]), zip(one, other, strict=False)
    )
    return sum(1 for _ in pairs)


def _next(digest: str, message: Message) -> str:
    """The name of a conversation with one message more."""
    calls = [(call.name, call.arguments) for call in spoken(message).tool_calls]  # type: ignore[union-attr]
    return _digest(digest, [message.role, message.content.strip(), calls])


def _digest(before: str, value: Any) -> str:
    text = before + json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
