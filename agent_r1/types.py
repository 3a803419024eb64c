"""Plain data types that all other files use. Standard library only, no torch, serialisable.

Words: a *step* is one model call and the environment's answer; a *trajectory* is the steps of
one episode; a *group* is the trajectories of one task instance. ``None`` means "not known (yet)",
never zero. Sampled data (``Step``) is frozen; numbers computed about it later (``Estimates``) are
kept apart and name their step by a key, so that both can travel between processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool"]
"""Who says a message."""


class Kind(IntEnum):
    """Who wrote a token, and therefore whether it is trained on."""

    ACTION = 0
    """Sampled here from the policy: in the loss, once."""
    OBSERVATION = 1
    """Written by the environment (the prompt too): never in the loss."""
    CONTEXT = 2
    """Text of any author used again in a rewritten history: never in the loss."""


class StopReason(StrEnum):
    """Why an episode ended. Every trajectory has exactly one."""

    DONE = "done"
    """The environment ended the task: the only one that terminates."""
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    MAX_TIME = "max_time"
    MAX_MEMORY = "max_memory"
    """The engine's memory is too small even for this one episode."""
    FAULT = "fault"
    """The environment or its scorer failed: excluded from training, never scored 0."""

    @property
    def terminated(self) -> bool:
        """The task itself ended."""
        return self is StopReason.DONE

    @property
    def truncated(self) -> bool:
        """One of our limits ended the episode."""
        return self not in (StopReason.DONE, StopReason.FAULT)


@dataclass(slots=True, frozen=True)
class ToolCall:
    """A well-formed call: the name and arguments the agent wrote, not yet checked against any
    tool. Equal calls may have different ids.

    Attributes:
        id: The call's own name within its episode; empty where nobody sampled it.
    """

    name: str
    arguments: dict[str, Any]
    id: str = field(default="", compare=False)


@dataclass(slots=True, frozen=True)
class MalformedCall:
    """Text that was meant as a tool call but cannot be parsed as one."""

    text: str
    reason: str


@dataclass(slots=True, frozen=True)
class CallResult:
    """What happened when a call was run, before the environment said what it means.

    Attributes:
        name: Name of the tool; empty for a malformed call.
        text: The raw result as text, cut at the environment's ``max_result_chars``; for a call that
            failed, why.
        error: Kind of failure, as in ``ToolResult``; ``None`` if there was none.
    """

    name: str
    text: str
    error: str | None = None


@dataclass(slots=True, frozen=True)
class Message:
    """One message of the conversation, as an environment's author sees it."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall | MalformedCall, ...] = ()
    """Tool calls of the assistant's message, in order; ``content`` is then the text around the
    calls.
    """
    cut: bool = False
    """Whether the token limit cut the message off; such a message is no finished answer."""


@dataclass(slots=True, frozen=True)
class Task:
    """One problem to solve.

    Attributes:
        id: Unique within its environment; all randomness of an episode is keyed by it.
        question: The user's first message.
        answer: The gold answer, where there is one.
        category: Evaluations report each category apart, e.g. ``"2"`` for two hops.
        data: Further data for the environment (plain JSON values).
    """

    id: str
    question: str
    answer: str = ""
    category: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Outcome:
    """The outcome reward of an episode, given once at its end.

    Attributes:
        reward: What learning maximises.
        success: Whether the task was solved; shown apart from any reward.
        metrics: Further named figures, e.g. ``{"f1": 0.4}``; averaged and shown. Names that
            every run has (``turns``, ``reward``) are reserved: an episode that uses one fails.
    """

    reward: float
    success: bool
    metrics: dict[str, float] = field(default_factory=dict)


class VersionSpan(NamedTuple):
    """Tokens of one action that were sampled by the same weights.

    Attributes:
        version: Number of weight updates behind them.
        start, end: Which tokens of the action, ``end`` not included.
    """

    version: int
    start: int
    end: int


@dataclass(slots=True, frozen=True)
class Action:
    """The tokens of one model call, exactly as sampled; a number of each for each token.

    Attributes:
        token_ids: Sampled ids, the stop token included when one was sampled.
        logprobs: Log-probability (nats) of each id under the distribution it was drawn from,
            temperature included; empty for a demonstration (not sampled).
        entropies: Entropy (nats) of that distribution; empty if the engine does not tell it.
        versions: The weights that sampled it, span after span: several when new weights came while
            it was sampled, e.g. ``(3, 0, 272), (4, 272, 1200)``; empty for a demonstration.
        stop: ``"stop"`` when a stop token or stop string was sampled, ``"length"`` when the token
            limit was reached, ``"memory"`` when the engine's memory was full.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    versions: tuple[VersionSpan, ...]
    stop: Literal["stop", "length", "memory"]


@dataclass(slots=True, frozen=True)
class Step:
    """One model call and the environment's answer to it.

    Attributes:
        action: The sampled tokens.
        message: The action as the environment saw it.
        observation: What the environment answered.
        observation_ids: The tokens that follow the action: the answer, and the opening of the next
            turn. Empty when the episode ended with this step.
        rewards: Process rewards by part, e.g. ``{"format": 0.1}``; kept apart until an algorithm
            combines them.
        state_key: Name of the state in which the action was taken; the environment gives equal
            states equal names; ``"start"`` for the first.
        events: What went wrong with tools in this step: ``"fault/timeout:search"`` (the
            infrastructure), ``"mistake/unknown_tool"`` (the agent), ``"noise/drop:search"``
            (injected).
        context_ids: Set when this step does not follow the one before, since the history was
            rewritten or the agent began another conversation: all tokens that the policy saw before
            this action, the prompt included.
        generate_seconds: Wall time waited for the engine.
        env_seconds: Wall time waited for the environment.
        results: Raw results of the message's calls, in their order, where the environment tells
            them; what the agent saw of them is ``observation``.
    """

    action: Action
    message: Message
    observation: tuple[Message, ...] = ()
    observation_ids: tuple[int, ...] = ()
    rewards: dict[str, float] = field(default_factory=dict)
    state_key: str | None = None
    events: tuple[str, ...] = ()
    context_ids: tuple[int, ...] | None = None
    generate_seconds: float = 0.0
    env_seconds: float = 0.0
    results: tuple[CallResult, ...] = ()


