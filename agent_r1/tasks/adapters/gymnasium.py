"""Any Gymnasium environment whose observations can be read and whose actions can be named.

    [env]
    name = "gymnasium"
    id = "FrozenLake-v1"
    kwargs = { is_slippery = false }
    actions = ["left", "down", "right", "up"]

The agent sees the rendering as text (``render_mode = "ansi"``) where there is one, else the
observation, and writes its action between action tags, ``<action>down</action>``, or alone: a name,
a number, or for a text space the text itself. Needs the extra ``agent-r1[gymnasium]``.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from agent_r1.config.registry import load_object
from agent_r1.envs.base import EnvSettings, Transition
from agent_r1.errors import ConfigError
from agent_r1.types import Message, Outcome, Task, derive_seed
from agent_r1.utils.waiting import OwnThread

_MARKED = re.compile("\x1b\\[[0-9;]*m(.)\x1b\\[0m")
_ESCAPES = re.compile("\x1b\\[[0-9;]*[A-Za-z]")
_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)


class GymEnv:
    """The outcome is the sum of the game's rewards. Text that is no action leaves the
    game as it was, and the agent is told so.
    """

    class Settings(EnvSettings):
        """The game, and how it is shown.

        Attributes:
            id: The registered name.
            module: ``file.py:function`` or ``module:function``, called once, to register
                your own games.
            kwargs: For ``gymnasium.make``.
            actions: Names of a discrete space's actions, in order; numbers by default.
            system: What the agent is told about the game; how to act is added.
            example: Pairs of what the agent sees and what it does, shown before the game as turns.
            rewards: Credit the game's rewards to the ``outcome``, or to the ``steps`` that earned
                them as the process reward ``game``; the outcome's reward is then 0.
            success: Sum of rewards from which an episode is a success; by default the game's own
                threshold, or anything above 0.
            tasks: Instances of each split, which differ by their seed.
        """

        name: str = "gymnasium"
        id: str
        module: str = ""
        kwargs: dict[str, Any] = Field(default_factory=dict)
        actions: tuple[str, ...] = ()
        system: str = "Play the game."
        example: tuple[tuple[str, str], ...] = ()
        rewards: Literal["outcome", "steps"] = "outcome"
        success: float | None = None
        tasks: int = Field(10_000, ge=1)

    reward_parts = ("game",)
    schemas = ()

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        # A game runs in the thread that made it, as its state may be bound to it.
        self.episode_thread = OwnThread("gymnasium")
        make = functools.partial(_make, settings.id, settings.module, settings.kwargs)
        self._gym = self.episode_thread.wait(make)
        self._names = _names(settings, self._gym)
        self._total = 0.0

    @classmethod
    def tasks(cls, settings: Any, split: str) -> Sequence[Task]:
        name = f"{settings.id}-{split}"
        return [Task(f"{name}-{n}", settings.id) for n in range(settings.tasks)]

    async def reset(self, task: Task, seed: int) -> Sequence[Message]:
        seed = derive_seed(seed, "game") % 2**31
        observation = await self.episode_thread.run(functools.partial(self._begin, seed))
        how = f"one of {', '.join(self._names)}" if self._names else "your next move"
        system = f"{self._settings.system} Answer with <action>...</action>: {how}."
        turns = [
            message
            for seen, done in self._settings.example
            for message in (Message("user", seen), Message("assistant", done))
        ]
        return [Message("system", system), *turns, Message("user", observation)]

    async def step(self, message: Message) -> Transition:
        whole = not message.cut or "</action>" in message.content
        action = self._action(message.content) if whole else None
        if action is None:
            known = f"; the actions are: {', '.join(self._names)}" if self._names else self._texts()
            said = Message("user", f"That is no action{known}.")
            return Transition((said,), events=("mistake/no_action",))
        shown, reward, terminated, truncated = await self.episode_thread.run(
            functools.partial(self._take, action)
        )
        self._total += reward
        rewards = {"game": reward} if self._settings.rewards == "steps" else {}
        return Transition(
            (Message("user", shown),),
            rewards,
            done=terminated or truncated,
            truncated=truncated and not terminated,
            state_key=shown,
        )

    async def outcome(self) -> Outcome:
        spec = self._gym.spec
        threshold = self._settings.success
        if threshold is None:
            threshold = spec.reward_threshold if spec is not None else None
        success = self._total > 0 if threshold is None else self._total >= threshold
        reward = self._total if self._settings.rewards == "outcome" else 0.0
        return Outcome(reward, success, {"return": self._total})

    async def close(self) -> None:
        await self.episode_thread.run(self._gym.close)

    def _texts(self) -> str:
        """The texts that a text space takes."""
        space = self._gym.action_space
        characters = "".join(sorted(space.character_set))
        return f"; write {space.min_length} to {space.max_length} of the characters {characters!r}"

    def random_action(self, seed: int) -> str:
        """A valid action in the words of the agent, for checks."""
        space = self._gym.action_space
        space.seed(seed % 2**31)
        if not self._names:
            return f"<action>{space.sample()}</action>"
        return f"<action>{self._names[int(space.sample()) - int(space.start)]}</action>"

    def _begin(self, seed: int) -> str:
        """Starts the game; returns the agent's view."""
        given = self._gym.reset(seed=seed)
        if not (isinstance(given, tuple) and len(given) == 2):
            raise TypeError(
                f"reset must return (observation, info), as Gymnasium's, not {given!r:.200}"
            )
        return self._shown(given[0])

    def _take(self, action: Any) -> tuple[str, float, bool, bool]:
        """One move; what the agent sees, the reward as a number, terminated, truncated."""
        given = self._gym.step(action)
        if not (isinstance(given, tuple) and len(given) == 5):
            raise TypeError(
                "step must return (observation, reward, terminated, truncated, info), as "
                f"Gymnasium's, not {given!r:.200}"
            )
        observation, reward, terminated, truncated, _ = given
        return self._shown(observation), _number(reward), bool(terminated), bool(truncated)

    def _action(self, text: str) -> Any:
        """The action meant, or ``None``."""
        match = _ACTION.search(text)
        said = (match[1] if match else text).strip()
        if not self._names:
            return said if said and self._gym.action_space.contains(said) else None
        names = [name.casefold() for name in self._names]
        if said.casefold() in names:
            number = names.index(said.casefold())
        elif self._settings.actions and said in map(str, range(len(names))):
            number = int(said)  # custom names: their number is accepted, too
        else:
            return None
        return number + int(self._gym.action_space.start)

    def _shown(self, observation: Any) -> str:
        """The state in words; a letter that the rendering marks by its colour stands in
        brackets.
        """
        if isinstance(observation, str):
            return observation
        if self._gym.render_mode == "ansi":
            rendered = self._gym.render()
            if isinstance(rendered, list):  # the frames since the last time
                rendered = rendered[-1] if rendered else None
            rendered = getattr(rendered, "getvalue", lambda: rendered)()  # a StringIO of old games
            if not isinstance(rendered, str):
                raise TypeError(
                    f"its render() gives {rendered!r:.100}, no text, though it offers 'ansi' in "
                    "metadata['render_modes']; take that out there to show the observation"
                )
            return _ESCAPES.sub("", _MARKED.sub(r"[\1]", rendered)).strip()
        return str(observation)


