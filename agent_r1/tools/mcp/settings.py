"""``[env.mcp.NAME]``: how a server is started or reached; secrets in clear are refused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, model_validator

from agent_r1.config.section import Section
from agent_r1.errors import ConfigError
from agent_r1.utils.text import printable

_SECRET = re.compile(
    r"(^|[_-])(api_?key|key|token|secret|password|passwd|passphrase|pass|pwd|pat|auth"
    r"|credentials?|authorization|cookie|bearer)$|(password|passwd|secret|token|apikey)$",
    re.IGNORECASE,
)
"""How names of secrets end; their values count from this many characters on:"""
SECRET_LENGTH = 8


_KNOWN_SECRET = re.compile(
    r"(?<![\w-])(sk-(?=[\w-]*\d)|ghp_|github_pat_|glpat-|xox[bp]-|hf_|AKIA)[A-Za-z0-9_-]{16,}"
    r"|://[^/\s:@]*:[^/\s@]+@"
)
"""Forms of well-known secrets, under any name; the last is a password in a URL."""


EXPANDED: dict[str, str] = {}
"""Values of expanded ``$NAME`` references, with the reference that messages show instead."""


_PLAIN = re.compile(r"[/~.]|\w+://|\d+$|.*\.[a-zA-Z]\w{0,5}$")
"""Paths, addresses, numbers and file names, which do not count as secrets."""
_REFERENCE = re.compile(r"\$\$|\$(\w+)|\$\{(\w+)\}")


class McpServer(Section):
    """One server.

    Attributes:
        command: Starts a server that talks over stdio; ``python`` is our own interpreter.
        env: The server's environment variables besides ``PATH``, ``HOME`` and the like; no other is
            passed.
        headers: HTTP headers of every request.
        url: The server's address (streamable HTTP).
            In ``env``, ``headers`` and ``url``, ``$NAME`` or ``${NAME}`` stands for an environment
            variable of ours (``$$`` for a ``$``): so a secret is not stored with the run.
        tools: Tools that the agent gets, by name; by default all.
        timeout: Seconds for one call.
        connect_timeout: Seconds that the server may take to start, and again to list its tools.
        per: One server for the whole ``run``, or one for each ``episode`` if it keeps a state.
        is_error: Meaning of a result that the server marks as an error: ``rejected``, a mistake of
            the agent; ``exception``, a failure of the server.
    """

    command: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    url: str = ""
    headers: dict[str, str] = Field(default_factory=dict)
    tools: tuple[str, ...] = ()
    timeout: float = Field(30.0, gt=0)
    connect_timeout: float = Field(30.0, gt=0)
    per: Literal["run", "episode"] = "run"
    is_error: Literal["rejected", "exception"] = "rejected"

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.command) == bool(self.url):
            raise ValueError("give a command, or a url")
        for where, name, value in self._texts():
            clear = _REFERENCE.sub("", value)
            is_plain = not where.startswith("headers.") and _PLAIN.match(value)
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
            named = _SECRET.search(name) and len(value) >= SECRET_LENGTH and clear == value
            named = named and not is_plain
            if named or _KNOWN_SECRET.search(clear):
                cure = "write '$NAME' here"
                if where.startswith("command"):
                    cure = "give it to the server in env, as '$NAME'"
                raise ValueError(
                    f"{where}: it looks like a secret, and this value is stored with the "
                    f"run; put it into an environment variable and {cure}"
                )
        return self

    def _texts(self) -> Iterator[tuple[str, str, str]]:
        """Where a text stands, what it is called there, and the text."""
        for table, values in (("env", self.env), ("headers", self.headers)):
            for name, value in values.items():
                yield f"{table}.{name}", name, value
        yield "url", "", self.url
        for name, value in parse_qsl(urlsplit(self.url).query):
            yield f"url ({name})", name, value
        for before, word in zip(("", *self.command), self.command, strict=False):
            option, is_one, value = word.partition("=")
            if is_one:
                yield f"command ({option})", option.lstrip("-"), value
            elif before.startswith("-") and "=" not in before:
                yield f"command ({before})", before.lstrip("-"), word
            else:
                yield "command", "", word

    def expanded(self, table: dict[str, str]) -> dict[str, str]:
        """``env`` or ``headers`` with our environment variables put in."""
        return {key: _REFERENCE.sub(_from_environment, text) for key, text in table.items()}

    def expanded_url(self) -> str:
        return _REFERENCE.sub(_from_environment, self.url)


def _from_environment(reference: re.Match[str]) -> str:
    if reference[0] == "$$":
        return "$"
    name = reference[1] or reference[2]
    if name not in os.environ:
        raise ConfigError(f"${name}: there is no such environment variable; export it")
    value = os.environ[name]
    if printable(value.replace("\n", "\r")) != value:
        raise ConfigError(
            f"${name}: it holds a line end or another control character, as of a file that was "
            "read whole; take that out"
        )
    if len(value) >= SECRET_LENGTH:
        EXPANDED[value] = reference[0]
    return value
