"""Every error that a user may meet, and may catch."""

from __future__ import annotations


class AgentR1Error(Exception):
    """Base of all errors of ours."""


class ConfigError(AgentR1Error, ValueError):
    """The user's input cannot be used; the message says where, what and how to mend it."""


class RunError(AgentR1Error, RuntimeError):
    """A run, or a part of it, came to nothing; the message says what was seen first."""


class CallError(AgentR1Error):
    """Raised by a tool for a call that the agent should have written otherwise: a name that does
    not exist, a query that is not valid. The agent sees the message; it counts as its mistake.
    """


class EnvCheckError(AgentR1Error, ValueError):
    """The environment breaks its contract; the message lists every way found."""


class ToolFailureError(AgentR1Error, RuntimeError):
    """A tool failed and its policy is that the episode does not count; ``resample``: it is played
    again. ``events`` are those of the whole action.
    """

    def __init__(self, message: str, *, resample: bool, events: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.resample = resample
        self.events = events


class UnseenCallError(AgentR1Error, RuntimeError):
    """A call that the cassette has not got; the episode is excluded."""


class NotTextError(AgentR1Error, ValueError):
    """A value that cannot be shown as text; the message says what it is."""


class ExpiredError(AgentR1Error, TimeoutError):
    """The time that was given is over."""


class ForeignError(AgentR1Error, RuntimeError):
    """Something was raised that is no ``Exception`` and must not end the run; shown under its own
    name.
    """
