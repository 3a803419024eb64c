"""Objects of a run from its recipe: environment, engine, renderer, tasks, demonstrations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from agent_r1.envs.lifecycle import make_env
from agent_r1.envs.lifecycle import tasks_of as tasks_of_env
from agent_r1.errors import ConfigError
from agent_r1.model.load import device_of
from agent_r1.model.policy import Policy
from agent_r1.model.products import set_products
from agent_r1.render import RENDERERS
from agent_r1.rollout import ENGINES
from agent_r1.rollout.rollout import Rollout
from agent_r1.run.recipe import Recipe
from agent_r1.tasks import ENVS
from agent_r1.training.demonstrations import (
    GOLD,
    Demonstrations,
    GoldDemonstrations,
    PastDemonstrations,
    open_runs,
)
from agent_r1.types import Task


def make_rollout(recipe: Recipe, policy: Policy, *, concurrency: int) -> Rollout:
    """Environment, engine and renderer of a recipe, around a policy."""
    env = ENVS.resolve(recipe.env.name)
    renderer = RENDERERS.make(recipe.renderer, policy.tokenizer)
    policy.stops_at(renderer.stop_token_ids)
    return Rollout(
        make_env=functools.partial(make_env, env, recipe.env),
        engine=ENGINES.make(recipe.engine, policy),
        renderer=renderer,
        limits=recipe.limits,
        concurrency=concurrency,
    )


def evaluator(rollout: Rollout, recipe: Recipe) -> Rollout:
    """The rollout for evaluation, where sampling may leave out improbable tokens."""
    settings = recipe.evaluation
    return dataclasses.replace(
        rollout, concurrency=settings.concurrency, top_p=settings.top_p, top_k=settings.top_k
    )


def tasks_of(recipe: Recipe, split: str) -> Sequence[Task]:
    """The environment's tasks of a split; an empty split is an error."""
    tasks = tasks_of_env(ENVS.resolve(recipe.env.name), recipe.env, split)
    if len(tasks) == 0:
        raise ConfigError(f"env {recipe.env.name!r} has no tasks in its split {split!r}")
    return tasks


def demonstrations_of(recipe: Recipe, rollout: Rollout) -> Demonstrations:
    """The demonstrations that a recipe imitates."""
    settings: Any = recipe.algorithm
    if settings.source == GOLD:
        return GoldDemonstrations(rollout, tasks_of(recipe, "train"), settings.require)
    return PastDemonstrations(open_runs(recipe), settings.require)


def set_up_process(recipe: Recipe) -> None:
    """Fixes what holds for all of torch: the number of CPU threads, which the last bits of matrix
    products depend on, and how those are computed.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    set_products(recipe.model, device_of(recipe.model))
