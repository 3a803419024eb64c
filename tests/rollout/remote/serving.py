"""An application served in a thread of the tests' process."""

import threading

import uvicorn

from agent_r1.rollout.remote.server import free_port
from tests.rollout.remote.conftest import wait_for


class Running:
    def poll(self):
        return None


class InThread:
    def __init__(self, app):
        self.address = f"http://127.0.0.1:{free_port()}"
        port = int(self.address.rpartition(":")[2])
        config = uvicorn.Config(app, port=port, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self):
        self._thread.start()
        wait_for(self.address, Running())
        return self

    def __exit__(self, *_):
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
