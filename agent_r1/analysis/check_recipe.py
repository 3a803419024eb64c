"""``agent-r1 check``: what a recipe would do, in seconds and without the model's weights."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from agent_r1.algorithms import ALGORITHMS
from agent_r1.algorithms.base import GroupAlgorithm
from agent_r1.envs.base import Env, Leader
from agent_r1.envs.check_env import check_env
from agent_r1.envs.lifecycle import make_env, schemas_of
from agent_r1.errors import ConfigError
from agent_r1.model.adapter import start_folder
from agent_r1.model.load import load_policy, load_tokenizer
from agent_r1.render import RENDERERS
from agent_r1.rollout import ENGINES
from agent_r1.rollout.conversation import Limits
from agent_r1.rollout.gold_episode import play_gold
from agent_r1.run.recipe import Recipe
from agent_r1.tasks import ENVS
from agent_r1.training.advice import must_fit
from agent_r1.training.build import make_rollout, set_up_process, tasks_of
from agent_r1.training.preflight import memory_of, warnings_of
from agent_r1.tree import build_tree
from agent_r1.types import Kind, StopReason, Task, Trajectory
from agent_r1.utils.scope import held_up, run_async, scope
from agent_r1.utils.text import describe, place_of

MANY = 10**6
"""Turns and tokens without a limit, so that the episode shows what it needs."""


@dataclass
class DryRun:
    """Findings of ``agent-r1 check``.

    Attributes:
        player: Who played the episode.
        calls: How the calls of an agent that asks for its turns were taken up.
        segments: ``(kind, text, number of tokens)`` of one episode, in order.
        rewards: Process rewards of the script's steps.
        outcome: Outcome of the script: reward, success and the metrics.
        num_tokens: Longest context of the policy, its own last turn included.
        notes: What was checked.
        warnings: Problems to expect in a run.
        memory: Estimated bytes by use.
    """

    task: str
    player: str = "scripted with the gold actions"
    calls: list[str] = field(default_factory=list)
    segments: list[tuple[str, str, int]] = field(default_factory=list)
    rewards: list[dict[str, float]] = field(default_factory=list)
    outcome: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__}

    def as_text(self) -> str:
        lines = [f"one episode of task {self.task}, {self.player}:"]
        lines += self.calls
        for kind, text, count in self.segments:
            lines.append(f"--- {kind}, {count} tokens")
            lines.append(text)
        lines.append(f"--- {self.num_tokens} tokens at most")
        lines += [f"process rewards of step {n}: {r}" for n, r in enumerate(self.rewards, 1) if r]
        if self.outcome:
            figures = ", ".join(f"{name} {value:g}" for name, value in self.outcome.items())
            lines.append(f"its outcome: {figures}")
        lines += [
            f"memory, estimated: {use} {size / 2**20:,.0f} MiB" for use, size in self.memory.items()
        ]
        lines += [f"ok: {note}" for note in self.notes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


@scope()
def dry_run(
    recipe: Recipe, tell: Callable[[str, int], None] = lambda stage, number: None
) -> DryRun:
    """Checks the environment, plays one task with its gold actions through the real tokenizer,
    estimates memory; ``tell`` as in ``check_env``.
    """
    env_class = ENVS.resolve(recipe.env.name)
    notes = check_env(env_class, recipe.env, seconds=recipe.limits.seconds, tell=tell)
    start_folder(recipe.model.lora)
    task = tasks_of(recipe, "train")[0]
    report = DryRun(task.id, notes=notes)
    if issubclass(env_class, Leader):
        _have_agent_play(report, recipe, task)
    else:
        _play_gold(report, recipe, env_class, task)
    _warn(report, recipe)
    report.notes += _tried(recipe)
    report.notes += _engine_proven(recipe)
    report.warnings += [*warnings_of(recipe), *held_up()]
    plan = memory_of(recipe)
    episodes = min(recipe.train.concurrency, recipe.train.tasks * recipe.train.attempts)
    report.memory = plan.figures(episodes=episodes, tokens=recipe.limits.tokens)
    return report


def _have_agent_play(report: DryRun, recipe: Recipe, task: Task) -> None:
    """Has an agent that asks for its turns do one task with the model as it is."""
    report.player = "played by the agent with the model as it is"
    set_up_process(recipe)
    policy = load_policy(recipe.model)
    rollout = make_rollout(recipe, policy, concurrency=1)
    made: list[Any] = []

    def make() -> Env:
        made.append(rollout.make_env())
        return made[-1]  # type: ignore[no-any-return]

    once = dataclasses.replace(rollout, make_env=make)
    (group,) = run_async(
        once.run([task], attempts=1, temperature=recipe.train.temperature, seed=recipe.seed)
    )
    (trajectory,) = group.trajectories
    if trajectory.outcome is None:
        raise ConfigError(f"the agent fails: {trajectory.fault}")
    report.calls = list(made[-1].taken_up())
    _write(report, recipe, task, trajectory, policy.tokenizer)
    authors = Counter[Kind]()
    for node in build_tree(group).nodes:
        authors[node.kind] += len(node.token_ids)
    report.notes.append(
        f"who wrote the tokens: {authors[Kind.ACTION]} are the agent's, as sampled, each trained "
        f"on once; {authors[Kind.OBSERVATION]} are the client's; {authors[Kind.CONTEXT]} are in "
        "branches, and trained on nowhere"
    )


def _play_gold(report: DryRun, recipe: Recipe, env_class: type[Any], task: Task) -> None:
    """Plays one task with its gold actions."""
    tokenizer = load_tokenizer(recipe.model)
    renderer = RENDERERS.make(recipe.renderer, tokenizer)
    made: list[Env] = []

    def make() -> Env:
        made.append(make_env(env_class, recipe.env))
        return made[-1]

    seconds = recipe.limits.seconds
    limits = Limits(turns=MANY, tokens_per_turn=MANY, tokens=MANY, seconds=seconds)
    trajectory, _ = run_async(play_gold(make, renderer, limits, task, recipe.seed))
    if trajectory.stop is StopReason.MAX_TIME:
        raise ConfigError(f"the scripted episode is not done within {seconds:g} seconds")
    if trajectory.outcome is None:
        raise ConfigError(f"the scripted episode fails: {trajectory.fault}")
    _write(report, recipe, task, trajectory, tokenizer)
    said = [step.message for step in trajectory.steps]
    if said and schemas_of(made[-1]) and not any(message.tool_calls for message in said):
        report.warnings.append(
            "the gold actions use no tool: `agent-r1 sft` would teach the agent to use none"
        )


def _engine_proven(recipe: Recipe) -> list[str]:
    """Starts an engine whose log-probabilities could be others than the learner's, and has it prove
    that they are not. Needs the model's weights.
    """
    engine_class = ENGINES.resolve(recipe.engine.name)
    engine_class.must_serve(recipe.engine, recipe.model)
    if engine_class.traits.exact:
        return []
    engine = make_rollout(recipe, load_policy(recipe.model), concurrency=1).engine

    async def prove() -> None:
        try:
            await engine.start(recipe.limits.tokens)
        finally:
            await engine.close()

    run_async(prove())
    return [f"engine {recipe.engine.name!r} samples what the learner computes"]


def _tried(recipe: Recipe) -> Iterator[str]:
    """What the algorithm makes of a group, where that follows from returns alone."""
    algorithm = ALGORITHMS.make(recipe.algorithm)
    if getattr(type(algorithm), "advantages", None) is not GroupAlgorithm.advantages:
        return
    assert isinstance(algorithm, GroupAlgorithm)
    name = recipe.algorithm.name.rpartition("/")[2]
    for returns in ([1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]):
        try:
            given = algorithm.compared(returns)
        except Exception as error:  # its author's code
            raise ConfigError(f"algorithm {name}: {describe(error)}{place_of(error)}") from error
        shown = (" ".join(f"{value:g}" for value in values) for values in (returns, given))
        yield f"{name}: returns {next(shown)} become advantages {next(shown)}"


def _write(
    report: DryRun, recipe: Recipe, task: Task, trajectory: Trajectory, tokenizer: Any
) -> None:
    """Writes an episode into the report, and what the recipe's limits would do to it."""
    limits, length = recipe.limits, 0

    def add(kind: Kind, ids: tuple[int, ...]) -> None:
        nonlocal length
        report.segments.append((kind.name.lower(), tokenizer.decode(list(ids)), len(ids)))
        length = len(ids) if kind is Kind.CONTEXT else length + len(ids)
        report.num_tokens = max(report.num_tokens, length)

    try:
        must_fit(trajectory.prompt_ids, task, limits.tokens)
    except ConfigError as error:
        report.warnings.append(str(error))
    add(Kind.OBSERVATION, trajectory.prompt_ids)
    for step in trajectory.steps:
        if step.context_ids is not None:
            add(Kind.CONTEXT, step.context_ids)
        if (count := len(step.action.token_ids)) > limits.tokens_per_turn:
            report.warnings.append(
                f"a gold action has {count} tokens, "
                f"limits.tokens_per_turn is {limits.tokens_per_turn}"
            )
        add(Kind.ACTION, step.action.token_ids)
        report.rewards.append(step.rewards)
        if step.observation_ids:
            add(Kind.OBSERVATION, step.observation_ids)
    outcome = trajectory.outcome
    assert outcome is not None
    success = float(outcome.success)
    report.outcome = {"reward": outcome.reward, "success": success, **outcome.metrics}
    if (turns := len(trajectory.steps)) > limits.turns:
        report.warnings.append(
            f"the gold actions need {turns} turns, limits.turns is {limits.turns}"
        )


def _warn(report: DryRun, recipe: Recipe) -> None:
    if report.num_tokens > recipe.limits.tokens:
        report.warnings.append(
            f"the gold episode has {report.num_tokens} tokens at once, "
            f"limits.tokens is {recipe.limits.tokens}"
        )
    parts = getattr(ENVS.resolve(recipe.env.name), "reward_parts", ())
    if parts and recipe.credit.name == "outcome":
        report.notes.append(
            f"process rewards ({', '.join(parts)}) are recorded, not trained on; "
            "[credit] name = 'step' would use them"
        )
