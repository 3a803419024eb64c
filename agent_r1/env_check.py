"""``check_env``: does an environment keep its promises? For authors, before any model is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from agent_r1.config import ConfigError, NamedSection
from agent_r1.env import Env, gold_of, make_env
from agent_r1.render.calls import parse_hermes
from agent_r1.run_async import run_async
from agent_r1.types import Outcome, Task, derive_seed

BAD_ACTIONS = (
    '<tool_call>\n{"name": "no_such_tool", "arguments": {}}\n</tool_call>',
    "<tool_call>\n{broken\n</tool_call>",
    '<tool_call>\n{"name": 7}\n</tool_call>',
)
"""What an untrained agent writes; each must become an observation."""


class EnvCheckError(ValueError):
    """The environment breaks its contract; the message lists every way found."""


def check_env(
    env: type[Any], settings: NamedSection | None = None, *, num_tasks: int = 4, seed: int = 0
) -> list[str]:
    """Plays some tasks of every split twice with scripted actions and compares.

    Proves on those tasks that the environment is deterministic under a seed, that it survives bad
    actions, that its scorer accepts its own gold answer and not the lack of one, that it gives
    only the process rewards it declares, and that no task is in two splits.

    Args:
        env: The class, e.g. a subclass of ``ToolEnv``.
        settings: Its section; by default ``env.Settings`` with nothing but a name.
        num_tasks: Tasks of each split.
        seed: Of the episodes.

    Returns:
        What was checked, one line each.

    Raises:
        EnvCheckError: What is wrong, all of it.
    """
    settings = settings or env.Settings.model_validate({"name": env.__name__})
    return run_async(_check(env, settings, num_tasks, seed))


async def _check(env: type[Any], settings: NamedSection, num_tasks: int, seed: int) -> list[str]:
    problems: list[str] = []
    notes: list[str] = []
    seen: dict[str, str] = {}
    num_gold = num_played = 0
    for split in ("train", "validation", "test"):
        try:
            tasks = env.tasks(settings, split)
        except NotImplementedError as error:
            raise EnvCheckError(str(error)) from error
        notes.append(f"{split}: {len(tasks):,} tasks")
        if len(tasks) == 0:
            problems.append(f"split {split!r} has no tasks")
        for task in tasks[:num_tasks]:
            if (other := seen.get(task.id, split)) != split:
                problems.append(
                    f"task id {task.id!r} stands in split {other!r} and again in {split!r}"
                )
            seen[task.id] = split
            played = _Played(env, settings, task, derive_seed(seed, task.id))
            gold = await played.gold()
            scripts = [[*BAD_ACTIONS], [*gold], [*BAD_ACTIONS[:1], *gold]]
            for script in scripts:
                first, second = await played.play(script), await played.play(script)
                num_played += 2
                if first != second:
                    problems.append(
                        f"task {task.id!r}: two episodes with the same seed differ: "
                        f"{_difference(first, second)}"
                    )
                problems += [f"task {task.id!r}: {line}" for line in played.problems]
                played.problems.clear()
            if gold:
                num_gold += 1
                outcome = (await played.play(gold))[-1]
                if not (isinstance(outcome, Outcome) and outcome.success):
                    problems.append(
                        f"task {task.id!r}: the scorer does not accept the gold answer "
                        f"{gold[-1]!r:.200}: {outcome!r:.200}"
                    )
            nothing = (await played.play([]))[-1]
            if isinstance(nothing, Outcome) and nothing.success:
                problems.append(
                    f"task {task.id!r}: an episode without any answer counts as success"
                )
    if problems:
        unique = list(dict.fromkeys(problems))
        raise EnvCheckError(f"{env.__name__}:\n- " + "\n- ".join(unique))
    notes.append(f"deterministic under a seed in {num_played} episodes")
    if num_gold:
        notes.append(f"the scorer accepts its own gold answer in {num_gold} of {len(seen)} tasks")
    else:
        notes.append("no gold answers: set Task.answer or write gold() to have the scorer checked")
    return notes


def _difference(first: list[Any], second: list[Any]) -> str:
    """Where two episodes part, in words."""
    for number, (one, other) in enumerate(itertools.zip_longest(first, second)):
        if one != other:
            where = ("the opening", "the tools")[number] if number < 2 else f"step {number - 1}"
            return f"{where} gave {one!r:.300} and then {other!r:.300}"
    return ""


class _Played:
    """Plays scripts on one task; exceptions become problems."""

    def __init__(self, env: type[Any], settings: NamedSection, task: Task, seed: int) -> None:
        self._env, self._settings = env, settings
        self._task, self._seed = task, seed
        self._parts: Sequence[str] | None = getattr(env, "reward_parts", None)
        self.problems: list[str] = []

    async def gold(self) -> list[str]:
        """The environment's own solution, played; none if it has none or fails."""
        actions: list[str] = []
        try:
            env: Any = make_env(self._env, self._settings)
            await env.reset(self._task, self._seed)
            for text in gold_of(env):
                actions.append(text)
                if (await env.step(parse_hermes(text))).done:
                    break
            await env.close()
        except ConfigError:
            raise
        except Exception as error:  # the author's code
            when = f"after {actions!r:.200}" if actions else "before the first action"
            self.problems.append(f"{type(error).__name__} {when}: {error}")
            return []
        return actions

    async def play(self, script: Sequence[str]) -> list[Any]:
        """Everything the environment gave, the outcome last."""
        env: Env | None = None
        given: list[Any] = []
        try:
            env = make_env(self._env, self._settings)
            given.append(tuple(await env.reset(self._task, self._seed)))
            if not given[0]:
                self.problems.append("reset gave no messages")
            given.append(list(env.schemas))
            for text in script:
                transition = await env.step(parse_hermes(text))
                given.append(transition)
                for part in transition.rewards:
                    if self._parts is not None and part not in self._parts:
                        self.problems.append(f"process reward {part!r} is not in reward_parts")
                if transition.done:
                    break
            given.append(await env.outcome())
        except ConfigError:
            raise
        except Exception as error:  # the author's code: reported, with what led to it
            self.problems.append(f"{type(error).__name__} after {list(script)!r:.200}: {error}")
            given.append(f"{type(error).__name__}: {error}")
        finally:
            if env is not None:
                await env.close()
        return given
