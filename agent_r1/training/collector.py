"""Which groups an iteration trains on: drawn in a fixed order, played ahead of the learner within a
bound, consumed nearly in that order. Nothing that was begun is thrown away.
"""

from __future__ import annotations

import asyncio
import functools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agent_r1.rollout.rollout import Rollout
from agent_r1.rollout.runner import Episodes
from agent_r1.run.recipe import TrainSettings
from agent_r1.types import Group, Task, derive_seed
from agent_r1.utils.scope import shared

WINDOW = 0.3
"""Share of the groups alive, counted from the oldest, among which finished ones are taken: one slow
group holds up the learner only when all others of the window are taken (the windowed queue of
torchtitan's reinforcement learning).
"""


@dataclass(frozen=True)
class Draw:
    """A training task and the seeds of its turn.

    Attributes:
        position: Place in the run's order of tasks.
        seed, index: Seeds of its instance and of sampling, see ``Rollout.group``.
    """

    position: int
    task: Task
    seed: int
    index: int


class Draws:
    """The training tasks in the order of a run: every epoch is a new permutation of all of them.

    Attributes:
        cursor: Tasks drawn so far.
    """

    def __init__(self, tasks: Sequence[Task], settings: TrainSettings, seed: int) -> None:
        self._tasks, self._settings, self._seed = tasks, settings, seed
        self.cursor = 0

    def next(self) -> Draw:
        """The next one."""
        self.cursor += 1
        return self.at(self.cursor - 1)

    def at(self, position: int) -> Draw:
        """The one at a place of the order, seeded as if each iteration took ``train.tasks``."""
        epoch, place = divmod(position, len(self._tasks))
        order = _permutation(len(self._tasks), derive_seed(self._seed, "epoch", epoch))
        iteration, index = divmod(position, self._settings.tasks)
        seed = derive_seed(self._seed, "iteration", iteration + 1)
        return Draw(position, self._tasks[order[place]], seed, index)


class Collector:
    """Plays groups ahead of the learner.

    At most ``(staleness + 1) * tasks`` groups are alive, counted until they are trained on. The
    window has at most ``tasks + 1`` of them. The policy that a group is trained on is therefore at
    most ``staleness + 1`` updates younger than the one that began it. Without staleness all groups
    of an iteration begin after the update before, and end before the next.
    """

    def __init__(self, rollout: Rollout, draws: Draws, settings: TrainSettings) -> None:
        self._rollout, self._draws, self._settings = rollout, draws, settings
        alive = (settings.staleness + 1) * settings.tasks
        self._window = min(math.ceil(WINDOW * alive), settings.tasks + 1)
        self._groups: dict[int, asyncio.Future[Group]] = {}
        self._left: dict[int, Group | None] = {}
        self._episodes: Episodes | None = None

    async def take(self, count: int, *, iterations_left: int) -> list[Group]:
        """The next groups to train on, in the order in which they were drawn. The engine is paused
        from then on, for the learner.

        Args:
            count: How many; fewer than ``tasks`` where others of the iteration are kept.
            iterations_left: This one and those after it: nothing is begun for later ones.
        """
        settings = self._settings
        if self._episodes is None:
            self._episodes = await self._rollout.episodes()
            shared(("collector", id(self)), lambda: self)  # closed before the engine
        await self._rollout.engine.start(self._rollout.limits.tokens)  # weights it lacks, too
        self.resume()
        for position, group in self._left.items():
            self._groups[position] = self._begin(position) if group is None else _found(group)
        self._left = {}
        alive = min(settings.staleness + 1, iterations_left) * settings.tasks
        while len(self._groups) + settings.tasks - count < alive:
            position = self._draws.next().position
            self._groups[position] = self._begin(position)
        taken: dict[int, Group] = {}
        while len(taken) < count:
            ones = self._in_window().values()
            await asyncio.wait(ones, return_when=asyncio.FIRST_COMPLETED)
            for position, played in self._in_window().items():
                if played.done() and len(taken) < count:
                    taken[position] = self._groups.pop(position).result()
        await self._episodes.pause()
        return [group for _, group in sorted(taken.items())]

    def resume(self) -> None:
        """The learner no longer needs the engine: what is open goes on."""
        (self._episodes or self._rollout.engine).resume()

    @property
    def seconds_sampled(self) -> float:
        """Wall time so far in which episodes waited for tokens and the engine did not rest."""
        return 0.0 if self._episodes is None else self._episodes.sampling.seconds

    def waiting(self) -> dict[int, Group | None]:
        """Groups that are not taken yet, by position; ``None`` for those that are being played."""
        now = {position: _of(group) for position, group in self._groups.items()}
        return {**self._left, **now}

    def restore(self, waiting: Mapping[int, Group | None]) -> None:
        """Goes on from what ``waiting`` gave: those that were being played begin anew."""
        self._left = dict(sorted(waiting.items()))

    async def close(self) -> None:
        """Ends what is being played."""
        episodes, self._episodes = self._episodes, None
        if episodes is not None:
            self._left = self.waiting()
            await episodes.close()
            groups, self._groups = self._groups, {}
            for group in groups.values():
                group.cancel()
            await asyncio.gather(*groups.values(), return_exceptions=True)

    def _begin(self, position: int) -> asyncio.Future[Group]:
        assert self._episodes is not None
        draw, settings = self._draws.at(position), self._settings
        return self._rollout.group(
            self._episodes,
            draw.task,
            attempts=settings.attempts,
            temperature=settings.temperature,
            seed=draw.seed,
            index=draw.index,
            first=position * settings.attempts,
        )

    def _in_window(self) -> dict[int, asyncio.Future[Group]]:
        """Groups that may be taken, oldest first."""
        end = min(self._groups, default=0) + self._window
        return {place: group for place, group in sorted(self._groups.items()) if place < end}


def _found(group: Group) -> asyncio.Future[Group]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(group)
    return future


def _of(group: asyncio.Future[Group]) -> Group | None:
    has_ended = group.done() and not group.cancelled() and group.exception() is None
    return group.result() if has_ended else None


@functools.lru_cache(maxsize=2)
def _permutation(length: int, seed: int) -> list[int]:
    order = list(range(length))
    random.Random(seed).shuffle(order)
    return order
