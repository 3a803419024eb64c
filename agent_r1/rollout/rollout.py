"""Many episodes of the same kind: groups of attempts at tasks."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

from agent_r1.envs.base import Env
from agent_r1.render import Renderer
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.engine import Engine, Sampling, Session
from agent_r1.rollout.episode import run_episode
from agent_r1.rollout.runner import Episodes
from agent_r1.types import Group, Task, Trajectory, derive_seed
from agent_r1.utils.scope import shared


@dataclass(frozen=True)
class Rollout:
    """Everything that the episodes of a run have in common."""

    make_env: Callable[[], Env]
    engine: Engine
    renderer: Renderer
    limits: Limits
    concurrency: int = 256
    """Episodes at once, not counting those that are only being scored."""
    top_p: float = 1.0
    top_k: int = 0
    """Sampling filters; for evaluation only."""
    proven: bool = False
    """Whether an episode has been started before; a ``ConfigError`` is then the fault of a single
    episode, not of the recipe.
    """

    async def run(
        self, tasks: Sequence[Task], *, attempts: int, temperature: float, seed: int
    ) -> list[Group]:
        """All attempts at all tasks, one group per task. Sampling is keyed by (seed, task, attempt,
        turn).
        """
        episodes = await self.episodes()
        try:
            groups = [
                self.group(
                    episodes,
                    task,
                    attempts=attempts,
                    temperature=temperature,
                    seed=seed,
                    index=index,
                    first=index * attempts,
                )
                for index, task in enumerate(tasks)
            ]
            found = await asyncio.gather(*groups)
        finally:
            await episodes.close()
        for number, group in enumerate(found):
            group.number = number
        return found

    async def episodes(self) -> Episodes:
        """Where episodes are played; the engine is ready. To be closed in the same event loop."""
        shared(("engine", id(self.engine)), lambda: self.engine)  # closed with the run
        await self.engine.start(self.limits.tokens)
        return Episodes(self.engine, self.concurrency)

    def sampling(self, temperature: float) -> Sampling:
        """How a turn is sampled that has all of its room."""
        return Sampling(
            self.limits.tokens_per_turn,
            self.renderer.stop_token_ids,
            self.limits.stop_strings,
            temperature,
            self.top_p,
            self.top_k,
        )

    def group(
        self,
        episodes: Episodes,
        task: Task,
        *,
        attempts: int,
        temperature: float,
        seed: int,
        index: int,
        first: int,
    ) -> asyncio.Future[Group]:
        """All attempts at one task, queued at once.

        Args:
            episodes: Where they are played.
            task: What all of them do.
            attempts: Their number.
            temperature: Of sampling.
            seed: Of the instance, which is the same for all attempts; with ``index``, that of
                sampling, so that a task which is drawn twice is sampled anew.
            index: See ``seed``.
            first: Number of the first attempt's session.
        """
        sampling = self.sampling(temperature)

        def play(attempt: int, again: int, session: Session) -> Coroutine[None, None, Trajectory]:
            key = (seed, index, task.id, attempt, *([again] if again else []))
            return run_episode(
                self.make_env,
                session,
                self.renderer,
                task,
                attempt=attempt,
                limits=self.limits,
                sampling=sampling,
                env_seed=derive_seed(seed, task.id),
                sampling_seed=derive_seed(*key),
                proven=self.proven,
                paused=lambda: episodes.paused.seconds,
            )

        wanted = [
            episodes.add(first + attempt, functools.partial(play, attempt))
            for attempt in range(attempts)
        ]

        async def gathered() -> Group:
            return Group(task, list(await asyncio.gather(*wanted)))

        return asyncio.ensure_future(gathered())
