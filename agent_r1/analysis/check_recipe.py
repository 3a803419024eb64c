"""``agent-r1 check``: what a recipe would do, in seconds and without the model's weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent_r1.envs.check_env import check_env
from agent_r1.envs.lifecycle import close_env, make_env, played_gold, schemas_of
from agent_r1.errors import ConfigError, ExpiredError
from agent_r1.model.adapter import start_folder
from agent_r1.model.load import load_tokenizer
from agent_r1.render import RENDERERS
from agent_r1.render.calls import parse_hermes
from agent_r1.rollout.episode import render_history
from agent_r1.run.recipe import Recipe
from agent_r1.tasks import ENVS
from agent_r1.training.advice import must_fit
from agent_r1.training.build import tasks_of
from agent_r1.training.preflight import memory_of, warnings_of
from agent_r1.types import Action, Kind, Message, derive_seed
from agent_r1.utils.scope import held_up, run_async, scope
from agent_r1.utils.waiting import within


@dataclass
class DryRun:
    """Findings of ``agent-r1 check``.

    Attributes:
        segments: ``(kind, text, number of tokens)`` of one scripted episode, in order.
        rewards: Process rewards of the script's steps.
        outcome: Outcome of the script: reward, success and the metrics.
        num_tokens: Longest context of the policy, its own last turn included.
        notes: What was checked.
        warnings: Problems to expect in a run.
        memory: Estimated bytes by use.
    """

    task: str
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
        lines = [f"one episode of task {self.task}, scripted with the gold actions:"]
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
    tokenizer = load_tokenizer(recipe.model)
    renderer = RENDERERS.resolve(recipe.renderer.name)(recipe.renderer, tokenizer)
    task = tasks_of(recipe, "train")[0]
    report = DryRun(task.id, notes=notes)
    env = make_env(env_class, recipe.env)
    seconds = recipe.limits.seconds
    play = functools.partial(_play, report, recipe, env, task, renderer, tokenizer)
    try:
        run_async(within(seconds, play))
    except ExpiredError as error:
        raise ConfigError(f"the scripted episode is not done within {seconds:g} seconds") from error
    _warn(report, recipe)
    report.warnings += [*warnings_of(recipe), *held_up()]
    plan = memory_of(recipe)
    episodes = min(recipe.train.concurrency, recipe.train.tasks * recipe.train.attempts)
    report.memory = plan.figures(episodes=episodes, tokens=recipe.limits.tokens)
    return report


async def _play(
    report: DryRun, recipe: Recipe, env: Any, task: Any, renderer: Any, tokenizer: Any
) -> None:
    length = 0
    said: list[tuple[Message, tuple[int, ...]]] = []

    def add(kind: Kind, ids: tuple[int, ...]) -> None:
        nonlocal length
        report.segments.append((kind.name.lower(), tokenizer.decode(list(ids)), len(ids)))
        length = len(ids) if kind is Kind.CONTEXT else length + len(ids)
        report.num_tokens = max(report.num_tokens, length)

    messages = await env.reset(task, derive_seed(recipe.seed, task.id))
    prompt_ids = renderer.prompt(messages, schemas_of(env))
    try:
        must_fit(prompt_ids, task, recipe.limits.tokens)
    except ConfigError as error:
        report.warnings.append(str(error))
    add(Kind.OBSERVATION, prompt_ids)
    async for text in played_gold(env):
        # Scripts are written in one form; the renderer writes and reads them in its own.
        ids = renderer.encode_message(parse_hermes(text))
        action = Action(ids, (0.0,) * len(ids), (0.0,) * len(ids), 0, "stop")
        if len(ids) > recipe.limits.tokens_per_turn:
            report.warnings.append(
                f"a gold action has {len(ids)} tokens, "
                f"limits.tokens_per_turn is {recipe.limits.tokens_per_turn}"
            )
        add(Kind.ACTION, ids)
        message = renderer.parse(action)
        said.append((message, ids))
        transition = await env.step(message)
        report.rewards.append(transition.rewards)
        if transition.done:
            break
        if transition.history is not None:
            history = render_history(transition.history, env.schemas, renderer, said)
            add(Kind.CONTEXT, tuple(history))
        else:
            add(Kind.OBSERVATION, renderer.observation(transition.messages, action))
    outcome = await env.outcome()
    if said and env.schemas and not any(message.tool_calls for message, _ in said):
        report.warnings.append(
            "the gold actions use no tool: `agent-r1 sft` would teach the agent to use none"
        )
    await close_env(env)
    report.outcome = {
        "reward": outcome.reward,
        "success": float(outcome.success),
        **outcome.metrics,
    }
    num_turns = sum(kind == "action" for kind, _, _ in report.segments)
    if num_turns > recipe.limits.turns:
        report.warnings.append(
            f"the gold actions need {num_turns} turns, limits.turns is {recipe.limits.turns}"
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
