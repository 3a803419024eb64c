"""Runs an experiment's jobs, as many at once as there are cores for, and writes the results."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_r1.bench.experiment import Experiment, Job
from agent_r1.bench.figures import draw_figures
from agent_r1.bench.tables import name_of, result_of, success_curve, write_tables
from agent_r1.bench.worker import end_with_parent, is_done, run_job
from agent_r1.errors import ConfigError


@dataclass(frozen=True)
class Outcome:
    """Results of an experiment.

    Attributes:
        files: Tables and figures; none when a job failed.
        failures: One line for each job that failed.
    """

    files: list[Path]
    failures: list[str]


def run_experiment(
    experiment: Experiment,
    jobs: Sequence[Job],
    *,
    runs: Path,
    out: Path,
    parallel: int | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Does the jobs that are not done yet, then writes tables and figures into ``out``.

    Args:
        experiment, jobs: From ``load_experiment``.
        runs: Where run folders go; experiments that share it share runs of the same settings.
        out: Where the results go.
        parallel: Jobs at once; by default the number of cores by the recipe's ``threads``.
        say: Takes a line whenever a job ends.

    Raises:
        ConfigError: A start's model is missing.
    """
    runs.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs if not is_done(job, runs)]
    for path in {job.recipe.model.path for job in todo}:
        if path.count("/") > 1 and not Path(path).expanduser().is_dir():
            raise ConfigError(f"model.path = {path!r}: there is no such folder")
    for lora in (job.recipe.model.lora for job in todo):
        if lora and lora.start and not Path(lora.start).expanduser().is_dir():
            raise ConfigError(f"model.lora.start = {lora.start!r}: there is no such folder")
    threads = max((job.recipe.threads or os.cpu_count() or 1) for job in jobs)
    parallel = parallel or max(1, (os.cpu_count() or 1) // threads)
    say(f"{len(jobs)} runs, {len(jobs) - len(todo)} done before, {parallel} at once; in {runs}")
    failures = _run(todo, runs, parallel, threads, say)
    if failures:
        return Outcome([], failures)
    return Outcome(
        [*write_tables(experiment, jobs, runs, out), *draw_figures(experiment, jobs, runs, out)], []
    )


def _run(
    jobs: Sequence[Job], runs: Path, parallel: int, threads: int, say: Callable[[str], None]
) -> list[str]:
    failures: list[str] = []
    start = time.perf_counter()
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads)}
    # Workers come from a process that has imported PyTorch, but not used it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agent_r1.api"])
    # Threads are counted when libraries are loaded; nothing is loaded from the current folder.
    with _environment(OMP_NUM_THREADS=str(threads), PYTHONSAFEPATH="1"):
        pool = ProcessPoolExecutor(
            parallel,
            mp_context=context,
            max_tasks_per_child=1,  # a run's memory is given back
            initializer=end_with_parent,
            initargs=(environment,),  # they would inherit that of the first start
        )
        others = multiprocessing.active_children()
        with contextlib.ExitStack() as stack:
            futures = {pool.submit(run_job, job, runs): job for job in jobs}
            stack.callback(pool.shutdown, cancel_futures=True)  # whatever happens below
            stack.push(lambda kind, *_: _end_all_but(others) if kind else None)
            for number, future in enumerate(as_completed(futures), 1):
                job = futures[future]
                passed = time.perf_counter() - start
                left = passed / number * (len(jobs) - number)
                error = future.exception()
                if error is not None:
                    failures.append(f"{job.folder}: {type(error).__name__}: {error}")
                said = failures[-1] if error else _line(job, runs)
                say(f"{number}/{len(jobs)}  {said}  ({passed:.0f} s, about {left:.0f} s left)")
    return failures


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _end_all_but(others: Sequence[multiprocessing.process.BaseProcess]) -> None:
    """Kills the workers, which a shut-down would wait for; their runs can be resumed."""
    for process in multiprocessing.active_children():
        if process not in others:
            process.kill()


def _line(job: Job, runs: Path) -> str:
    figures = [f"{s.name} {_success(result_of(job, s, runs))}" for s, _ in job.sets]
    if job.train:
        curve = [success for success in success_curve(job, runs) if not math.isnan(success)]
        if curve:
            figures.insert(0, f"training {curve[0]:.3f} -> {statistics.fmean(curve[-3:]):.3f}")
    return f"{name_of(job.start, job.arm)}, seed {job.seed}: " + ", ".join(figures)


def _success(result: dict[str, Any]) -> str:
    success = result["total"]["success"]
    return "none" if success is None else f"{success:.3f}"
