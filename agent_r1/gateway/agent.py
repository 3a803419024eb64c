"""An agent that exists already, as an environment: a function or a command that asks a language
model over HTTP is played with the gateway in that model's place.

    [env]
    name = "agent"
    run = "my_agent.py:run"                # or: command = ["node", "agent.js", "{question}"]
    tasks = "questions.jsonl"              # or "my_agent.py:tasks", a function of the split
    score = "my_agent.py:score"            # unless run returns the reward, or posts it
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import IO, Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from agent_r1.config.registry import found_from_here, load_object
from agent_r1.config.section import NamedSection
from agent_r1.errors import ConfigError
from agent_r1.gateway.server import MODEL, Gateway
from agent_r1.gateway.session import ClientSession
from agent_r1.rollout.conversation import Conversation
from agent_r1.rollout.faults import FaultError, OutOfTimeError, faults
from agent_r1.tasks.from_files import load_tasks
from agent_r1.tasks.row_file import BadRows
from agent_r1.tasks.splits import deal
from agent_r1.types import CallResult, Outcome, StopReason, Task
from agent_r1.utils.scope import shared
from agent_r1.utils.text import clean
from agent_r1.utils.waiting import in_thread

GIVEN = ("task", "base_url", "api_key", "client")
"""What a function may have as parameters."""
END_SECONDS = 5.0
"""Time for an agent to end when its own is over; then it is left behind."""
MAX_OUTPUT = 64 * 2**10
"""Bytes of a command's output that are kept, the last."""
Reference = Annotated[str, AfterValidator(found_from_here)]
"""``file.py:name`` with the file's whole path, found beside the recipe or here."""


class AgentEnv:
    """See the module's docstring. An agent that fails excludes its episode; one that gives up since
    a limit was reached does not, and without a score or a reward it gets 0.
    """

    class Settings(NamedSection):
        """Either ``run`` or ``command``.

        Attributes:
            run: A function, plain or ``async``, with some of the parameters ``task``, ``base_url``,
                ``api_key`` and ``client`` (of the package openai). It returns the reward (a number
                or an ``Outcome``) or, with ``score``, the answer.
            command: A program and its arguments, where ``{question}`` and ``{id}`` are replaced.
                Its environment has ``OPENAI_BASE_URL``, ``OPENAI_API_KEY``,
                ``ANTHROPIC_BASE_URL``, ``ANTHROPIC_API_KEY`` and ``AGENT_R1_TASK`` (JSON). Its
                output is its answer.
            tasks: A JSONL file (id, question, answer, and further data), or a function of the split
                (``train``, ``validation``, ``test``) that gives tasks.
            score: A function of task and answer, which gives a number or an ``Outcome``.
            holdout: Share of a file's tasks for validation, and the same again for test.
            bad_rows: Treatment of rows that cannot be used: ``error``, or ``skip``.
        """

        name: str = "agent"
        run: Reference | None = None
        command: tuple[str, ...] = ()
        tasks: Reference
        score: Reference | None = None
        holdout: float = Field(0.1, gt=0, lt=0.5)
        bad_rows: BadRows = "error"

        @model_validator(mode="after")
        def _one(self) -> Self:
            if (self.run is None) == (not self.command):
                raise ValueError("name the agent by env.run or by env.command, one of the two")
            return self

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._run = settings.run and _function_of(settings.run)
        self._score = settings.score and load_object(settings.score, what="env.score")
        self._session: ClientSession | None = None
        self._task: Task | None = None
        self._answer: Any = None

    @classmethod
    def tasks(cls, settings: Any, split: str) -> Sequence[Task]:
        if ".py:" not in settings.tasks:
            found = load_tasks(settings.tasks, "env.tasks", settings.bad_rows)
            return deal(found, split, settings.holdout)
        given: Sequence[Task] = load_object(settings.tasks, what="env.tasks")(split)
        return given

    async def lead_conversation(
        self, task: Task, seed: int, conversation: Conversation
    ) -> StopReason:
        """Has the agent do the task; see ``Leader``."""
        gateway = shared("gateway", Gateway)
        await gateway.start()
        self._task = task
        async with gateway.session(conversation) as (key, self._session):
            try:
                self._answer = await self._in_time(task, gateway.url, key, conversation)
            except OutOfTimeError as error:
                if (why := conversation.session.outage) is not None:
                    raise FaultError(f"engine: {why}") from error
                self._session.stopped = StopReason.MAX_TIME
            except FaultError as error:
                if self._session.error is None and not _is_of_limit(error, self._session):
                    raise
                self._session.stopped = self._session.met
            if self._session.error is not None:
                raise self._session.error
            return self._session.stopped or StopReason.DONE

    async def outcome(self) -> Outcome:
        """By ``score``, else by what the agent posted, else by what it returned."""
        assert self._session is not None
        given = self._answer
        if self._score:
            answer = "" if given is None else given
            score = functools.partial(self._score, self._task, answer)
            given = await (score() if inspect.iscoroutinefunction(self._score) else _apart(score))
        elif self._session.outcome is not None:
            return self._session.outcome
        if isinstance(given, Outcome):
            return given
        if self._session.stopped is not None and not hasattr(given, "__float__"):
            return Outcome(0.0, False)
        if not hasattr(given, "__float__"):
            raise TypeError(
                f"the agent's reward is unknown: {given!r:.80} is no number and no Outcome; return "
                "it, post it to /reward, or name a function as env.score"
            )
        return Outcome(float(given), float(given) >= 1.0)

    async def close(self) -> None:
        return None

    def taken_up(self) -> list[str]:
        return [] if self._session is None else self._session.taken_up()

    # The agent's ways --------------------------------------------------------------------------

    async def _in_time(self, task: Task, url: str, key: str, conversation: Conversation) -> Any:
        """What the agent gives; ``OutOfTimeError`` if the episode's time is over before."""
        playing = asyncio.ensure_future(self._play(task, url, key))
        with faults("agent"):
            try:
                return await conversation.in_time(playing)
            except TimeoutError as error:
                if playing.done():  # the agent's own
                    raise
                raise OutOfTimeError from error
            finally:
                playing.cancel()
                await asyncio.wait({playing}, timeout=END_SECONDS)

    async def _play(self, task: Task, url: str, key: str) -> Any:
        if self.settings.command:
            return await self._command(task, url, key)
        run: Callable[..., Any] = self._run  # type: ignore[assignment]
        is_async = inspect.iscoroutinefunction(run)
        names = inspect.signature(run).parameters
        given: dict[str, Any] = {"task": task, "base_url": url, "api_key": key}
        wants_client = "client" in names
        async with _client(url, key, is_async=is_async) if wants_client else _nothing() as client:
            given["client"] = client
            call = functools.partial(run, **{name: given[name] for name in names})
            return await (call() if is_async else _apart(call))

    async def _command(self, task: Task, url: str, key: str) -> str:
        """The program's output; it is killed, with what it started, when we stop waiting."""
        words = {"{question}": task.question, "{id}": task.id}
        command = [
            re.sub(r"\{question\}|\{id\}", lambda found: words[found[0]], word)
            for word in self.settings.command
        ]
        base = url.removesuffix("/v1")
        environment = {
            "NO_PROXY": f"127.0.0.1,{os.environ.get('NO_PROXY', '')}",
            "no_proxy": f"127.0.0.1,{os.environ.get('no_proxy', '')}",
            "OPENAI_BASE_URL": url,
            "OPENAI_API_BASE": url,
            "OPENAI_API_KEY": key,
            "OPENAI_MODEL": MODEL,
            "ANTHROPIC_BASE_URL": base,
            "ANTHROPIC_API_KEY": key,
            "ANTHROPIC_AUTH_TOKEN": key,
            "ANTHROPIC_MODEL": MODEL,
            "AGENT_R1_TASK": json.dumps(dataclasses.asdict(task)),
        }
        # Into a file, for what the program leaves running may hold a pipe open.
        with tempfile.TemporaryFile() as written:
            try:
                code = await _run(command, environment, written)
            finally:
                written.seek(max(0, written.seek(0, os.SEEK_END) - MAX_OUTPUT))
                output = clean(written.read().decode(errors="replace")).strip()
                self._keep(output)
        if code != 0:
            raise RuntimeError(f"{command[0]} ended with exit code {code}: {output[-500:]}")
        return output

    def _keep(self, output: str) -> None:
        """Keeps a command's output with the last turn, for people who look at the episode."""
        assert self._session is not None
        self._answer = output
        if self._session.conversation.trajectory.steps:
            self._session.conversation.note(results=(CallResult("output", output),))