class StepKey(NamedTuple):
    """Name of a step in a rollout, the same in every process.

    Attributes:
        group: ``Group.number``.
        attempt: Place of the trajectory in ``Group.trajectories``.
        step: Place of the step in the trajectory.
    """

    group: int
    attempt: int
    step: int


PerToken = tuple[float, ...]
"""A number for each action token of a step."""


@dataclass(slots=True)
class Estimates:
    """Numbers that learner and credit computed about a rollout's steps: by step, one for each
    action token. A step missing from a table was not computed.

    Attributes:
        reference_logprobs: Log-probabilities (nats) under the reference policy of a KL term.
        old_logprobs: Log-probabilities (nats) under the policy that the update starts from, by the
            learner; without them those at sampling are used.
        values: The critic's values of the state before each action token and, as one number more,
            of the state after the last.
        advantages: Advantages in the policy loss; set once credit is assigned.
        value_targets: Training targets of the critic.
        entropies: Entropies (nats) at the first update that used the step, of those whose engine
            does not tell them.
        ratios: Importance ratios, new policy over the one that the update starts from (for GSPO
            those of the sequence), at the first update that used the step.
    """

    reference_logprobs: dict[StepKey, PerToken] = field(default_factory=dict)
    old_logprobs: dict[StepKey, PerToken] = field(default_factory=dict)
    values: dict[StepKey, PerToken] = field(default_factory=dict)
    advantages: dict[StepKey, PerToken] = field(default_factory=dict)
    value_targets: dict[StepKey, PerToken] = field(default_factory=dict)
    entropies: dict[StepKey, PerToken] = field(default_factory=dict)
    ratios: dict[StepKey, PerToken] = field(default_factory=dict)

    def tables(self) -> dict[str, dict[StepKey, PerToken]]:
        """The tables by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def add(self, other: Estimates) -> None:
        """Adds the numbers of ``other``."""
        for name, table in other.tables().items():
            getattr(self, name).update(table)


@dataclass(slots=True, repr=False)
class Trajectory:
    """One episode: the prompt, then its steps in order."""

    task_id: str
    category: str
    attempt: int
    prompt: tuple[Message, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    steps: list[Step] = field(default_factory=list)
    stop: StopReason = StopReason.FAULT
    outcome: Outcome | None = None
    """``None`` only when the episode failed (``stop`` is FAULT)."""
    fault: str | None = None
    """Why the environment or its scorer failed; also set when only its ``close`` did."""
    resample: bool = False
    """Whether the failed episode should be played again."""
    discarded: int = 0
    """Number of earlier plays of this attempt that were thrown away."""
    discarded_events: tuple[str, ...] = ()
    """Events of those discarded plays."""
    seconds: float = 0.0

    def __repr__(self) -> str:
        earned = "excluded" if self.outcome is None else f"reward {self.outcome.reward:g}"
        why = f": {self.fault}" if self.fault else ""
        return (
            f"Trajectory({self.task_id!r}, attempt {self.attempt}, {len(self.steps)} steps, "
            f"{self.stop}, {earned}{why})"
        )

    @property
    def num_action_tokens(self) -> int:
        return sum(len(step.action.token_ids) for step in self.steps)

    @property
    def num_tokens(self) -> int:
        """Tokens of the episode as one sequence, prompt included."""
        return len(self.prompt_ids) + sum(
            len(step.action.token_ids) + len(step.observation_ids) for step in self.steps
        )

    @property
    def num_calls(self) -> int:
        """Well-formed calls."""
        return sum(isinstance(c, ToolCall) for s in self.steps for c in s.message.tool_calls)

    def process_reward(self) -> dict[str, float]:
        """Process rewards by part, summed over the steps."""
        total: dict[str, float] = {}
        for step in self.steps:
            for part, value in step.rewards.items():
                total[part] = total.get(part, 0.0) + value
        return total


@dataclass(slots=True)
class Group:
    """All attempts at one task instance. Attempts that failed through no fault of the agent are
    kept, but not used.

    Attributes:
        number: Index of the group in its rollout, part of its steps' keys.
    """

    task: Task
    trajectories: list[Trajectory]
    number: int = 0

    @property
    def scored(self) -> list[Trajectory]:
        """The attempts that count: those with an outcome and at least one action."""
        return [trajectory for _, trajectory in self.attempts()]

    def attempts(self) -> Iterator[tuple[int, Trajectory]]:
        """The attempts that count, with their index."""
        for attempt, trajectory in enumerate(self.trajectories):
            if trajectory.outcome is not None and trajectory.steps:
                yield attempt, trajectory

    def steps(self) -> Iterator[tuple[StepKey, Step]]:
        """The steps of the attempts that count, by key, in order."""
        for attempt, trajectory in self.attempts():
            for index, step in enumerate(trajectory.steps):
                yield StepKey(self.number, attempt, index), step


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on the parts and nothing else, the same on every machine and in
    every process.
    """
    digest = hashlib.blake2b("\x1f".join(map(repr, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
