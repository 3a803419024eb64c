"""``check_env``: does an environment keep its promises? For authors, before any model is loaded."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from agent_r1.config.section import NamedSection
from agent_r1.envs.base import Env, Leader
from agent_r1.envs.gold import all_in_words, as_message, in_words, played_gold
from agent_r1.envs.lifecycle import (
    close_env,
    make_env,
    plain_outcome,
    plain_rewards,
    schemas_of,
    tasks_of,
    tidy,
)
from agent_r1.errors import ConfigError, EnvCheckError, ExpiredError
from agent_r1.types import MalformedCall, Message, Outcome, Task, ToolCall, derive_seed
from agent_r1.utils.scope import run_async
from agent_r1.utils.text import clean, describe, place_of
from agent_r1.utils.waiting import within

BAD_ACTIONS = (
    Message("assistant", "", (ToolCall("no_such_tool", {}),)),
    Message("assistant", "", (MalformedCall("{broken", "the call is not valid JSON"),)),
    Message("assistant", "", (MalformedCall('{"name": 7}', "the call has no name"),)),
)
"""What an untrained agent writes; each must become an observation."""
MAX_PROBLEMS = 12
"""Most problems reported; more would not be read."""
MAX_LAZY = 64
"""Most tasks of a lazy sequence that are checked."""
BUDGET_SECONDS = 20.0
"""Time after which no further task of a split is played."""
MAX_EXPIRED = 1
"""Episodes that run out of time, after which no other is tried."""
_THREADS = (
    "; plain code of an episode runs in one thread of its own, async code in the event loop: make "
    "all that uses this state plain ('def'), or all of it async"
)
MAX_MOVES = 12
"""Number of random valid actions played in a game."""


def check_env(
    env: type[Env],
    settings: NamedSection | None = None,
    *,
    num_tasks: int = 4,
    seed: int = 0,
    seconds: float = 30.0,
    tell: Callable[[str, int], None] = lambda split, number: None,
) -> list[str]:
    """Plays some tasks of every split twice with scripted actions and compares; looks at every row.

    Proves on those tasks that the environment is deterministic under a seed, that it survives bad
    actions and, if it is a game that offers ``random_action(seed)``, valid ones; that its gold
    actions never fail and its scorer accepts them, but not a missing answer; that only declared
    process rewards are given. Of all tasks, except in lazy sequences, proves that ids differ within
    a split and between splits, and that the tasks can be stored.

    Args:
        env: The class, e.g. a subclass of ``ToolEnv``.
        settings: Its section; by default ``env.Settings`` with nothing but a name.
        num_tasks: Tasks of each split that are played.
        seed: Seed of the episodes.
        seconds: Time limit of one scripted episode.
        tell: Called with the split and the number of tasks begun.

    Returns:
        What was checked, one line each.

    Raises:
        EnvCheckError: Lists all that is wrong.
    """
    own: type[NamedSection] = env.Settings  # type: ignore[attr-defined]
    settings = settings or own.model_validate({"name": env.__name__})
    return run_async(_check(env, settings, num_tasks, seed, seconds, tell))


class _Problems:
    """What is wrong, each thing once, with the first task that shows it."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, list[str]]] = {}
        self.num_expired = 0

    def add(self, line: str, task: str | None = None, key: str | None = None) -> None:
        """``key``: what makes two lines the same problem, by default the line."""
        _, tasks = self._found.setdefault(key or line, (line, []))
        tasks += [] if task is None else [task]

    def lines(self) -> list[str]:
        lines = []
        for line, tasks in self._found.values():
            others = len(set(tasks)) - 1
            more = f" (and {others} more tasks)" if others > 0 else ""
            lines.append(f"task {tasks[0]!r}: {line}{more}" if tasks else line)
        if len(lines) > MAX_PROBLEMS:
            lines[MAX_PROBLEMS:] = [f"and {len(lines) - MAX_PROBLEMS} more"]
        return lines


