"""Engines that are servers: sessions that stick to one, weights by disk, faults that are figures.

An action is asked for again, at any server, when its answer is lost or wrong: its randomness is its
seed's alone. A server that fails is started again (or, if it is not ours, waited for), and gets the
present weights before its next request. What a server sampled with weights that this run did not
give it is never used.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from agent_r1.errors import ConfigError, RunError
from agent_r1.rollout.engine import Sampling, Traits
from agent_r1.rollout.remote.install import Packages, installed
from agent_r1.rollout.remote.settings import RemoteSettings
from agent_r1.rollout.remote.wire import Answer, RefusedError, ServerFaultError, Wire
from agent_r1.types import Action, VersionSpan
from agent_r1.utils.text import describe

if TYPE_CHECKING:
    from agent_r1.model.policy import Policy
    from agent_r1.model.settings import ModelSettings
    from agent_r1.rollout.remote.fleet import Fleet
    from agent_r1.rollout.remote.server import OwnProcess, Server
    from agent_r1.rollout.remote.weights import WeightFolders

MAX_FAILED_SYNCS = 3
"""After so many versions in a row that could not be written the run ends."""
CONTEXT = 128
"""Shortest context of a server of the run's own: the proof needs so much."""
REPEAT_SECONDS = 0.2
"""Before a request is repeated."""
MAX_REPEATS = 8
"""After so many faults with one action the run ends: it is the action that is at fault."""


@dataclass
class Counters:
    """The engine's work since its last report.

    Attributes:
        requests: Actions asked for; ``repeated``: how often one had to be asked for again.
        sampled: Tokens sampled.
        failed_syncs: New weights that could not be written; the old ones sampled on.
    """

    requests: int = 0
    repeated: int = 0
    sampled: int = 0
    failed_syncs: int = 0


