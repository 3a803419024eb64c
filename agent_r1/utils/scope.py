"""What one run or one agent owns while it lives: the event loop of its asynchronous work, and all
that its episodes share (search indexes, servers, connections, what was read from files). Made when
it is first needed, closed at the end, after an error and Ctrl-C too; two runs in one process see
nothing of each other.

    with scope():
        run_async(rollout.run(...))     # in the scope's loop; episodes call shared(key, make)
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar, cast

from agent_r1.errors import ExpiredError
from agent_r1.utils.blocked import Watch
from agent_r1.utils.log import LOG
from agent_r1.utils.text import describe, place_of
from agent_r1.utils.waiting import within

P = ParamSpec("P")
T = TypeVar("T")
CLOSE_SECONDS = 15.0
"""Time limit of closing one shared thing; then it is left behind, and said so."""
EXIT_SECONDS = 1.0
"""Time for tasks and threads that are left to obey their cancellation."""
_CURRENT: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("scope", default=None)


class _Slot:
    """A shared thing, or the place for one that is being made."""

    def __init__(self) -> None:
        self.lock, self.is_made, self.value = threading.RLock(), False, cast(Any, None)


class Scope:
    """See the module's docstring.

    Attributes:
        watch: Notices who holds up the event loop.
        closed: Whether ``close`` was called; used again, the scope begins anew.
    """

    def __init__(self) -> None:
        self.watch, self.closed = Watch(), False
        self._slots: dict[Hashable, _Slot] = {}
        self._made: list[Any] = []
        self._lock = threading.Lock()
        self._runner: asyncio.Runner | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._at_work = threading.Lock()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Makes this the scope of what is called within."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """The thing of that key, made by its first caller, closed by ``close``. Only those who want
        the same thing wait while it is made.
        """
        with self._lock:
            slot = self._slots.setdefault(key, _Slot())
        with slot.lock:
            if not slot.is_made:
                slot.value, slot.is_made = make(), True
                with self._lock:
                    self._made.append(slot.value)
            value: T = slot.value
            return value

    def run(self, work: Coroutine[Any, Any, T], *, watched: bool = True) -> T:
        """Runs ``work`` to its end in the scope's loop. Whoever comes while the loop is at work, as
        a tool that asks another agent does, gets a scope for that call, which shares nothing with
        this one.
        """
        if not self._at_work.acquire(blocking=False):
            with new_scope() as inner:
                return inner.run(work)
        try:
            with self.entered():
                runner = self._loop_runner()
                with self.watch.over(runner.get_loop()) if watched else contextlib.nullcontext():
                    return runner.run(work, context=contextvars.copy_context())
        finally:
            self._at_work.release()

    def beside(self, call: Callable[[], T]) -> T:
        """What ``call`` gives, which runs here, while the loop goes on in another thread with what
        earlier ``run`` left open.
        """
        ready, ends = threading.Event(), list[Callable[[], None]]()

        async def until_told() -> None:
            told, loop = asyncio.Event(), asyncio.get_running_loop()
            ends.append(lambda: cast(None, loop.call_soon_threadsafe(told.set)))
            ready.set()
            await told.wait()

        def target() -> None:
            try:
                self.run(until_told())
            finally:
                ready.set()

        context = contextvars.copy_context()
        thread = threading.Thread(
            target=context.run, args=(target,), name="agent-r1 loop", daemon=True
        )

        def stop() -> None:
            if is_begun:
                ready.wait()
                for end in ends:
                    end()
                thread.join()

        is_begun = True  # before it is: an interrupt may come in the middle of ``start``
        try:
            try:
                thread.start()
            except RuntimeError:  # no more threads
                is_begun = False
                raise
            return call()
        finally:
            try:
                stop()
            except KeyboardInterrupt:  # the second: what is cleaned up now needs the loop
                stop()
                raise

    def _loop_runner(self) -> asyncio.Runner:
        if self._runner is None:
            self._runner = asyncio.Runner()
            loop = self._runner.get_loop()
            loop.set_exception_handler(_tell)
            self._threads = ThreadPoolExecutor(thread_name_prefix="agent-r1")
            loop.set_default_executor(self._threads)
        return self._runner

    def close(self) -> None:
        """Closes what is shared, the last made first, then the loop; tells errors, raises none."""
        self.closed = True
        with self._lock:
            made, self._made, self._slots = self._made, [], {}
        if any(_close_of(value) is not None for value in made):
            # Unwatched: at the end of the process no more threads can be started.
            _anywhere(lambda: self.run(_close_all(made), watched=False))
        if self._runner is not None and not self._runner.get_loop().is_running():
            runner, self._runner = self._runner, None
            _anywhere(functools.partial(_end, runner.get_loop(), self._threads))


def current_scope() -> Scope | None:
    """The scope that the caller is in, if any."""
    return _CURRENT.get()


@contextlib.contextmanager
def new_scope() -> Iterator[Scope]:
    """A scope of the caller's own, closed at the end."""
    made = Scope()
    try:
        with made.entered():
            yield made
    finally:
        made.close()


