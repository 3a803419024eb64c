"""Waits for foreign code within a time limit, even if that code ignores cancellation, and contains
everything that it raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import queue
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from agent_r1.errors import ExpiredError, ForeignError
from agent_r1.utils.log import LOG
from agent_r1.utils.text import describe, is_library

T = TypeVar("T")


GRACE_SECONDS = 0.5
"""Seconds that a cancelled task gets to clean up; then the task is abandoned."""


_ABANDONED: set[asyncio.Task[Any]] = set()
"""Tasks that ignored cancellation; kept here, or they would be garbage-collected."""


def no_hangs(by: int) -> None:
    """Ignores the notice that a call was given up (1) or has ended after all (-1)."""


async def within(
    seconds: float, work: Callable[[], Awaitable[T]], hangs: Callable[[int], None] = no_hangs
) -> T:
    """Awaits ``work()`` in a new task and returns its result.

    Args:
        seconds: Time limit. Then the task is cancelled, and abandoned if it does not obey.
        work: Is called in the task.
        hangs: Told 1 when a task is abandoned, and -1 when it comes to its end.

    Raises:
        ExpiredError: The time is over.
        ForeignError: Replaces what is no ``Exception``: an exit, a cancellation by the work itself.
    """
    task = asyncio.ensure_future(_caught(work))
    try:
        done, _ = await asyncio.wait({task}, timeout=max(seconds, 0.0))
    except asyncio.CancelledError:
        await _give_up(task, hangs)
        raise
    if not done:
        await _give_up(task, hangs)
        raise ExpiredError
    value, error = task.result()
    if error is None:
        return value  # type: ignore[return-value]
    if isinstance(error, Exception):
        raise error
    raise _foreign(error) from error


@contextlib.contextmanager
def telling(what: str, every: float = 60.0) -> Iterator[None]:
    """Logs ``what`` and the time waited, every ``every`` seconds."""
    done = threading.Event()

    def tell() -> None:
        seconds = every
        while not done.wait(every):
            LOG.warning("%s (%.0f s)", what, seconds)
            seconds += every

    threading.Thread(target=tell, name="telling", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def contained(call: Callable[[], T]) -> T:
    """Calls foreign code and returns its result; a ``ForeignError`` replaces what is no
    ``Exception``.
    """
    try:
        return call()
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise _foreign(error) from error


def _foreign(error: BaseException) -> ForeignError:
    kind: type[ForeignError] = type(type(error).__name__, (ForeignError,), {})
    return kind(*error.args).with_traceback(error.__traceback__)


async def _caught(work: Callable[[], Awaitable[T]]) -> tuple[T | None, BaseException | None]:
    """The result or the error; Ctrl-C and our own cancellation pass through."""
    try:
        return await work(), None
    except KeyboardInterrupt:
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return None, error
    except BaseException as error:
        return None, error


async def _give_up(task: asyncio.Task[Any], hangs: Callable[[int], None]) -> None:
    task.cancel()
    await asyncio.wait({task}, timeout=GRACE_SECONDS)
    if task.done():
        return
    hangs(1)
    _ABANDONED.add(task)

    def ended(task: asyncio.Task[Any]) -> None:
        _ABANDONED.discard(task)
        hangs(-1)
        if not task.cancelled():
            task.exception()  # retrieved, or it would be logged

    task.add_done_callback(ended)


class OwnThread:
    """A daemon thread that runs one call after another, so that state bound to it (a SQLite
    connection, ``threading.local``) can be used from call to call. A cancelled call is abandoned
    with its thread; the next call gets a new thread.

    Attributes:
        num_lost: Threads that were abandoned, and with them the state bound to them.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] | None = None
        self._thread: threading.Thread | None = None
        self.num_lost = 0

    async def run(self, call: Callable[[], T], hangs: Callable[[int], None] = no_hangs) -> T:
        """Returns the result of ``call``. Cancelling abandons the thread: ``hangs(1)`` is called
        then, and ``hangs(-1)`` when the call ends.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        context = contextvars.copy_context()
        lock, state = threading.Lock(), {"ended": False, "given up": False}

        def mark(what: str) -> bool:
            """Records one of the two events; true once both have happened."""
            with lock:
                state[what] = True
                return all(state.values())

        def settle(value: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(value)
            elif isinstance(error, Exception) and not isinstance(error, StopIteration):
                future.set_exception(error)
            else:  # SystemExit and the like must not end the run
                future.set_exception(RuntimeError(describe(error)))

        def job() -> None:
            value, error = None, None
            try:
                value = context.run(call)
            except BaseException as caught:  # handed over, not swallowed
                error = caught
            if mark("ended"):
                hangs(-1)
            if not loop.is_closed():
                try:
                    loop.call_soon_threadsafe(settle, value, error)
                except RuntimeError:
                    return  # the loop closed meanwhile: nobody waits for an abandoned call

        self._put(job)
        try:
            return await future
        except asyncio.CancelledError:
            if not future.done() or future.cancelled():
                hangs(1)
                if mark("given up"):
                    hangs(-1)
                self._abandon()
            raise

    def wait(self, call: Callable[[], T], seconds: float = 60.0) -> T:
        """As ``run``, but blocking, for callers without an event loop: a constructor."""
        outcome: list[tuple[bool, Any]] = []
        context, done = contextvars.copy_context(), threading.Event()

        def job() -> None:
            try:
                outcome.append((True, context.run(call)))
            except BaseException as error:  # raised again below, in the caller's thread
                outcome.append((False, error))
            done.set()

        self._put(job)
        if not done.wait(seconds):
            self._abandon()
            raise ExpiredError(f"not done within {seconds:g} seconds")
        ok, value = outcome[0]
        if ok:
            return value  # type: ignore[no-any-return]
        raise value

    def close(self) -> None:
        """Lets the thread end after its last call."""
        if self._calls is not None:
            self._calls.put(None)
            self._calls = self._thread = None

    def _put(self, job: Callable[[], None]) -> None:
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            weakref.finalize(self, self._calls.put, None)
            self._thread = threading.Thread(
                target=_work, args=(self._calls,), name=self._name, daemon=True
            )
            self._thread.start()
        self._calls.put(job)

    def _abandon(self) -> None:
        thread = self._thread
        self.num_lost += 1
        if thread is not None and thread.ident is not None and _is_in_own_code(thread.ident):
            # Ends a loop in Python code; a call that waits inside a library runs until it returns.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
            )
        self.close()


def _is_in_own_code(thread: int) -> bool:
    """Whether a thread runs the user's Python code, which an exception may interrupt anywhere; a
    library may break, above all one that is being imported.
    """
    frame = sys._current_frames().get(thread)
    if frame is None or is_library(frame.f_code.co_filename):
        return False
    while frame is not None:
        if "importlib" in frame.f_code.co_filename:
            return False
        frame = frame.f_back
    return True


def _work(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while True:
        job = calls.get()
        if job is None:
            return
        job()
        job = None  # else its references would live as long as the thread waits


async def in_thread(call: Callable[[], T], name: str, hangs: Callable[[int], None] = no_hangs) -> T:
    """Runs ``call`` in a new daemon thread. Cancelling abandons the thread (a pool would wait for
    it at exit); ``hangs`` as in ``OwnThread.run``.
    """
    thread = OwnThread(name)
    try:
        return await thread.run(call, hangs)
    finally:
        thread.close()


EPISODE_THREAD: contextvars.ContextVar[OwnThread | None] = contextvars.ContextVar(
    "episode_thread", default=None
)
"""Thread for the synchronous code of the current episode, if there is one."""