class RemoteSession:
    """One episode, at one server as long as that works: it has the episode's cache."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine, self.id = engine, secrets.token_hex(8)
        self.server: Server | None = None
        self.outage: str | None = None

    async def generate(self, prefix: Sequence[int], sampling: Sampling, seed: int) -> Action:
        action = await self._engine.generate(self, prefix, sampling, seed)
        self.outage = None
        return action

    def close(self) -> None:
        if self.server is not None:
            self.server.load -= 1
            self.server = None


class RemoteEngine:
    """See the module's docstring. A kind of server is a subclass with a ``wire``, the ``packages``
    that it is installed from, ``memory_option``, ``command``, ``environment`` and ``Settings``.
    """

    traits: ClassVar = Traits(exact=False, rests=False)
    wire: ClassVar[Wire]
    packages: ClassVar[Packages]
    memory_option: ClassVar[str]
    """Option of its command line for the share of a GPU that it takes."""

    def __init__(self, settings: Any, policy: Policy) -> None:
        self.settings: RemoteSettings = settings
        self.policy, self._version = policy, 0
        self.longest: int | None = None
        self._counters = Counters()
        self._unwritten: set[int] = set()
        self._repairs_reported = 0
        self._why_failed = ""
        self._started: asyncio.Task[tuple[Fleet, WeightFolders]] | None = None
        self._is_paused, self._settled = False, asyncio.Lock()
        """The lock is held while the learner is at work, when no server can be proven."""

    @classmethod
    def command(
        cls, python: str, folder: Path, *, port: int, longest: int | None, like: Policy
    ) -> list[str]:
        """How a server of the run's own is started, with the policy's number format."""
        raise NotImplementedError

    @classmethod
    def environment(cls) -> dict[str, str]:
        """The environment of its process."""
        raise NotImplementedError

    @classmethod
    def must_serve(cls, settings: Any, model: ModelSettings) -> None:
        if settings.urls:
            return
        cls._python(settings)
        from agent_r1.model.load import device_of  # brings torch

        if (
            device_of(model).type == "cuda"
            and not settings.gpus
            and cls.memory_option not in " ".join(settings.options)
        ):
            raise ConfigError(
                f"engine {settings.name!r} would take most of the GPU that the learner is on: give "
                'it another (engine.gpus = ["1"]), or a share of this one '
                f'(engine.options = ["{cls.memory_option}", "0.4"])'
            )

    @classmethod
    def _python(cls, settings: RemoteSettings) -> str:
        """The Python that runs a server of the run's own."""
        if settings.python is not None:
            return settings.python
        if (found := installed(cls.packages)) is None:
            raise ConfigError(
                f"engine {settings.name!r}: its server is not installed here: run `agent-r1 engine "
                f"install {settings.name}` (minutes), or name a Python that has it (engine.python) "
                "or a running server (engine.urls)"
            )
        return str(found)

    # The contract ---------------------------------------------------------------------------

    async def start(self, longest: int | None = None) -> None:
        loop = asyncio.get_running_loop()
        if self._started is not None and self._started.get_loop() is not loop:
            self._abandon()
        if self._started is None:
            self._is_paused, self._settled = False, asyncio.Lock()  # of this event loop
            self.longest = None if longest is None else max(longest, CONTEXT)
            self._started = asyncio.ensure_future(self._start())
        try:
            _, folders = await asyncio.shield(self._started)
        except BaseException:
            if self._started is not None and self._started.done():
                self._started = None
            raise
        if folders.present != self._version:  # it could not be written before
            await self.sync(self.policy, self._version)

    def session(self, number: int = 0) -> RemoteSession:
        return RemoteSession(self)

    async def pause(self) -> None:
        if not self._is_paused:
            await self._settled.acquire()
            self._is_paused = True

    def resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            if (fleet := self._fleet()) is not None:
                fleet.forgive()
            self._settled.release()

    async def sync(self, weights: Policy, version: int) -> None:
        """If the weights cannot be written (a full disk), the old ones sample on, as the versions
        of their tokens tell; three times in a row are an error.
        """
        self.policy, self._version = weights, version
        if self._started is None:
            return self.resume()
        fleet, folders = await asyncio.shield(self._started)
        try:
            await folders.write(weights, version)
        except OSError as error:
            self._unwritten.add(version)
            self._counters.failed_syncs += 1
            self._why_failed = describe(error)
            if len(self._unwritten) >= MAX_FAILED_SYNCS:
                raise RunError(
                    f"new weights could not be written for the engine {MAX_FAILED_SYNCS} times "
                    f"in a row: {describe(error)} (engine.folder names another place)"
                ) from error
            return
        finally:
            self.resume()  # servers that are repaired are proven with these weights, from now on
        self._unwritten.clear()
        await fleet.update()
        folders.forget_old(fleet.in_use)

    async def idle(self) -> None:
        return None

    def report(self) -> dict[str, float]:
        counters, self._counters = self._counters, Counters()
        repairs = 0 if (fleet := self._fleet()) is None else fleet.num_repairs
        before, self._repairs_reported = self._repairs_reported, repairs
        figures = {**vars(counters), "repairs": max(0, repairs - before)}
        return {name: float(value) for name, value in figures.items()}

    def advice(self, figures: Mapping[str, float], seconds: float) -> Iterator[str]:
        fleet = self._fleet()
        first = "" if fleet is None else fleet.first_fault
        if figures["repairs"]:
            yield (
                f"a server of the engine failed and was made ready again {figures['repairs']:g} "
                f"times; the first fault: {first}"
            )
        elif figures["repeated"] > 0.05 * figures["requests"]:
            yield (
                f"{figures['requests']:g} actions were asked for, {figures['repeated']:g} times "
                f"again; the first fault: {first}"
            )
        if figures["failed_syncs"]:
            yield (
                "new weights could not be written for the engine, so that the old ones sampled: "
                f"{self._why_failed}"
            )
        if fleet is not None and all(server.is_ready for server in fleet.servers):
            fleet.first_fault = ""

    async def close(self) -> None:
        started, self._started = self._started, None
        if started is None:
            return
        started.cancel()
        (found,) = await asyncio.gather(started, return_exceptions=True)
        if isinstance(found, tuple):
            await found[0].close()
            found[1].close()

    def _abandon(self) -> None:
        """Ends what was started in an event loop that is no more."""
        if (fleet := self._fleet()) is not None:
            for server in fleet.servers:
                if server.process is not None:
                    server.process.kill()
        self._started = None

    # Sampling -------------------------------------------------------------------------------

    async def generate(
        self, session: RemoteSession, prefix: Sequence[int], sampling: Sampling, seed: int
    ) -> Action:
        """One action, asked for until a server gives a whole one of known weights."""
        assert self._started is not None, "start comes first"
        fleet, folders = await asyncio.shield(self._started)
        self._counters.requests += 1
        faults = 0
        while True:
            if (server := session.server) is None or not server.is_ready:
                session.close()
                session.outage = session.outage or fleet.outage
                server = session.server = await fleet.least_loaded()
                server.load += 1
            age = server.age
            try:
                ask = self.wire.generate(server, prefix, sampling, seed, session=session.id)
                action = self._action(await ask, sampling, folders)
            except RefusedError as error:
                raise RunError(f"the engine's server {server.url} refuses: {error}") from error
            except ServerFaultError as error:
                fault = error
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                fault = ServerFaultError(f"an answer that is none: {describe(error)}")
            else:
                server.faults = 0
                self._counters.sampled += len(action.token_ids)
                return action
            self._counters.repeated += 1
            session.outage = f"{server.url}: {fault}"
            faults += not fault.is_busy
            if faults >= MAX_REPEATS:
                raise RunError(f"{faults} times one action could not be sampled: {session.outage}")
            fleet.note(server, age, fault)
            await asyncio.sleep(max(REPEAT_SECONDS, min(fault.wait, self.settings.outage)))

    def _action(self, answer: Answer, sampling: Sampling, folders: WeightFolders) -> Action:
        """The action that an answer is; ``ServerFaultError`` if it cannot be one."""
        from agent_r1.rollout.sampling import stop_of  # brings torch

        ids, count = answer.token_ids, len(answer.token_ids)
        vocabulary = self.policy.base.config.get_text_config().vocab_size
        has_room = answer.stop != "memory"
        if not has_room <= count <= sampling.max_tokens or count != len(answer.logprobs):
            raise ServerFaultError(
                f"{count} tokens with {len(answer.logprobs)} log-probabilities (it says "
                f"{answer.stop!r}), at most {sampling.max_tokens} were asked for"
            )
        if not all(type(i) is int and 0 <= i < vocabulary for i in ids):
            raise ServerFaultError("a token that the model does not have")
        if not all(-9998.0 < x <= 1e-3 for x in answer.logprobs):
            raise ServerFaultError("a log-probability that is none")
        stop = stop_of(ids, sampling, self.policy.tokenizer) if has_room else "memory"
        if stop is None or any(i in sampling.stop_token_ids for i in ids[:-1]):
            raise ServerFaultError(f"{count} tokens that do not end where an action ends")
        ends = [0, *(end for _, _, end in answer.spans)]
        if [start for _, start, _ in answer.spans] != ends[:-1] or ends[-1] != count:
            raise ServerFaultError(f"versions {answer.spans} of {count} tokens")
        spans = []
        for name, start, end in answer.spans:
            if (version := folders.number(name)) is None:
                what = f"sampled by weights {name!r}, which this run did not give it"
                raise ServerFaultError(what, is_gone=True)
            spans.append(VersionSpan(version, start, end))
        return Action(ids, answer.logprobs, (), tuple(spans), stop)

    # Servers --------------------------------------------------------------------------------

    def _fleet(self) -> Fleet | None:
        """The servers, once they are ready."""
        task = self._started
        if task is None or not task.done() or task.cancelled() or task.exception():
            return None
        return task.result()[0]

    async def _start(self) -> tuple[Fleet, WeightFolders]:
        """Writes the weights, starts servers or finds them, and proves that they sample right."""
        from agent_r1.rollout.remote.fleet import Fleet
        from agent_r1.rollout.remote.weights import WeightFolders

        settings = self.settings
        folders = WeightFolders(settings.folder)
        fleet = Fleet(
            self.wire,
            folders,
            urls=settings.urls,
            launch=lambda number: self._launch(number, folders),
            count=max(1, len(settings.gpus)),
            outage=settings.outage,
            timeout=settings.timeout,
            prove=lambda server: self._prove(server, folders),
            settled=self._settled,
            is_learning=lambda: self._is_paused,
        )
        self._repairs_reported = 0
        try:
            await folders.write(self.policy, self._version)
            await fleet.start()
        except BaseException as error:
            await fleet.close()
            folders.close()
            if isinstance(error, (ServerFaultError, RefusedError, OSError)):
                what = f"engine {settings.name!r} does not start: {error}"
                raise ConfigError(what) from error
            raise
        return fleet, folders

    async def _prove(self, server: Server, folders: WeightFolders) -> None:
        """Has a server prove that it samples what the learner computes, which it can when it has
        the learner's weights.
        """
        from agent_r1.rollout.remote.proof import must_be_right

        if folders.present == self._version:
            await must_be_right(self, server, folders)

    def _launch(self, number: int, folders: WeightFolders) -> tuple[str, OwnProcess]:
        """Starts the process of a server."""
        from agent_r1.rollout.remote.server import OwnProcess, free_port

        settings, port = self.settings, free_port()
        command = self.command(
            self._python(settings),
            model_folder(self.policy, folders.path(folders.present)),
            port=port,
            longest=self.longest,
            like=self.policy,
        )
        environment = self.environment()
        if settings.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = settings.gpus[number]
        log = folders.folder / f"server-{number + 1}.log"
        process = OwnProcess([*command, *settings.options], environment, log)
        return f"http://127.0.0.1:{port}", process


def model_folder(policy: Policy, written: Path) -> Path:
    """The model that a server starts with: what was ``written``, or the one below an adapter."""
    return Path(policy.base.config._name_or_path) if policy.has_adapter else written
