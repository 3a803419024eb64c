"""An episode that an environment plays by itself, with its gold actions in the place of an engine:
the same loop, tokens and limits as of any other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from agent_r1.envs.base import Env
from agent_r1.envs.gold import played_gold
from agent_r1.errors import ConfigError
from agent_r1.render import Renderer
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.episode import run_episode
from agent_r1.types import Action, Message, StopReason, Task, Trajectory, derive_seed
from agent_r1.utils.text import describe, place_of


async def play_gold(
    make_env: Callable[[], Env], renderer: Renderer, limits: Limits, task: Task, seed: int
) -> tuple[Trajectory, bool]:
    """Plays the gold actions of a task; nobody sampled them, so they have no probabilities.

    Returns:
        The episode, and whether the actions were too few to end it: then it stops as one of too few
        turns.

    Raises:
        ConfigError: The environment's ``gold`` fails.
    """
    script = _Script(make_env, renderer, task)
    trajectory = await run_episode(
        script.make_env,
        script,
        renderer,
        task,
        attempt=0,
        limits=limits,
        sampling=Sampling(limits.tokens_per_turn, renderer.stop_token_ids),
        env_seed=derive_seed(seed, task.id),
        sampling_seed=0,
    )
    if script.is_over and trajectory.stop is StopReason.MAX_MEMORY:
        trajectory.stop = StopReason.MAX_TURNS
    return trajectory, script.is_over


class _Script:
    """A session that answers with the environment's gold actions."""

    outage = None

    def __init__(self, make_env: Callable[[], Env], renderer: Renderer, task: Task) -> None:
        self._make_env, self._renderer, self._task = make_env, renderer, task
        self._actions: AsyncIterator[Message] | None = None
        self._env: Env | None = None
        self.is_over = False

    def make_env(self) -> Env:
        self._env = self._make_env()
        return self._env

    async def generate(self, prefix: Sequence[int], sampling: Sampling, seed: int) -> Action:
        try:
            if self._actions is None:
                self._actions = played_gold(self._env)
            message = await anext(self._actions, None)
            ids = () if message is None else self._renderer.encode_message(message)
        except Exception as error:  # the author's code
            raise ConfigError(
                f"gold() of task {self._task.id!r} fails: {describe(error)}{place_of(error)}"
            ) from error
        if message is None:
            self.is_over = True
            return Action((), (), (), (), "memory")  # the loop stops without another step
        whole = len(ids) <= sampling.max_tokens
        return Action(ids[: sampling.max_tokens], (), (), (), "stop" if whole else "length")

    def close(self) -> None:
        return None
