"""Checks and warnings before a run is made or a model loaded."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from agent_r1.algorithms import ALGORITHMS
from agent_r1.envs.base import Leader
from agent_r1.envs.lifecycle import close_env, make_env, schemas_of
from agent_r1.errors import ConfigError, ExpiredError
from agent_r1.learner.memory_plan import MemoryPlan, plan_memory
from agent_r1.model.adapter import start_folder
from agent_r1.model.load import check_sizes, device_of, load_config, load_tokenizer
from agent_r1.model.products import are_of_use, must_be_of_use
from agent_r1.render import RENDERERS, Renderer
from agent_r1.rollout import ENGINES
from agent_r1.run.recipe import Recipe
from agent_r1.run.trackers import TRACKERS
from agent_r1.tasks import ENVS
from agent_r1.tasks.row_file import left_out
from agent_r1.training.advice import must_fit, on_sets
from agent_r1.training.build import tasks_of
from agent_r1.training.demonstrations import (
    GOLD,
    PastDemonstrations,
    open_runs,
)
from agent_r1.utils.scope import run_async
from agent_r1.utils.text import describe, place_of
from agent_r1.utils.waiting import within


def preflight(recipe: Recipe) -> None:
    """Raises all errors that can be found before a run folder is made or a model loaded."""
    for split in ("train", "validation", *(["test"] if recipe.evaluation.test_tasks else [])):
        tasks_of(recipe, split)
    config = load_config(recipe.model)
    must_be_of_use(recipe.model, device_of(recipe.model))
    start_folder(recipe.model.lora)
    algorithm = ALGORITHMS.resolve(recipe.algorithm.name)
    if algorithm.demonstrated and getattr(recipe.algorithm, "source", GOLD) != GOLD:
        PastDemonstrations(open_runs(recipe), getattr(recipe.algorithm, "require", {}))
    ENGINES.resolve(recipe.engine.name).must_serve(recipe.engine, recipe.model)
    if (timeout := getattr(recipe.engine, "timeout", 0.0)) >= recipe.limits.seconds:
        raise ConfigError(
            f"engine.timeout = {timeout:g}: an episode would end before (limits.seconds = "
            f"{recipe.limits.seconds:g}), and a server that hangs would not be noticed"
        )
    if recipe.learner.attention == "flex" and device_of(recipe.model).type == "cpu":
        raise ConfigError(
            "learner.attention = 'flex': FlexAttention has no backward pass on a CPU; take 'parts'"
        )
    for section in recipe.trackers:
        TRACKERS.make(section)
    tokenizer = load_tokenizer(recipe.model)
    check_sizes(config, tokenizer, longest=recipe.limits.tokens)
    renderer = RENDERERS.make(recipe.renderer, tokenizer)
    memory_of(recipe)
    run_async(try_env(recipe, renderer))


def memory_of(recipe: Recipe) -> MemoryPlan:
    """The memory that a run needs; an error if it is too much."""
    return plan_memory(
        load_config(recipe.model),
        recipe.model,
        recipe.learner,
        device=device_of(recipe.model),
        longest=recipe.limits.tokens,
        reference=recipe.algorithm.model_dump().get("kl") is not None,
    )


async def try_env(recipe: Recipe, renderer: Renderer) -> bool:
    """Starts one episode, to prove that files and libraries which episodes need are there. Returns
    whether the agent has tools.
    """
    task = tasks_of(recipe, "train")[0]
    seconds = recipe.limits.seconds
    try:
        env = make_env(ENVS.resolve(recipe.env.name), recipe.env)
        if isinstance(env, Leader):  # its agent asks for turns, and a model is not here yet
            await within(seconds, lambda: close_env(env))
            return True
        prompt = await within(seconds, lambda: env.reset(task, recipe.seed))
        schemas = schemas_of(env)
        must_fit(renderer.prompt(prompt, schemas), task, recipe.limits.tokens)
        has_tools = bool(schemas)
        await within(seconds, lambda: close_env(env))
        return has_tools
    except ConfigError:
        raise
    except ExpiredError as error:
        raise ConfigError(
            f"env {recipe.env.name!r} does not start task {task.id!r} within limits.seconds = "
            f"{seconds:g}"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"env {recipe.env.name!r} cannot start task {task.id!r}: {describe(error)}"
            f"{place_of(error)}; `agent-r1 check` tells more"
        ) from error


def warnings_of(recipe: Recipe) -> Iterator[str]:
    """Warnings about a recipe and its data before a run, one line each."""
    env = ENVS.resolve(recipe.env.name)
    sizes = {split: len(tasks_of(recipe, split)) for split in ("train", "validation")}
    if recipe.evaluation.test_tasks:
        sizes["test"] = len(tasks_of(recipe, "test"))
    yield from on_sets(recipe, sizes).values()
    yield from _too_late(recipe)
    yield from getattr(env, "check_data", lambda settings: ())(recipe.env)
    yield from left_out()
    positions = getattr(load_config(recipe.model), "max_position_embeddings", None)
    if positions and positions < recipe.limits.tokens:
        yield (
            f"limits.tokens = {recipe.limits.tokens}: the model was made for {positions} "
            "positions; beyond them its output gets worse"
        )
    if recipe.model.matmul is not None and not are_of_use(device_of(recipe.model)):
        yield (  # a run that was made elsewhere
            f"model.matmul = {recipe.model.matmul!r} has no effect here, where there are no matrix "
            "units for it: numbers are others than on a machine with them"
        )
    template = load_tokenizer(recipe.model).chat_template
    if recipe.renderer.name == "template" and "strftime_now" in str(template):
        yield (
            "the model's chat template writes today's date: on another day the prompts, and a "
            "resumed run, are others; a renderer of the format's own (llama3 has a date) pins it"
        )
    if device_of(recipe.model).type == "cuda" and (others := torch.cuda.device_count() - 1) > 0:
        yield f"one GPU is used, {others} more are idle: CUDA_VISIBLE_DEVICES chooses which"


def _too_late(recipe: Recipe) -> Iterator[str]:
    """Settings that a run of this size cannot use; runs may be lengthened."""
    within = f"with train.iterations = {recipe.train.iterations}"
    if recipe.evaluation.every > recipe.train.iterations:
        every = f"evaluation.every = {recipe.evaluation.every}"
        yield f"{every}: {within} there is a validation at the start and one at the end"
    if 0 < recipe.train.iterations <= recipe.learner.warmup:
        yield f"learner.warmup = {recipe.learner.warmup}: {within} learner.lr is hardly reached"
    if recipe.learner.minibatches > recipe.train.tasks:
        parts = f"learner.minibatches = {recipe.learner.minibatches}"
        yield f"{parts}: train.tasks = {recipe.train.tasks} groups make no more than that many"
    if 0 < recipe.train.iterations <= getattr(recipe.algorithm, "critic_warmup", 0):
        yield f"algorithm.critic_warmup: {within} the policy is never trained"
