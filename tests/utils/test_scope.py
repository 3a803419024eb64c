"""Scopes: what is shared is made once, closed at the end, and stands in nobody's way."""

import asyncio
import contextlib
import gc
import logging
import threading
import time

import httpx
import pytest

import agent_r1
from agent_r1.run.console import console
from agent_r1.utils.log import LOG
from agent_r1.utils.scope import Scope, beside, kept, run_async, scope, shared


class Thing:
    def __init__(self, log, name):
        self.log, self.name = log, name

    async def close(self):
        await asyncio.sleep(0)
        self.log.append(self.name)
        if self.name == "bad":
            raise ValueError("no")


def test_what_is_shared_is_closed_last_made_first_whatever_one_of_them_does(caplog):
    log = []
    with contextlib.suppress(KeyError), scope():
        for name in ("a", "bad", "c"):
            assert shared(name, lambda name=name: Thing(log, name)).name == name
        assert shared("a", lambda: Thing(log, "again")).name == "a"
        raise KeyError
    assert log == ["c", "bad", "a"]
    assert "Thing.close(): ValueError: no" in caplog.text
    assert shared("a", lambda: 1) == 1, "outside of a scope nothing is kept"


def test_an_async_client_is_closed_by_the_name_it_has_for_it():
    with scope():
        client = shared("client", httpx.AsyncClient)
        assert not client.is_closed
    assert client.is_closed


class Table:
    """As a table of prices, whose column is found as an attribute."""

    @property
    def close(self):
        class Column:
            def __bool__(self):
                raise ValueError("the truth of a column is ambiguous")

        return Column()


def test_what_only_looks_as_if_it_could_be_closed_is_left_alone(caplog):
    with scope():
        shared("prices", Table)
    assert not caplog.text


def test_a_slow_make_holds_up_only_those_who_want_the_same():
    async def work():
        def slow():
            time.sleep(0.5)
            return "slow"

        thread = asyncio.create_task(asyncio.to_thread(shared, "slow", slow))
        await asyncio.sleep(0.05)
        start = time.perf_counter()
        assert shared("quick", lambda: "quick") == "quick"
        quick = time.perf_counter() - start
        return quick, await thread, shared("slow", lambda: "another")

    with scope():
        quick, first, again = run_async(work())
    assert quick < 0.3
    assert first == again == "slow"


def test_kept_functions_run_once_a_scope():
    calls = []

    @kept
    def read(path):
        calls.append(path)
        return len(calls)

    with scope():
        assert [read("x"), read("x"), read("y")] == [1, 1, 2]
    with scope():
        assert read("x") == 3, "a file may have changed between two runs"


def test_a_scope_that_was_closed_begins_anew_and_ends_again():
    before = {thread.name for thread in threading.enumerate()}
    own, log = Scope(), []
    for _ in range(2):
        with own.entered():
            shared("thing", lambda: Thing(log, "a"))
            assert run_async(asyncio.sleep(0, "done")) == "done"
        own.close()
    assert log == ["a", "a"]
    gc.collect()
    assert {thread.name for thread in threading.enumerate()} <= before


def test_the_console_speaks_alone_and_quiet_means_warnings(capsys):
    root = logging.getLogger()
    handler = logging.StreamHandler()
    root.addHandler(handler)
    try:
        with console(quiet=True):
            LOG.info("progress")
            LOG.warning("watch out")
        with console():
            LOG.info("progress")
    finally:
        root.removeHandler(handler)
    said = capsys.readouterr()
    assert said.err.count("watch out") == 1
    assert "progress" not in said.err
    assert said.out.count("progress") == 1


def test_an_agent_outlives_the_run_that_it_was_made_in_and_closes_what_it_opens():
    before = {thread.name for thread in threading.enumerate()}
    with scope():
        agent = agent_r1.Agent(agent_r1.load_recipe("hopworld")[0])
        task = agent.tasks()[0]
        first = agent.play(task)
        agent.close()  # the run's to close
        assert agent.play(task).steps[0].action.token_ids == first.steps[0].action.token_ids
    with agent:
        assert agent.play(task).steps[0].action.token_ids == first.steps[0].action.token_ids
    assert {thread.name for thread in threading.enumerate()} <= before


@pytest.mark.parametrize("later", [0, 1])
def test_interrupts_of_work_beside_the_loop_leave_the_loop_to_who_cleans_up(later, monkeypatch):
    """The first Ctrl-C comes during the work, ``later`` ones while its end is waited for."""
    interrupts, join = [KeyboardInterrupt] * later, threading.Thread.join

    def interrupted(thread, *args):
        if thread.name == "agent-r1 loop" and interrupts:
            raise interrupts.pop()
        join(thread, *args)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    ticks = []

    async def tick():
        while True:
            ticks.append(asyncio.get_running_loop())
            await asyncio.sleep(0.01)

    async def begin():
        return asyncio.get_running_loop(), asyncio.ensure_future(tick())

    def work():
        before = len(ticks)
        while len(ticks) < before + 3:
            time.sleep(0.01)
        raise KeyboardInterrupt

    async def end(task):
        task.cancel()
        return asyncio.get_running_loop()

    with scope():
        loop, task = run_async(begin())
        with pytest.raises(KeyboardInterrupt):
            beside(work)
        assert not [t for t in threading.enumerate() if t.name == "agent-r1 loop"]
        assert run_async(end(task)) is loop
    assert not interrupts
