"""The interface of every tool, and the result of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from agent_r1.tools.failure_policy import FailurePolicy, Health
from agent_r1.types import MalformedCall, ToolCall

ToolError = Literal[
    "malformed_call",
    "unknown_tool",
    "invalid_arguments",
    "rejected",
    "exception",
    "timeout",
    "crash",
    "unavailable",
]
"""Every way in which a call can fail, by name; the first four are the agent's own mistakes."""


AGENT_ERRORS = ("malformed_call", "unknown_tool", "invalid_arguments", "rejected")


@dataclass(slots=True, frozen=True)
class ToolResult:
    """What happened when a call was run.

    Attributes:
        call: The call as the agent wrote it.
        value: What the tool returned; ``None`` when it failed.
        error: Kind of failure, or ``None``.
        detail: The failure in words that the agent can act on.
        events: All that went wrong on the way, earlier tries included: ``"fault/timeout:search"``,
            ``"mistake/unknown_tool"``, ``"noise/drop:search"``.
    """

    call: ToolCall | MalformedCall
    value: Any = None
    error: ToolError | None = None
    detail: str = ""
    events: tuple[str, ...] = ()

    @property
    def by_agent(self) -> bool:
        """Whether the call failed by the agent's own mistake."""
        return self.error in AGENT_ERRORS


class Tool(Protocol):
    """A tool that a model can call: a ``FunctionTool``, or a tool in another process.

    Attributes:
        name: Name that the model writes.
        schema: As OpenAI-style JSON schema.
        timeout: Seconds until a call is given up, unless the policy says otherwise.
        failure: Policy for failed calls.
        health: Record of failures, shared by all episodes of a run.
        returns: The type of its results, ``Any`` if unknown.
        parallel: Whether its calls of one turn may run at the same time, in any order.
    """

    name: str
    timeout: float
    parallel: bool
    failure: FailurePolicy
    returns: Any

    @property
    def health(self) -> Health: ...

    @property
    def schema(self) -> dict[str, Any]: ...

    def check(self, call: ToolCall) -> ToolResult | None:
        """The mistake in the call, if there is one; the tool is not run."""
        ...

    async def run(self, call: ToolCall, timeout: float | None = None) -> ToolResult:
        """Runs a call. Never raises an ``Exception``."""
        ...
