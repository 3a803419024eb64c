"""Failures of an environment, and of all that is its author's, as faults of one episode alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from agent_r1.errors import ConfigError, ExpiredError, ToolFailureError
from agent_r1.utils.text import describe
from agent_r1.utils.waiting import within

T = TypeVar("T")


class FaultError(Exception):
    """The environment or its scorer failed; ``resample``: the episode should be played again."""

    def __init__(
        self, message: str, *, resample: bool = False, events: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.resample, self.events = resample, events


class OutOfTimeError(Exception):
    """The episode's time limit struck while the environment worked."""


async def guarded(work: Callable[[], Awaitable[T]], seconds: float, what: str) -> T:
    """Waits for the environment; its exceptions become faults of this episode alone."""
    with faults(what):
        try:
            return await within(seconds, work)
        except ExpiredError as error:
            raise OutOfTimeError from error


@contextmanager
def faults(what: str) -> Iterator[None]:
    """Exceptions of the environment's author, here and in what it returned, become faults."""
    try:
        yield
    except (FaultError, OutOfTimeError, ConfigError):
        raise
    except ToolFailureError as error:
        raise FaultError(
            f"{what}: {error}", resample=error.resample, events=error.events
        ) from error
    except Exception as error:
        raise FaultError(f"{what}: {describe(error)}{_hint(error)}") from error


def _hint(error: Exception) -> str:
    """What helps where a client was made in one run and used in the next."""
    if "loop" not in str(error) or not isinstance(error, RuntimeError):
        return ""
    return (
        "; something was made in another event loop, in a run before this one: make it by "
        "agent_r1.shared(key, make), once a run"
    )
