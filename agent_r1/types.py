"""The plain data that all other files talk in. Standard library only, no torch, serialisable.

Words: a *step* is one model call and what the environment answered; a *trajectory* is the steps of
one episode; a *group* is the trajectories of one task instance. ``None`` means "not known (yet)",
never zero.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Literal


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
    """The environment said so: the only one that terminates."""
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    MAX_TIME = "max_time"
    MAX_MEMORY = "max_memory"
    """The engine's budget does not hold even this one episode."""
    FAULT = "fault"
    """The environment or its scorer failed: excluded from training, never scored 0."""

    @property
    def terminated(self) -> bool:
        """The task itself ended."""
        return self is StopReason.DONE

    @property
    def truncated(self) -> bool:
        """A limit of ours cut the task off."""
        return self not in (StopReason.DONE, StopReason.FAULT)


@dataclass(slots=True, frozen=True)
class ToolCall:
    """A well-formed call: the name and arguments the agent wrote, not yet checked against any
    tool.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(slots=True, frozen=True)
class MalformedCall:
    """Something that was meant as a tool call and cannot be read as one."""

    text: str
    reason: str


@dataclass(slots=True, frozen=True)
class Message:
    """One message of the conversation, as an environment's author sees it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall | MalformedCall, ...] = ()
    """What the assistant's message asks for, in its order; ``content`` is then the text around the
    calls.
    """
    cut: bool = False
    """Whether a limit of tokens ended the message before the agent did: no finished answer."""


@dataclass(slots=True, frozen=True)
class Task:
    """One problem to solve.

    Attributes:
        id: Unique within its environment; all randomness of an episode is keyed by it.
        question: What the user says first.
        answer: The gold answer, where there is one.
        category: Evaluations report each category apart, e.g. ``"2"`` for two hops.
        data: Whatever else the environment needs (plain JSON values).
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
        metrics: Further named figures, e.g. ``{"f1": 0.4}``; averaged and shown. Not by the name of
            a figure that every run has (``turns``, ``reward``): an episode with such a one fails.
    """

    reward: float
    success: bool
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Action:
    """The tokens of one model call, exactly as sampled. All tuples have the same length.

    Attributes:
        token_ids: Sampled ids, the stop token included when one was sampled.
        logprobs: Log-probability (nats) of each id under the distribution it was drawn from,
            temperature included; empty, as are the entropies, for a demonstration, which nobody
            sampled.
        entropies: Entropy (nats) of that distribution.
        policy_version: Number of weight updates behind the policy that sampled it.
        stop: ``"stop"`` when a stop token or stop string was sampled, ``"length"`` when the limit
            of tokens was reached, ``"memory"`` when the engine's memory was.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    policy_version: int
    stop: Literal["stop", "length", "memory"]


@dataclass(slots=True)
class Step:
    """One model call and what the environment made of it.

    Attributes:
        action: The sampled tokens.
        message: The same, as the environment saw it.
        observation: What the environment answered.
        observation_ids: The tokens that follow the action: the answer, and the opening of the next
            turn. Empty when the episode ended with this step.
        rewards: Process rewards by part, e.g. ``{"format": 0.1}``; kept apart until an algorithm
            combines them.
        state_key: The environment's name for the state in which the action was taken, equal where
            it calls two states the same; ``"start"`` for the first.
        events: What went wrong with tools in this step: ``"fault/timeout:search"`` (the
            infrastructure), ``"mistake/unknown_tool"`` (the agent), ``"noise/drop:search"``
            (injected).
        context_ids: Set when the environment rewrote the history before this step: all tokens that
            the policy had before it then, the prompt included.
        generate_seconds: Wall time waited for the engine.
        env_seconds: Wall time waited for the environment.
        reference_logprobs: Of each action token under the reference policy, where a KL term asks.
        old_logprobs: Of each action token under the policy that the update started from, as the
            learner sees it; ``None`` where the sampling ones stand for them.
        values: The critic's, of the state before each action token and, as one number more, of that
            after the last; ``None`` without a critic.
        advantages: Per action token; ``None`` until credit is assigned.
        value_targets: Per action token, what the critic should have said.
        ratios: Importance ratio per action token, new policy over the one the update started from
            (for GSPO that of the sequence), at the first update that used it; ``None`` if no update
            did.
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
    reference_logprobs: tuple[float, ...] | None = None
    old_logprobs: tuple[float, ...] | None = None
    values: tuple[float, ...] | None = None
    advantages: tuple[float, ...] | None = None
    value_targets: tuple[float, ...] | None = None
    ratios: tuple[float, ...] | None = None


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
    """It failed so that it should be played again."""
    discarded: int = 0
    """Number of earlier plays of this attempt that were thrown away."""
    discarded_events: tuple[str, ...] = ()
    """What went wrong in them."""
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
    """

    task: Task
    trajectories: list[Trajectory]

    @property
    def scored(self) -> list[Trajectory]:
        """The attempts that count: those with an outcome and at least one action."""
        return [t for t in self.trajectories if t.outcome is not None and t.steps]


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on the parts and nothing else, the same on every machine and in
    every process.
    """
    digest = hashlib.blake2b("\x1f".join(map(repr, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
