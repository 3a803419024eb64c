"""Handling of tool failures that are not the agent's fault: the policy that the tool's author
declares and a recipe may change, and the state that all episodes share.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_serializer

from agent_r1.config.section import Section

OnFailure = Literal["observe", "resample", "exclude"]


MAX_HANGING = 16
"""Most threads of given-up calls per tool; at this number the tool is no longer called."""


class Breaker(Section):
    """When a tool is not called any more for a while; then one call tries whether it works again.

    Attributes:
        failures: Failures in a row after which it is not called.
        cooldown: Seconds for which it is not called.
    """

    failures: int = Field(5, ge=1)
    cooldown: float = Field(30.0, gt=0)


class FailurePolicy(Section):
    """``@tool(failure=FailurePolicy(...))``; ``[env.failure.<tool>]`` overrides single keys.

    The agent's own mistakes (a malformed call, wrong arguments, a call that the tool rejects) are
    not failures: they are never retried and always an observation.

    Attributes:
        timeout: Seconds for one try; by default the tool's own.
        retries: Further tries after a failed one, ``backoff`` seconds later, then twice that, ...
        backoff: Seconds between a failed try and the first further one.
        breaker: When to stop calling it; by default never.
        on_failure: What happens after the last try failed. ``observe``: the agent sees the failure.
            ``resample``: the episode is played again, at most three times, then excluded.
            ``exclude``: the episode is neither scored nor trained on.
    """

    timeout: float | None = Field(None, gt=0)
    retries: int = Field(0, ge=0, le=10)
    backoff: float = Field(0.1, ge=0)
    breaker: Breaker | None = None
    on_failure: OnFailure = "observe"

    @model_serializer(mode="wrap")
    def _only_what_is_set(self, serialize: Any) -> dict[str, Any]:
        """Writes only keys that were set, so that defaults stay defaults."""
        return {k: v for k, v in serialize(self).items() if k in self.model_fields_set}

    def changed_by(self, other: FailurePolicy | None) -> FailurePolicy:
        """This policy with the keys that ``other`` sets."""
        if other is None:
            return self
        return self.model_copy(update={k: getattr(other, k) for k in other.model_fields_set})


@dataclass
class Health:
    """Failure record of a tool, over all episodes of a run.

    Attributes:
        failures: Failures in a row.
        retry_at: Monotonic time before which a broken circuit lets no call through.
        hanging: Threads of calls that were given up and still run.
    """

    failures: int = 0
    retry_at: float = 0.0
    hanging: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def why_not(self, breaker: Breaker | None) -> str | None:
        """Reason not to call the tool now, or ``None``."""
        if self.hanging >= MAX_HANGING:
            return f"{self.hanging} earlier calls still hang"
        if breaker is None or self.failures < breaker.failures:
            return None
        now = time.monotonic()
        if now < self.retry_at:
            return f"it failed {self.failures} times in a row"
        self.retry_at = now + breaker.cooldown  # this call is the trial; others stay refused
        return None

    def note(self, failed: bool, breaker: Breaker | None) -> None:
        """Records the end of a call."""
        self.failures = self.failures + 1 if failed else 0
        if breaker is not None and self.failures >= breaker.failures:
            self.retry_at = time.monotonic() + breaker.cooldown

    @property
    def cooldown_left(self) -> float:
        """Seconds until a broken circuit lets a call through."""
        return max(0.0, self.retry_at - time.monotonic())

    def hangs(self, by: int) -> None:
        """A thread was given up (1) or has come to its end after all (-1)."""
        with self._lock:
            self.hanging += by

    def __reduce__(self) -> Any:
        """An isolated tool's process starts with an empty record: a lock cannot be pickled."""
        return Health, ()
