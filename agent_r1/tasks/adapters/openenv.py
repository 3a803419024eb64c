"""An OpenEnv environment on a running server.

    [env]
    name = "openenv"
    url = "http://localhost:8000"
    system = "Guess the number from 1 to 9."
    field = "guess"          # of the action, filled with what the agent writes

Without ``field`` the agent acts by a tool call, ``act``, whose arguments are the action as the
server describes it. Each episode is a session of its own, so the server must admit as many as
``train.concurrency``. Needs the extra ``agent-r1[openenv]``.
"""

from __future__ import annotations

import functools
import json
import urllib.request
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from agent_r1.envs.base import EnvSettings, Transition
from agent_r1.errors import ConfigError
from agent_r1.tools.arguments import strip_titles
from agent_r1.types import Message, Outcome, Task, ToolCall, derive_seed
from agent_r1.utils.scope import kept
from agent_r1.utils.waiting import OwnThread


class OpenEnv:
    """The outcome is the sum of the rewards. An action that the server rejects is the agent's
    mistake, which it is told of; a lost server excludes the episode.
    """

    class Settings(EnvSettings):
        """The server, and how it is shown.

        Attributes:
            url: The server's address.
            system: What the agent is told about it.
            field: The field of the action that holds what the agent says; without it the agent acts
                by a tool call.
            observation: The field of the observation that the agent sees; by default all but
                reward, done and metadata, as JSON.
            reset: Arguments of ``reset`` besides the seed.
            success: Sum of rewards from which an episode is a success.
            tasks: Instances of each split, which differ by their seed.
            timeout: Seconds for connecting and for each message.
        """

        name: str = "openenv"
        url: str
        system: str = ""
        field: str = ""
        observation: str = ""
        reset: dict[str, Any] = Field(default_factory=dict)
        success: float = 1.0
        tasks: int = Field(10_000, ge=1)
        timeout: float = Field(30.0, gt=0)

    reward_parts: tuple[str, ...] = ()

    def __init__(self, settings: Any) -> None:
        try:
            from openenv.core import GenericEnvClient
        except ModuleNotFoundError as error:
            raise ConfigError(
                "env 'openenv' needs the package: pip install 'agent-r1[openenv]'"
            ) from error
        self._settings = settings
        self._action = _action_schema(settings.url, settings.timeout)
        if settings.field and settings.field not in self._action["properties"]:
            known = ", ".join(self._action["properties"])
            raise ConfigError(f"env.field = {settings.field!r}: the action has {known}")
        client = GenericEnvClient(
            base_url=settings.url,
            connect_timeout_s=settings.timeout,
            message_timeout_s=settings.timeout,
        )
        # From version 0.3 on the client is asynchronous and belongs to one event loop.
        self._client = client.sync() if hasattr(client, "sync") else client
        self.episode_thread = OwnThread("openenv")
        self._total = 0.0

    @classmethod
    def tasks(cls, settings: Any, split: str) -> Sequence[Task]:
        return [Task(f"openenv-{split}-{n}", settings.url) for n in range(settings.tasks)]

    @property
    def schemas(self) -> list[dict[str, Any]]:
        if self._settings.field:
            return []
        function = {"name": "act", "description": "Take an action.", "parameters": self._action}
        return [{"type": "function", "function": function}]

    async def reset(self, task: Task, seed: int) -> Sequence[Message]:
        seed = derive_seed(seed, "openenv") % 2**31
        result = await self._ask("reset", seed=seed, **self._settings.reset)
        system = [Message("system", self._settings.system)] if self._settings.system else []
        return [*system, Message("user", self._shown(result.observation))]

    async def step(self, message: Message) -> Transition:
        call = message.tool_calls[0] if message.tool_calls else None
        if self._settings.field and message.cut:
            said = Message("user", "That was cut off before its end; write less.")
            return Transition((said,), events=("mistake/no_action",))
        if self._settings.field:
            action = {self._settings.field: message.content.strip()}
        elif isinstance(call, ToolCall) and call.name == "act":
            action = call.arguments
        else:
            said = Message("user", "That is no action: call the tool act.")
            return Transition((said,), events=("mistake/no_action",))
        try:
            result = await self._ask("step", action)
        except RuntimeError as error:  # how the client reports the server's objections
            if "VALIDATION_ERROR" not in str(error):
                raise
            said = Message("tool" if call else "user", f"Error: {str(error)[:500]}")
            return Transition((said,), events=("mistake/rejected",))
        self._total += float(result.reward or 0.0)
        shown = self._shown(result.observation)
        return Transition((Message("tool" if call else "user", shown),), done=bool(result.done))

    async def outcome(self) -> Outcome:
        return Outcome(self._total, self._total >= self._settings.success)

    async def close(self) -> None:
        await self.episode_thread.run(self._client.close)

    async def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return await self.episode_thread.run(
            functools.partial(getattr(self._client, method), *args, **kwargs)
        )

    def _shown(self, observation: dict[str, Any]) -> str:
        if self._settings.observation:
            if self._settings.observation not in observation:
                raise ConfigError(
                    f"env.observation = {self._settings.observation!r}: the observation has "
                    f"{', '.join(observation)}"
                )
            return str(observation[self._settings.observation])
        kept = {k: v for k, v in observation.items() if k not in ("reward", "done", "metadata")}
        return json.dumps(kept, ensure_ascii=False)


@kept
def _action_schema(url: str, timeout: float) -> dict[str, Any]:
    """The server's schema of actions, without fields that no agent needs to fill in."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/schema", timeout=timeout) as reply:
            schema: dict[str, Any] = strip_titles(json.load(reply)["action"])
            properties = {k: v for k, v in schema["properties"].items() if k != "metadata"}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"env.url = {url!r}: no OpenEnv server answers there: {error}") from error
    kept = {k: v for k, v in schema.items() if k in ("$defs", "required")}
    return {"type": "object", "properties": properties, **kept}