async def _check(
    env: type[Any],
    settings: NamedSection,
    num_tasks: int,
    seed: int,
    seconds: float,
    tell: Callable[[str, int], None],
) -> list[str]:
    problems = _Problems()
    notes: list[str] = []
    start = time.monotonic()
    seen: dict[str, str] = {}
    num_gold = num_played = num_checked = num_random = 0
    for split in ("train", "validation", "test"):
        try:
            tasks = tasks_of(env, settings, split)
        except ConfigError as error:
            raise EnvCheckError(str(error)) from error
        notes.append(f"{split}: {len(tasks):,} tasks")
        if len(tasks) == 0:
            problems.add(f"split {split!r} has no tasks")
        for line, task_id in _rows(tasks, split, seen):
            problems.add(line, task_id)
        for task in () if issubclass(env, Leader) else tasks[:num_tasks]:
            if problems.num_expired >= MAX_EXPIRED:
                break  # the others would only take as long
            if num_checked and time.monotonic() - start > BUDGET_SECONDS:
                notes.append(f"slow: only {num_checked} tasks were played in {BUDGET_SECONDS:g} s")
                break
            num_checked += 1
            tell(split, num_checked)
            played = _Played(env, settings, task, derive_seed(seed, task.id), seconds, problems)
            counts = await _check_task(played, problems)
            num_played, num_random, num_gold = (
                sum(pair) for pair in zip((num_played, num_random, num_gold), counts, strict=True)
            )
    if lines := problems.lines():
        raise EnvCheckError(f"{env.__name__}:\n- " + "\n- ".join(lines))
    if issubclass(env, Leader):  # its agent needs a model
        return notes
    notes.append(f"deterministic under a seed in {num_played} episodes")
    if num_random:
        notes.append(f"{num_random} random valid actions were played")
    if num_gold:
        notes.append(f"the scorer accepts its own gold answer in {num_gold} of {num_checked} tasks")
    else:
        notes.append("no gold answers: set Task.answer or write gold() to have the scorer checked")
    return notes


async def _check_task(played: _Played, problems: _Problems) -> tuple[int, int, int]:
    """Plays one task in every way; returns the numbers of episodes, of random actions, and of
    scored gold episodes.
    """
    task_id = played.task.id
    gold, moves = await played.gold(), await played.random_actions()
    scripts = [[*BAD_ACTIONS], [*gold], [*BAD_ACTIONS[:1], *gold], *([moves] if moves else [])]
    for script in scripts:
        first, second = await played.play(script), await played.play(script)
        if first != second:
            difference = _difference(first, second)
            problems.add(f"two episodes with the same seed differ: {difference}", task_id)
    is_scored = bool(gold) and played.gold_is_whole
    if is_scored:
        outcome = (await played.play(gold, strict=not _is_noisy(played.settings)))[-1]
        if isinstance(outcome, Outcome) and not outcome.success:
            problems.add(
                f"the scorer does not accept the gold answer {in_words(gold[-1])!r:.200}: "
                f"{outcome!r:.200}",
                task_id,
            )
    nothing = (await played.play([]))[-1]
    if isinstance(nothing, Outcome) and nothing.success:
        problems.add("an episode without any answer counts as success", task_id)
    return 2 * len(scripts), len(moves), int(is_scored)


