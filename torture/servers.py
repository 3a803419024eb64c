"""MCP and HTTP servers that say what nobody asked for, or nothing."""

from __future__ import annotations

import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from torture.common import Tally, cli, project, scratch

MCP = Path(__file__).parent / "mcp_server.py"
METHODS = ("initialize", "tools/list", "tools/call")
WAYS = [
    "fine", "die", "silent", "noise", "huge line", "endless", "new pages", "twins", "none",
    "odd name", "null content", "odd content", "huge result", "surrogate", "image", "ref http",
    "ref file", "ref nowhere", "no type", "list", "text", "pattern", "bad pattern", "any",
    *(f"{what} at {m}" for what in ("hang", "die", "garbage", "error", "null") for m in METHODS),
]  # fmt: skip
ENV = '''
from agent_r1 import Task, ToolCall, ToolEnv

class Tiny(ToolEnv):
    """Asks a server."""

    @classmethod
    def tasks(cls, settings, split):
        return [Task(f"{split}{n}", f"word {n}?", f"w{n}") for n in range(8)]

    def gold(self):
        yield ToolCall("look", {"number": 1})
        yield self.task.answer

    def score(self, answer):
        return float(answer == self.task.answer)
'''


class _Odd(BaseHTTPRequestHandler):
    """Answers as its path says."""

    def do_POST(self) -> None:
        how = self.path.strip("/")
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if how == "hang":
            time.sleep(30)
        if how == "close":
            self.connection.close()
            return
        bodies = {
            "html": b"<html>gateway</html>", "empty": b"", "null": b"null", "list": b"[1, 2]",
            "deep": b"[" * 100_000, "latin": b'{"result": "\xff"}', "object": b'{"a": 1}',
            "odd": b'{"result": [[{"document": null}]]}', "short": b'{"result": [[]]}',
            "surrogate": b'{"result": [[{"document": {"contents": "a\\ud83d"}}]]}',
        }  # fmt: skip
        body = bodies.get(how, b'{"result": [[{"document": {"contents": "T\\nwords"}}]]}')
        self.send_response({"500": 500, "422": 422, "302": 302}.get(how, 200))
        if how == "302":
            self.send_header("location", "/302")
        length = len(body) * 2 if how == "longer" else len(body)
        self.send_header("content-length", str(1 << 60 if how == "endless" else length))
        self.end_headers()
        if how == "drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.5)
        elif how == "endless":
            try:
                while True:
                    self.wfile.write(b" " * (1 << 20))
            except OSError:
                return
        else:
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        return None


PATHS = [
    "fine", "hang", "close", "html", "empty", "null", "list", "deep", "latin", "object", "odd",
    "short", "surrogate", "500", "422", "302", "longer", "endless", "drip",
]  # fmt: skip


def servers(tally: Tally, count: int, number: int) -> None:
    """``check`` and a round of training against each."""
    rng = random.Random(number)
    ways = [("mcp", way) for way in WAYS] + [("http", path) for path in PATHS]
    rng.shuffle(ways)
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Odd)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    with scratch() as folder:
        rows = '{"question": "q?", "answer": "words", "supporting_titles": ["T"]}\n'
        (folder / "q.jsonl").write_text("".join(rows.replace("q?", f"q{n}?") for n in range(12)))
        for kind, way in ways[:count]:
            recipe = project(folder, ENV)
            text = recipe.read_text()
            if kind == "mcp":
                command = f'["{sys.executable}", "{MCP}", "{way}"]'
                server = f"command = {command}\ntimeout = 1.0\nconnect_timeout = 2.0"
                text = text.replace('env = "tiny.py:Tiny"\n', "")
                text += f'\n[env]\nname = "tiny.py:Tiny"\n[env.mcp.x]\n{server}\n'
            else:
                url = f"http://127.0.0.1:{http.server_address[1]}/{way}"
                text = text.replace('env = "tiny.py:Tiny"\n', "")
                text += (
                    f'\n[env]\nname = "multihop"\nquestions = "{folder}/q.jsonl"\n'
                    f'search = {{ name = "http", url = "{url}", timeout = 1.0 }}\n'
                )
            recipe.write_text(text)
            command = rng.choice(["check", "train"])
            run = ["--run", folder / f"run-{kind}-{Path(way).name}"] if command == "train" else []
            ended = cli(command, recipe, *run, "--train.iterations", 1)
            tally.note("servers", ended.verdict, [kind, way, command], ended.text)
    http.shutdown()
