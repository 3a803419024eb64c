"""Every error that a user may meet, and may catch."""

from __future__ import annotations


class AgentR1Error(Exception):
    """Base of all errors of this package."""


class ConfigError(AgentR1Error, ValueError):
    """The user's input cannot be used; the message says where, what and how to mend it."""


class RunError(AgentR1Error, RuntimeError):
    """A run, or a part of it, failed; the message names the first cause that was seen."""


class CallError(AgentR1Error):
    """Raised by a tool for a call that the agent should have written otherwise: a name that does
    not exist, a query that is not valid. The agent sees the message; the call is its mistake.
    """


class EnvCheckError(AgentR1Error, ValueError):
    """The environment breaks its contract; the message lists every violation found."""


class ToolFailureError(AgentR1Error, RuntimeError):
    """A tool failed and its policy discards the episode; with ``resample``, the episode is played
    again. ``events``: all tool events of the action.
    """

    def __init__(self, message: str, *, resample: bool, events: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.resample = resample
        self.events = events


class UnseenCallError(AgentR1Error, RuntimeError):
    """A call that the cassette has no record of; the episode is excluded."""


class NotTextError(AgentR1Error, ValueError):
    """A value that cannot be shown as text; the message says what it is."""


class ExpiredError(AgentR1Error, TimeoutError):
    """A time limit was exceeded."""


class ForeignError(AgentR1Error, RuntimeError):
    """Replaces an exit or the like (no ``Exception``) that must not end the run; keeps the name of
    its type.
    """