def _rows(
    tasks: Sequence[Task], split: str, seen: dict[str, str]
) -> Iterator[tuple[str, str | None]]:
    """Problems of tasks found without playing them, each with its task's id."""
    here: set[tuple[str, str]] = set()
    for task in tasks if isinstance(tasks, list | tuple) else tasks[:MAX_LAZY]:
        if (other := seen.setdefault(task.id, split)) != split:
            yield f"its id stands in split {other!r} and again in {split!r}", task.id
        # Training data may repeat a task; two different questions may not share an id.
        here.add((task.id, task.question))
        if not isinstance(task.question, str) or not isinstance(task.answer, str):
            yield "question and answer must be texts", task.id
        elif clean(task.question) != task.question:
            yield "its question has half characters or NUL, which no run can store", task.id
        try:
            json.dumps(task.data, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            yield f"Task.data must be plain JSON values: {describe(error)}", task.id
    for task_id, count in Counter(task_id for task_id, _ in here).items():
        if count > 1:
            yield f"{count} different questions of split {split!r} have this id", task_id


def _is_noisy(settings: Any) -> bool:
    return getattr(settings, "noise", None) is not None


def _difference(first: list[Any], second: list[Any]) -> str:
    """The first difference of two episodes."""
    for number, (one, other) in enumerate(itertools.zip_longest(first, second)):
        if one != other:
            where = ("the opening", "the tools")[number] if number < 2 else f"step {number - 1}"
            return f"{where} gave {one!r:.300} and then {other!r:.300}"
    return ""


class _Played:
    """Plays scripts on one task; exceptions become problems."""

    def __init__(
        self,
        env: type[Any],
        settings: NamedSection,
        task: Task,
        seed: int,
        seconds: float,
        problems: _Problems,
    ) -> None:
        self._env, self.settings = env, settings
        self.task, self._seed = task, seed
        self._seconds, self._problems = seconds, problems
        self._parts: Sequence[str] | None = getattr(env, "reward_parts", None)
        self.gold_is_whole = False

    async def gold(self) -> list[Message]:
        """Plays the environment's own solution; its actions, or none if it fails."""
        actions: list[Message] = []

        async def work(env: Any) -> None:
            await env.reset(self.task, self._seed)
            async for message in played_gold(env):
                actions.append(message)
                if (await env.step(message)).done:
                    break
            self.gold_is_whole = True

        def when() -> str:
            return f"after {all_in_words(actions)}" if actions else "at the start"

        await self._within(work, when)
        return actions if self.gold_is_whole else []

    async def random_actions(self) -> list[Message]:
        """Valid actions of a game that offers them, to be played."""
        if not hasattr(self._env, "random_action"):
            return []
        moves: list[Message] = []

        async def work(env: Any) -> None:
            for n in range(MAX_MOVES):
                moves.append(as_message(env.random_action(derive_seed(self._seed, n))))

        await self._within(work, lambda: "in random_action()")
        return moves

    async def play(self, script: Sequence[Message], *, strict: bool = False) -> list[Any]:
        """Everything the environment gave, the outcome last; with ``strict``, a tool that fails
        is a problem, too.
        """
        given: list[Any] = []

        async def work(env: Any) -> None:
            given.append(tuple(map(tidy, await env.reset(self.task, self._seed))))
            if not given[0]:
                self._problem("reset gave no messages")
            given.append(schemas_of(env))
            for message in script:
                transition = await env.step(message)
                given.append(transition)
                for part in plain_rewards(transition):
                    if self._parts is not None and part not in self._parts:
                        self._problem(
                            f"process reward {part!r} is not in reward_parts; declare it: "
                            f"reward_parts = {(*self._parts, part)!r}"
                        )
                for event in transition.events if strict else ():
                    seen = "; ".join(shown.content for shown in transition.messages)
                    hint = _THREADS if "thread" in seen else ""
                    self._problem(
                        f"the gold action {in_words(message)!r:.200} gives {event}: "
                        f"{seen!r:.300}{hint}"
                    )
                if transition.done:
                    break
            given.append(plain_outcome(await env.outcome()))

        error = await self._within(work, lambda: f"after {all_in_words(script)}")
        if error is not None:
            given.append(error)
        return given

    def _problem(self, line: str, key: str | None = None) -> None:
        self._problems.add(line, self.task.id, key)

    async def _within(
        self, work: Callable[[Any], Awaitable[None]], when: Callable[[], str]
    ) -> str | None:
        """Plays on a fresh environment; returns what went wrong, or ``None``."""
        env: Any = None
        seconds = self._seconds
        line: str | None = None
        try:
            env = make_env(self._env, self.settings)
            await within(seconds, functools.partial(work, env))
        except ConfigError:
            raise
        except ExpiredError:
            self._problems.num_expired += 1
            line = f"not done within {seconds:g} seconds"
            self._problem(f"{line} {when()}", line)
        except Exception as error:  # the author's code: reported, with what led to it
            line = describe(error)
            kind, _, words = line.partition(": ")
            place = place_of(error)
            hint = _THREADS if "thread" in words else ""
            self._problem(f"{kind} {when()}: {words}{place}{hint}", line + place)
        finally:
            if env is not None:
                try:
                    await within(seconds, functools.partial(close_env, env))
                except ExpiredError:
                    self._problem(f"close() is not done within {seconds:g} seconds")
                except Exception as error:
                    self._problem(f"close(): {describe(error)}{place_of(error)}")
        return line
