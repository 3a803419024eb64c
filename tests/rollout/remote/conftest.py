"""A server of the native engine in a process of its own, as a user starts one."""

import subprocess
import sys
import time
import urllib.request

import pytest

from agent_r1.rollout.remote.server import free_port


def wait_for(address, process, seconds=120):
    for _ in range(seconds * 5):
        try:
            return urllib.request.urlopen(f"{address}/health", timeout=2).close()
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.2)
    raise AssertionError("the server does not answer")


@pytest.fixture(scope="session")
def served():
    """Its address."""
    port = free_port()
    command = [sys.executable, "-m", "agent_r1.cli", "engine", "serve", "hopworld-base"]
    process = subprocess.Popen([*command, "--port", str(port)])
    try:
        wait_for(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
