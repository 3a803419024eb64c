"""The commands for people who look at runs: view, episodes, diagnose."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import socket
import sys
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent_r1.analysis.episode_index import EpisodeIndex
    from agent_r1.run.folder import RunFolder

PORT = 8765
COLUMNS = ("turns", "tool_calls", "action_tokens", "tokens")


def run_view(arguments: argparse.Namespace, rest: list[str]) -> int:
    import uvicorn

    from agent_r1.analysis.viewer.library import Library
    from agent_r1.analysis.viewer.server import make_app
    from agent_r1.errors import ConfigError

    folders = [Path(folder) for folder in arguments.runs or ["runs"]]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"there is no folder {folder}; name the folder of a run, or one that holds runs: "
                "agent-r1 view RUNS"
            )
    library = Library(folders)
    if not (views := library.views()):
        print(f"no runs in {', '.join(map(str, folders))} yet; they are shown as they come")
    with _listening(arguments.port) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        if len(views) == 1:
            address += f"#/run/{quote(views[0].name, safe='')}"
        print(f"{counted(len(views), 'run')} at {address} (Ctrl-C ends it)", flush=True)
        if not arguments.no_browser:  # one in the terminal would not come back
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        config = uvicorn.Config(make_app(library), log_level="warning", lifespan="off")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once it has closed
            uvicorn.Server(config).run(sockets=[listening])
    return 0


def _listening(port: int | None) -> socket.socket:
    """A socket on this machine alone: of the wanted port, or of the usual one or any other."""
    from agent_r1.errors import ConfigError

    for wanted in (port,) if port is not None else (PORT, 0):
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", wanted))
            listening.listen()
            return listening
        except (OSError, OverflowError) as error:
            listening.close()
            reason = str(error)
    raise ConfigError(f"--port {port}: {reason}; leave it out for a free one")


def run_episodes(arguments: argparse.Namespace, rest: list[str]) -> int:
    from agent_r1.analysis.viewer.server import query_of
    from agent_r1.errors import ConfigError
    from agent_r1.utils.text import printable

    given = {"limit": str(arguments.limit), "sort": arguments.sort or "iteration"}
    if arguments.ascending:
        given["order"] = "ascending"
    for word in arguments.filters:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r}: write NAME=VALUE, for example stop=max_turns")
        given[name] = value
    run, index = _index_of(arguments.run)
    total, rows = index.find(query_of(given))
    if arguments.json:
        print(json.dumps({"total": total, "episodes": rows}), file=arguments.stdout)
        return 0
    _print_episodes(rows)
    print(f"\n{len(rows)} of {total} episodes of {run.path}")
    if not rows:
        facets = index.facets()
        for name in ("stops", "events", "parts", "categories"):
            print(printable(f"{name}: {', '.join(facets[name]) or 'none'}"))
    if rows:
        place = "/".join(str(rows[0][key]) for key in ("iteration", "group", "attempt"))
        print(f"one of them: agent-r1 explain {run.path} {place}")
    for iteration, why in index.damaged().items():
        print(f"warning: iteration {iteration}: {why}", file=sys.stderr)
    return 0


def _print_episodes(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from agent_r1.utils.text import printable

    parts = sorted({part for row in rows for part in row["parts"]})
    table = Table(box=box.SIMPLE)
    for name in ("episode", "task", "stop", "reward", *parts, *COLUMNS, "events", "answer"):
        right = name in ("reward", *parts, *COLUMNS)
        header = Text(printable(name))
        table.add_column(header, justify="right" if right else "left", no_wrap=name != "answer")
    for row in rows:
        events = " ".join(f"{name} {count:g}" for name, count in row["events"].items())
        words = row["fault"] or " ".join(row["answer"].split())
        cells: Iterable[str] = (
            f"{row['iteration']}/{row['group']}/{row['attempt']}",
            row["task"],
            row["stop"],
            _number(row["reward"]),
            *(_number(row["parts"].get(part)) for part in parts),
            *(_number(row[name]) for name in COLUMNS),
            events,
            words[:60],
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    width = None if sys.stdout.isatty() else 250
    Console(file=sys.stdout, width=width, highlight=False).print(table)


def run_diagnose(arguments: argparse.Namespace, rest: list[str]) -> int:
    from agent_r1.analysis.diagnose import diagnose
    from agent_r1.utils.text import printable

    run, index = _index_of(arguments.run)
    findings = diagnose(run, index)
    if arguments.json:
        print(json.dumps([finding.as_dict() for finding in findings]), file=arguments.stdout)
        return 0
    for finding in findings:
        lines = [finding.name, f"  seen: {finding.evidence}", f"  cure: {finding.cure}"]
        if finding.episodes:
            words = f"{shlex.quote(str(run.path))} {_as_words(finding.episodes)}"
            lines.append(f"  look: agent-r1 episodes {words}")
        print(printable("\n".join([*lines, ""])))
    early = "; trends are judged from iteration 6 on" if len(run.metrics()) <= 6 else ""
    print(f"{counted(len(findings), 'finding')} in {run.path}{early}")
    return 0


def _as_words(query: dict[str, str]) -> str:
    """A query as arguments of ``agent-r1 episodes``."""
    words = [f"--sort {shlex.quote(query['sort'])}"] if "sort" in query else []
    words += ["--ascending"] if query.get("order") == "ascending" else []
    filters = (f"{k}={v}" for k, v in query.items() if k not in ("sort", "order"))
    return " ".join([*map(shlex.quote, filters), *words])


def _index_of(folder: str) -> tuple[RunFolder, EpisodeIndex]:
    """A run and the index of its episodes, read to the end."""
    from agent_r1.analysis.episode_index import EpisodeIndex
    from agent_r1.run.console import counting
    from agent_r1.run.folder import RunFolder

    run = RunFolder.open(folder)
    index = EpisodeIndex(run)
    with counting("iterations") as count:
        for number, iteration in enumerate(index.missing(), 1):
            index.read(iteration)
            count("reading", number)
    return run, index


def counted(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