async def _run(command: Sequence[str], environment: dict[str, str], output: IO[bytes]) -> int:
    """The exit code of a program; what it has started ends with it."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, **environment},
    )
    try:
        return await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _is_of_limit(fault: FaultError, session: ClientSession) -> bool:
    """Whether an agent failed since a call of its was refused for a limit: by the status of what it
    raised, where that tells, else because some call was.
    """
    if session.was_cut:
        session.met = session.met or StopReason.MAX_TOKENS
    if session.met is None:
        return False
    error: BaseException | None = fault
    while error is not None:
        status = getattr(error, "status_code", None)
        status = status or getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status in (400, 409)
        error = error.__cause__ or error.__context__
    return True


async def _apart(call: Callable[[], Any]) -> Any:
    """What a plain function gives, which may wait: others go on."""
    given = await in_thread(call, "agent")
    return await given if inspect.isawaitable(given) else given


@contextlib.asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield None


@contextlib.asynccontextmanager
async def _client(url: str, key: str, *, is_async: bool) -> AsyncIterator[Any]:
    """A client of the package openai; no proxy stands before this machine."""
    import openai

    if is_async:
        plain = openai.DefaultAsyncHttpxClient(verify=False, trust_env=False)
        async with openai.AsyncOpenAI(base_url=url, api_key=key, http_client=plain) as client:
            yield client
        return
    with openai.OpenAI(
        base_url=url,
        api_key=key,
        http_client=openai.DefaultHttpxClient(verify=False, trust_env=False),
    ) as blocking:
        yield blocking


def _function_of(reference: str) -> Callable[..., Awaitable[Any] | Any]:
    """The agent's function, whose parameters are known."""
    run: Any = load_object(reference, what="env.run")
    if not callable(run):
        raise ConfigError(f"env.run = {reference!r}: no function but {run!r:.80}")
    names = inspect.signature(run).parameters
    if unknown := [name for name in names if name not in GIVEN]:
        raise ConfigError(
            f"env.run = {reference!r}: there is nothing to give for its parameter {unknown[0]!r}; "
            f"known: {', '.join(GIVEN)}"
        )
    if "client" in names:
        try:
            import openai.resources.chat  # noqa: F401  now, or the first turn would wait for it
        except ImportError as error:
            raise ConfigError(
                f"env.run = {reference!r} wants a client: pip install openai"
            ) from error
    return run  # type: ignore[no-any-return]
