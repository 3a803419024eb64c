"""The recipe's section of engines that are servers."""

from __future__ import annotations

from pydantic import Field, field_validator

from agent_r1.config.section import NamedSection


class RemoteSettings(NamedSection):
    """The keys of ``[engine]`` of every server.

    Attributes:
        urls: Addresses of running servers, e.g. ``["http://gpu-2:8000"]``; by default the run
            starts its own.
        gpus: For servers of the run's own, one each: the numbers of its GPUs as in
            ``CUDA_VISIBLE_DEVICES``, e.g. ``["1", "2,3"]``; by default one server on what there is.
        options: More options of their command line, e.g. ``["--tensor-parallel-size", "2"]``.
        python: The Python that has the server's package; by default that of ``agent-r1 engine
            install``.
        folder: Where weights and logs are written, for servers on other machines to be read at the
            same path; by default a temporary folder.
        outage: Seconds without any server that works, after which the run ends.
        timeout: Seconds without an answer to one request after which its server counts as hung;
            less than ``limits.seconds``, more than the longest action takes.
    """

    urls: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    python: str | None = None
    folder: str | None = None
    outage: float = Field(600.0, gt=0)
    timeout: float = Field(120.0, gt=0)

    @field_validator("urls")
    @classmethod
    def _whole(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if odd := [url for url in urls if not url.startswith(("http://", "https://"))]:
            raise ValueError(f"{odd[0]!r}: write it as 'http://HOST:PORT'")
        return urls
