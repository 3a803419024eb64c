"""Who may ask a server that is for programs and pages of this machine alone."""

from __future__ import annotations

from starlette.types import Scope

HOSTS = ("127.0.0.1", "localhost", "[::1]")


def headers_of(scope: Scope) -> dict[str, str]:
    """A request's headers as text."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def is_foreign(headers: dict[str, str], *, follows_link: bool = False) -> bool:
    """Whether a page of another site sends the request: such a page, in a browser on this machine,
    can reach the server, under a name of its own too.

    Args:
        headers: The request's.
        follows_link: Somebody opens the server's page, which a link elsewhere may do.
    """
    host = headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    site = "none" if follows_link else headers.get("sec-fetch-site", "none")
    origin = headers.get("origin")
    is_other = origin is not None and origin.partition("://")[2] != host
    return name not in HOSTS or site not in ("none", "same-origin") or is_other
