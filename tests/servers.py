"""Real servers in processes of their own."""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command, port, seconds=120):
    """Starts a server and waits until it listens."""
    process = subprocess.Popen(command)
    deadline = time.time() + seconds
    while time.time() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"{command} did not listen within {seconds} seconds")


def stop(process):
    process.kill()
    process.wait()


@contextlib.contextmanager
def openenv_example():
    """The example's OpenEnv server; gives its process and url."""
    port = free_port()
    process = start([sys.executable, str(EXAMPLES / "openenv_server.py"), str(port)], port)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        stop(process)


@contextlib.contextmanager
def retriever(corpus):
    """A search server with Search-R1's interface; gives its process and address."""
    port = free_port()
    script = Path(__file__).parent / "retriever.py"
    process = start([sys.executable, str(script), str(port), str(corpus)], port)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        stop(process)
