"""``agent-r1`` commands in processes of their own. They are forked from one that has imported
PyTorch and transformers, which takes ten seconds of a processor, once for all of them.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["agent_r1.api", "agent_r1.cli.boundary", "agent_r1.analysis.check_recipe", "peft"]
)


class Command:
    """A command that was started; what is used of ``subprocess.Popen``."""

    def __init__(self, *arguments: Any, cwd: Path | str | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        words = [str(argument) for argument in arguments]
        where = str(cwd or Path.cwd())
        given = (words, where, dict(os.environ), [str(file) for file in self._files])
        self._process = _CONTEXT.Process(target=_work, args=given)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300.0) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("agent-r1", timeout)
        return code

    @property
    def printed(self) -> tuple[str, str]:
        """What stands on stdout and stderr so far."""
        out, err = (file.read_text() if file.exists() else "" for file in self._files)
        return out, err


def agent_r1(
    *arguments: Any, cwd: Path | str | None = None, timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    command = Command(*arguments, cwd=cwd)
    code = command.wait(timeout)
    return subprocess.CompletedProcess([*map(str, arguments)], code, *command.printed)


def _work(words: list[str], cwd: str, environment: Mapping[str, str], files: list[str]) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    os.chdir(cwd)
    sys.argv = ["agent-r1", *words]
    from agent_r1.cli import main

    code: Any = 1
    try:
        code = main(words)
    except SystemExit as exit:  # of argparse
        code = exit.code
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)
