"""One job of an experiment, in its own process: train or resume, test, write the results."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import threading
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import TextIO

from agent_r1.bench.experiment import Job, TaskSet, digest
from agent_r1.model.checkpoint_folder import model_folder
from agent_r1.run.checkpoint import last_state
from agent_r1.run.folder import RunFolder
from agent_r1.run.recipe import Recipe
from agent_r1.utils.durable import write_atomically
from agent_r1.utils.run_files import BEST, is_run


def run_job(job: Job, runs: Path) -> None:
    """Does the remaining work of a job; printed output goes to ``log.txt`` in its folder."""
    folder = runs / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        _lock(log, folder)
        try:
            _do(job, folder)
        except Exception:
            traceback.print_exc(file=log)
            raise


def _lock(log: TextIO, folder: Path) -> None:
    """Locks the run until the process ends: experiments may share it."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RuntimeError(f"another experiment is at work in {folder}") from error


def _do(job: Job, folder: Path) -> None:
    if job.train:
        _train(job, folder)
    elif not is_run(folder):
        RunFolder.create(folder, job.recipe)
    for test_set, recipe in job.sets:
        if not set_file(folder, test_set, recipe).exists():
            _test(job, folder, test_set, recipe)


def end_with_parent(environment: dict[str, str]) -> None:
    """Gives this worker its parent's environment variables, and ends it when the parent process
    is gone.
    """
    os.environ.clear()
    os.environ.update(environment)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def is_done(job: Job, runs: Path) -> bool:
    """Whether a job is trained and tested."""
    folder = runs / job.folder
    tested = all(set_file(folder, s, recipe).exists() for s, recipe in job.sets)
    return tested and (_is_trained(job, folder) if job.train else folder.exists())


def set_file(folder: Path, test_set: TaskSet, recipe: Recipe) -> Path:
    """Where the result on a set is written."""
    key = digest(recipe, test_set.tasks, test_set.temperature)
    return folder / "sets" / f"{key}.json"


def _is_trained(job: Job, folder: Path) -> bool:
    """Whether all iterations are in the last checkpoint; later ones are lost."""
    state, train = last_state(folder), job.recipe.train
    if state is None:
        return False
    out_of_time = train.seconds is not None and state.train_seconds >= train.seconds
    return state.iteration >= train.iterations or out_of_time


def _train(job: Job, folder: Path) -> None:
    from agent_r1 import api
    from agent_r1.run.console import console

    if _is_trained(job, folder):
        return
    with console():
        if is_run(folder):
            # The user has given that very recipe just now, on whatever account.
            given = json.loads(job.recipe.model_dump_json())
            same = RunFolder(folder).recipe_data() == given
            api.resume(folder, trust=same)
        else:
            api.train(job.recipe, run=folder)


def _test(job: Job, folder: Path, test_set: TaskSet, recipe: Recipe) -> None:
    from agent_r1.api import Agent

    temperature = recipe.train.temperature
    if test_set.temperature is not None:
        temperature = test_set.temperature
    with Agent(recipe, model_folder(folder, BEST) if job.train else None) as agent:
        evaluation = agent.evaluate(num_tasks=test_set.tasks, temperature=temperature)
    outcomes = {
        group.task.id: {"success": float(t.outcome.success), **t.outcome.metrics}
        for group in evaluation.groups
        for t in group.trajectories
        if t.outcome is not None
    }
    result = {"set": test_set.name, "outcomes": outcomes, **evaluation.figures()}
    path = set_file(folder, test_set, recipe)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(result) + "\n")
