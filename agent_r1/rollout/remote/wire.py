"""What is said to a server and what it answers: each kind of server has a dialect of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent_r1.rollout.engine import Sampling

CONTROL_SECONDS = 60.0
"""Time limit of a request that samples nothing."""
LOAD_SECONDS = 900.0
"""Time limit of reading weights."""
MODEL = "policy"
"""The model's name on the server; an adapter's is that of its version."""
NOT_LOADED = (
    "it cannot load the run's weights: does it see the folder at the same path (engine.folder), "
    "and is its model that of the run (its option --model)?"
)


class ServerFaultError(Exception):
    """A server failed and may do better when asked again.

    Attributes:
        is_gone: Nobody answers there, or somebody else.
        is_busy: It works, and has too much to do; ``wait``: seconds that it asks to wait.
    """

    def __init__(
        self, message: str, *, is_gone: bool = False, is_busy: bool = False, wait: float = 0.0
    ) -> None:
        super().__init__(message)
        self.is_gone, self.is_busy, self.wait = is_gone, is_busy, wait


class RefusedError(Exception):
    """A server refuses a request, and would refuse it again."""


@dataclass(slots=True, frozen=True)
class Answer:
    """What a server sampled.

    Attributes:
        token_ids, logprobs: Of the same length.
        spans: ``(version, start, end)``, the version as the server calls it.
        stop: Why it ended, in the server's words; ``memory``: there was no room for more.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[tuple[str, int, int], ...]
    stop: str


@dataclass(slots=True, frozen=True)
class Facts:
    """What a server says about itself; ``None`` where it says nothing.

    Attributes:
        longest: Longest context, in tokens.
        dtype: Of its weights, e.g. ``float32``.
    """

    longest: int | None = None
    dtype: str | None = None


class Caller(Protocol):
    """The HTTP side of one server.

    Attributes:
        adapters: Names of the adapters that it was given, the newest last; that one samples.
        model: Name of what samples: the newest adapter, or ``MODEL``.
    """

    adapters: list[str]

    @property
    def model(self) -> str: ...

    async def get(self, path: str, *, seconds: float) -> Any:
        """The answer's JSON, or its text if it is none; raises as ``post``."""
        ...

    async def post(self, path: str, body: Any = None, *, seconds: float) -> Any:
        """Raises ``ServerFaultError`` or ``RefusedError``."""
        ...

    async def sample(self, path: str, body: Any, *, session: str) -> Any:
        """A ``post`` for tokens of ``model``. Its time limit is ``engine.timeout``, without the
        time in which the server loads weights. If it does not know its adapter any more, since
        somebody started it again, that is a fault.
        """
        ...


class Wire(Protocol):
    """The dialect of one kind of server. ``cures`` names its options by what they set right:
    ``logprobs``, ``truncation``, ``dtype``, ``longest``, ``model``, ``sampling``, ``seed``,
    ``version``.
    """

    cures: Mapping[str, str]

    async def generate(
        self, caller: Caller, prefix: Sequence[int], sampling: Sampling, seed: int, *, session: str
    ) -> Answer: ...

    async def load(self, caller: Caller, folder: Path, version: str) -> None:
        """Replaces the weights by those of a model folder, also under running requests; all that
        was computed with the old ones is forgotten. An adapter's folder is one adapter more.
        """
        ...

    async def facts(self, caller: Caller) -> Facts: ...


async def load_adapter(
    caller: Caller, api: str, folder: Path, version: str, *, cure: str, **more: Any
) -> None:
    """Gives a server one adapter more, by the two routes below the path ``api`` that vLLM and
    SGLang share. It has a name of its own, since what is cached under an old one would be used
    again; with the last but one a request may be at work.
    """
    new = {"lora_name": version, "lora_path": str(folder), **more}
    try:
        said = await caller.post(f"{api}/load_lora_adapter", new, seconds=LOAD_SECONDS)
    except RefusedError as error:
        raise RefusedError(f"{error}; start it with {cure}") from error
    if isinstance(said, dict) and not said.get("success", True):
        raise ServerFaultError(f"{NOT_LOADED} {said}")
    caller.adapters.append(version)
    for old in caller.adapters[:-2]:
        name = {"lora_name": old}
        await caller.post(f"{api}/unload_lora_adapter", name, seconds=CONTROL_SECONDS)
        caller.adapters.remove(old)