def _number(reward: Any) -> float:
    """A reward as one number; an array of size one will do."""
    size = getattr(reward, "size", 1)
    if size != 1:
        raise TypeError(f"the reward must be one number, not {reward!r:.200}")
    number = float(reward.item() if hasattr(reward, "item") else reward)
    if not math.isfinite(number):
        raise ValueError(f"the reward is {number}")
    return number


def _names(settings: Any, env: Any) -> tuple[str, ...]:
    """The names of the actions; none in a text space."""
    from gymnasium.spaces import Discrete, Text

    space, game = env.action_space, settings.id
    if isinstance(space, Text):
        if settings.actions:
            raise ConfigError(f"env.actions: {game!r} takes any text, its actions have no names")
        return ()
    if not isinstance(space, Discrete):
        raise ConfigError(f"env.id = {game!r}: its actions are {space}, not discrete or text")
    names = settings.actions or tuple(str(int(space.start) + n) for n in range(int(space.n)))
    if len(names) != space.n:
        raise ConfigError(f"env.actions: {len(names)} names, but {game!r} has {space.n} actions")
    return names


def _make(game: str, module: str, kwargs: dict[str, Any]) -> Any:
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise ConfigError(
            "env 'gymnasium' needs the package: pip install 'agent-r1[gymnasium]'"
        ) from error
    if module:
        _register(module)
    try:
        if ":" in game:  # module:Name-v0, which is imported first
            importlib.import_module(game.partition(":")[0])
        spec = gymnasium.spec(game.rpartition(":")[2])
        if "ansi" in _render_modes(spec):
            kwargs = {"render_mode": "ansi", **kwargs}
        return gymnasium.make(game, disable_env_checker=True, **kwargs)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        known = [name for name in gymnasium.registry if name.startswith(f"{game}-v")]
        cure = f"; did you mean {known[-1]!r}?" if known else ""
        raise ConfigError(f"env.id = {game!r}, env.kwargs = {kwargs!r}: {error}{cure}") from error


def _render_modes(spec: Any) -> Sequence[str]:
    import gymnasium

    entry = spec.entry_point
    found = gymnasium.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
    modes: Sequence[str] = getattr(found, "metadata", {}).get("render_modes", ())
    return modes


@functools.cache
def _register(reference: str) -> None:
    load_object(reference, what="env.module")()
