"""Turns the calls of an action into results: checks, the circuit breaker, noise, the cassette,
retries. One dispatcher per episode.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from agent_r1.config.section import nearest
from agent_r1.errors import ConfigError, ToolFailureError
from agent_r1.tools.base import Tool, ToolResult
from agent_r1.tools.cassette import Cassette, Slot
from agent_r1.tools.failure_policy import FailurePolicy
from agent_r1.tools.noise import Noise
from agent_r1.types import MalformedCall, ToolCall


class Dispatcher:
    """Runs calls of one episode.

    Args:
        tools: By name.
        failure: Policies by tool name; they override those that tools declare.
        noise: Injected noise, if any.
        cassette: Recorded results, used instead of calling a tool, if any.
    """

    def __init__(
        self,
        tools: Mapping[str, Tool],
        failure: Mapping[str, FailurePolicy] | None = None,
        noise: Noise | None = None,
        cassette: Cassette | None = None,
    ) -> None:
        self._tools, self._noise, self._cassette = tools, noise, cassette
        self._failure = dict(failure or {})
        for name in self._failure:
            if name not in tools:
                raise ConfigError(f"env.failure.{name}: no such tool{nearest(name, [*tools])}")
        self._num_calls = 0
        self._slots: dict[int, Slot] = {}

    async def run(self, calls: Sequence[ToolCall | MalformedCall]) -> list[ToolResult]:
        """Runs the calls of one action in the order written, adjacent calls of parallel tools at
        the same time; results are in the order of the calls.

        Raises:
            ToolFailureError: A tool failed and its policy discards the episode; later calls
                are not made.
        """
        numbered = list(enumerate(calls, self._num_calls))
        self._num_calls += len(calls)
        done: list[ToolResult] = []
        for parallel, neighbours in itertools.groupby(numbered, lambda n: self._is_parallel(n[1])):
            runs = [self._run(call, number) for number, call in neighbours]
            turns = [runs] if parallel else [[run] for run in runs]
            for index, turn in enumerate(turns):
                results = await asyncio.gather(*turn, return_exceptions=True)
                done += [result for result in results if isinstance(result, ToolResult)]
                failed = [result for result in results if isinstance(result, BaseException)]
                if failed:
                    for run in itertools.chain(*turns[index + 1 :]):
                        run.close()
                    raise _worst(failed, [event for result in done for event in result.events])
        return done

    def _is_parallel(self, call: ToolCall | MalformedCall) -> bool:
        tool = self._tools.get(call.name) if isinstance(call, ToolCall) else None
        return tool is None or tool.parallel  # a call that cannot run has no order

    async def _run(self, call: ToolCall | MalformedCall, number: int) -> ToolResult:
        """A call with its retries; ``events`` names all that went wrong on the way."""
        if isinstance(call, MalformedCall):
            return _mistake(ToolResult(call, error="malformed_call", detail=call.reason))
        if (tool := self._tools.get(call.name)) is None:
            detail = f"there is no tool {call.name!r}; the tools are: {', '.join(self._tools)}"
            return _mistake(ToolResult(call, error="unknown_tool", detail=detail))
        if (wrong := tool.check(call)) is not None:
            return _mistake(wrong)
        policy = tool.failure.changed_by(self._failure.get(call.name))
        events: list[str] = []
        for attempt in range(1 + policy.retries):
            if attempt:
                await asyncio.sleep(policy.backoff * 2 ** (attempt - 1))
            result = await self._try(tool, call, policy, number, attempt)
            if result.by_agent:
                return _mistake(result, *events, *result.events)
            events += result.events
            if result.error is None:
                break
        real = result.error is not None and not any(e.startswith("noise/") for e in result.events)
        if result.error == "unavailable" and policy.on_failure == "resample":
            await asyncio.sleep(tool.health.cooldown_left)  # else a replay would fail the same way
        if real and policy.on_failure != "observe":
            raise ToolFailureError(
                f"{call.name}: {result.error}: {result.detail}",
                resample=policy.on_failure == "resample",
                events=tuple(events),
            )
        return dataclasses.replace(result, events=tuple(events))

    async def _try(
        self, tool: Tool, call: ToolCall, policy: FailurePolicy, number: int, attempt: int
    ) -> ToolResult:
        timeout = policy.timeout or tool.timeout
        kind = self._noise.draw(number, attempt) if self._noise is not None else None
        event = (f"noise/{kind}:{call.name}",)
        if kind == "fail":
            detail = f"{call.name} has an internal error, try again later"
            return ToolResult(call, error="exception", detail=detail, events=event)
        if kind == "timeout":
            detail = f"{call.name} gave no result within {timeout:g} seconds"
            return ToolResult(call, error="timeout", detail=detail, events=event)
        if kind == "late":
            assert self._noise is not None
            await asyncio.sleep(self._noise.settings.late_seconds)
        result = await self._call(tool, call, number, policy, timeout)
        if self._noise is not None and kind in ("drop", "garble") and result.error is None:
            spoilt = self._noise.spoil(kind, result.value, number, attempt)
            changed = spoilt != result.value  # a number, for example, stays as it is
            return dataclasses.replace(result, value=spoilt, events=event if changed else ())
        if kind == "late" and (result.error is None or result.by_agent):
            return dataclasses.replace(result, events=event)
        return result

    async def _call(
        self, tool: Tool, call: ToolCall, number: int, policy: FailurePolicy, timeout: float
    ) -> ToolResult:
        """The cassette's result, or the tool's unless its circuit is broken."""
        if self._cassette is not None:
            if number not in self._slots:  # one for all tries of the call
                self._slots[number] = self._cassette.slot(call)
            slot = self._slots[number]
            if (kept := self._cassette.replay(slot, tool, call)) is not None:
                return kept
        if reason := tool.health.why_not(policy.breaker):
            detail = f"{tool.name} is not available: {reason}"
            event = f"fault/unavailable:{tool.name}"
            return ToolResult(call, error="unavailable", detail=detail, events=(event,))
        result = await tool.run(call, timeout)
        failed = result.error is not None and not result.by_agent
        tool.health.note(failed, policy.breaker)
        if self._cassette is not None and not failed:
            self._cassette.keep(slot, tool, result)
        events = (*result.events, f"fault/{result.error}:{tool.name}")
        return dataclasses.replace(result, events=events if failed else result.events)


def _worst(failed: Sequence[BaseException], events: Sequence[str]) -> BaseException:
    """The error to raise when calls failed for good: other errors before ``exclude`` before
    ``resample``. A tool's error carries the events of the whole action.
    """
    policies = [error for error in failed if isinstance(error, ToolFailureError)]
    if len(policies) < len(failed):
        return next(error for error in failed if error not in policies)
    worst = min(policies, key=lambda error: error.resample)
    worst.events = (*(e for error in policies for e in error.events), *events)
    return worst


def _mistake(result: ToolResult, *earlier: str) -> ToolResult:
    """Marks an agent's mistake; invented tool names are left out, or each would be a metric."""
    known = isinstance(result.call, ToolCall) and result.error != "unknown_tool"
    tool = f":{result.call.name}" if known and isinstance(result.call, ToolCall) else ""
    return dataclasses.replace(result, events=(*earlier, f"mistake/{result.error}{tool}"))
