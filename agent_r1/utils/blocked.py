"""Finds code that blocks the event loop: an environment or tool that computes or waits in the loop
while all other episodes stand still. A watcher thread notices and names the code.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from agent_r1.errors import AgentR1Error

BEAT_SECONDS = 0.05
WORTH_TELLING = 0.5
"""Total seconds of blocking from which a place is named."""
MAX_SECONDS = 120.0
"""Longest block at once; then the code is interrupted, and its episode ends as a fault."""
MAX_IGNORED = 3
"""Interruptions that code may swallow before the process is ended (if ``MAY_END``)."""
MAY_END = False
"""Whether the process is the command line's; a notebook's process is never ended."""
_OURS = f"{Path(__file__).parent.parent}{os.sep}"
_raised = [0]
"""Number of interruptions raised so far; one still pending during a library call is not counted."""


class BlockedLoopError(AgentR1Error, RuntimeError):
    """Raised in code that has held up the event loop for ``MAX_SECONDS``."""

    def __init__(self, *words: object) -> None:
        super().__init__(*words)
        _raised[0] += 1


class Watch:
    """Watches one event loop after another, and keeps who held them up."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._longest: dict[str, float] = {}

    @contextmanager
    def over(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Watches a loop that is about to run in this thread."""
        stop = threading.Event()
        watcher = threading.Thread(
            target=self._watch, args=(loop, threading.get_ident(), stop), name="watch", daemon=True
        )
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()

    def held_up(self) -> list[str]:
        """Blocking code noticed since the last call, one line each."""
        seconds, longest = self._seconds, self._longest
        self._seconds, self._longest = defaultdict(float), {}
        return [
            f"{place} held up all episodes for {seconds[place]:.1f} s, {longest[place]:.1f} s at "
            "once: it works or waits in the event loop; await what it waits for, or make the tool "
            "a plain function ('def'), which gets a thread"
            for place in seconds
            if seconds[place] >= WORTH_TELLING
        ]

    def _watch(self, loop: asyncio.AbstractEventLoop, thread: int, stop: threading.Event) -> None:
        beaten = threading.Event()
        while not stop.wait(BEAT_SECONDS):
            beaten.clear()
            try:
                loop.call_soon_threadsafe(beaten.set)
            except RuntimeError:
                return  # the loop was closed
            last: str | None = None
            begun = counted = 0.0
            ignored, raised = 0, _raised[0]
            while not beaten.wait(BEAT_SECONDS) and not stop.is_set():
                frame = sys._current_frames().get(thread)
                place = _place(frame) if frame is not None else None
                now = time.monotonic()
                if place != last:
                    last, begun, counted = place, now - BEAT_SECONDS, now - BEAT_SECONDS
                if place is None:
                    continue
                self._note(place, now - counted, now - begun)
                counted = now
                if now - begun > MAX_SECONDS:
                    ignored, raised = ignored + (_raised[0] - raised), _raised[0]
                    if ignored >= MAX_IGNORED and MAY_END:
                        _end(place, ignored)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(BlockedLoopError)
                    )
                    begun = now
            if last is not None and not stop.is_set():
                now = time.monotonic()
                self._note(last, now - counted, now - begun)

    def _note(self, place: str, more: float, at_once: float) -> None:
        self._seconds[place] += more
        self._longest[place] = max(self._longest.get(place, 0.0), at_once)


def _end(place: str, ignored: int) -> None:
    """Ends the process: all episodes and Ctrl-C wait for code that swallows every exception."""
    print(
        f"agent-r1: {place} has blocked the event loop and swallowed {ignored} interruptions; the "
        "program was ended. Use 'await', or make it a plain 'def', and catch Exception, not "
        "BaseException. A run goes on from its last checkpoint with --resume",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _place(frame: FrameType | None) -> str | None:
    """Name of the outermost function that is neither the loop's nor ours; ``None`` where there is
    none.
    """
    below: list[FrameType] = []
    while frame is not None and not _is_loop(frame):
        below.append(frame)
        frame = frame.f_back
    if frame is None:
        return None  # the loop itself is at work, or somebody else is
    for found in reversed(below):
        name = found.f_code.co_filename
        if not name.startswith((_OURS, "<")) and "/asyncio/" not in name:
            where = f"{Path(name).name}, line {found.f_code.co_firstlineno}"
            return f"{found.f_code.co_qualname}() ({where})"
    return None


def _is_loop(frame: FrameType) -> bool:
    return frame.f_code.co_name == "_run" and "asyncio" in frame.f_code.co_filename