@contextlib.contextmanager
def scope() -> Iterator[Scope]:
    """The scope that the caller is in; without one, a new one that is closed at the end."""
    if (here := current_scope()) is not None:
        yield here
        return
    with new_scope() as made:
        yield made


def shared(key: Hashable, make: Callable[[], T]) -> T:
    """What the current scope has under ``key``, made by the first who asks and closed (``aclose``
    or ``close``, plain or asynchronous) with the scope. A run is a scope, an agent too; outside of
    any (``with scope():`` in a notebook makes one) every caller gets a thing of his own.
    """
    here = current_scope()
    return make() if here is None else here.shared(key, make)


def held_up() -> list[str]:
    """Who has held up the current scope's event loop since the last time, a line each."""
    here = current_scope()
    return [] if here is None else here.watch.held_up()


def kept(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function so that a scope calls it once for the same arguments, given in the same
    way; they must be hashable.
    """

    @functools.wraps(function)
    def once(*args: P.args, **kwargs: P.kwargs) -> T:
        key = (function, args, tuple(kwargs.items()))
        return shared(key, functools.partial(function, *args, **kwargs))

    return once


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Runs ``work`` to its end in the loop of the current scope; also from within a running loop (a
    notebook), then in a thread beside it.
    """

    def run() -> T:
        with scope() as here:
            return here.run(work)

    return _anywhere(run)


def beside(call: Callable[[], T]) -> T:
    """What ``call`` gives; tasks that are open in the current scope's loop go on meanwhile."""
    here = current_scope()
    return call() if here is None else here.beside(call)


def _anywhere(call: Callable[[], T]) -> T:
    """What ``call`` gives, which is run in another thread if an event loop runs in this one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return call()
    result: list[T] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            result.append(call())
        except BaseException as error:  # raised again below, in the caller's thread
            failure.append(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(target,), name="agent-r1")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


async def _close_all(made: list[Any]) -> None:
    for value in reversed(made):
        close = _close_of(value)
        if close is None:
            continue
        try:
            await within(CLOSE_SECONDS, functools.partial(_closed, close))
        except ExpiredError:
            LOG.warning("%s is not closed in %g s", type(value).__name__, CLOSE_SECONDS)
        except Exception as error:  # the author's code
            LOG.warning("%s.close(): %s%s", type(value).__name__, describe(error), place_of(error))


def _close_of(value: Any) -> Callable[[], Any] | None:
    """``aclose``, as async clients call it, or ``close``; a column of a table is neither."""
    found = (getattr(value, name, None) for name in ("aclose", "close"))
    return next((close for close in found if callable(close)), None)


async def _closed(close: Callable[[], Any]) -> None:
    result = close()
    if inspect.isawaitable(result):
        await result


def _tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs errors that foreign code left behind: of a task that nobody awaited, of a callback."""
    error = context.get("exception")
    why = f": {describe(error)}{place_of(error)}" if isinstance(error, BaseException) else ""
    LOG.warning("%s%s", context.get("message"), why)


def _end(loop: asyncio.AbstractEventLoop, threads: ThreadPoolExecutor | None) -> None:
    """Cancels all tasks, waits at most ``EXIT_SECONDS``, and closes the loop."""
    if loop.is_running() or loop.is_closed():
        return
    loop.set_exception_handler(lambda *_: None)  # nobody reads it any more
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left, timeout=EXIT_SECONDS))
    loop.run_until_complete(loop.shutdown_asyncgens())
    if threads is not None:
        try:
            ending = threading.Thread(target=threads.shutdown, daemon=True)
            ending.start()
            ending.join(EXIT_SECONDS)
        except RuntimeError:  # the end of the process
            threads.shutdown(wait=False)
    loop.close()
