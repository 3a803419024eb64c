"""Weights for servers by way of the disk: a folder for each version, whole or not there at all."""

from __future__ import annotations

import functools
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from agent_r1.rollout.model_thread import EngineThread
from agent_r1.utils.text import describe

if TYPE_CHECKING:
    from agent_r1.model.policy import Policy


class WeightFolders:
    """The versions of one run.

    Attributes:
        present: The newest version that is written.
        folder: Where they are; a temporary folder, unless one is named.
    """

    def __init__(self, folder: str | None) -> None:
        self._run, self._is_ours = secrets.token_hex(4), folder is None
        if folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="agent-r1-engine-"))
        else:
            self.folder = Path(folder).expanduser().absolute()
        self._thread = EngineThread()
        self.present = -1

    def name(self, version: int) -> str:
        """What servers call a version: never what another run calls one of its own."""
        return f"{self._run}.{version}"

    def number(self, name: str) -> int | None:
        """The version of that name; ``None`` if it is not this run's, or not wholly loaded."""
        run, _, number = name.partition(".")
        return int(number) if run == self._run and number.isdigit() else None

    def path(self, version: int) -> Path:
        """The model folder of a version."""
        return self.folder / f"{self._run}-{version}"

    async def write(self, policy: Policy, version: int) -> None:
        """Writes a policy's weights; only then are they the present ones. Raises ``OSError`` for a
        disk that does not take them.
        """
        final = self.path(version)
        partial = final.with_name(f".{final.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            await self._thread.run(functools.partial(policy.save, partial))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            # Of a full disk safetensors and tokenizers say so in errors of their own.
            if isinstance(error, OSError) or type(error) in (Exception, SafetensorError):
                raise OSError(describe(error)) from error
            raise
        self.present = version

    def forget_old(self, in_use: set[int]) -> None:
        """Deletes all versions but the present one and those ``in_use``."""
        for folder in self.folder.glob(f"{self._run}-*"):
            if int(folder.name.rpartition("-")[2]) not in {self.present, *in_use}:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Deletes all of them."""
        if self._is_ours:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for folder in self.folder.glob(f"*{self._run}-*"):
            shutil.rmtree(folder, ignore_errors=True)
