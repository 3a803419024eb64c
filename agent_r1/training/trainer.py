"""The training loop as a list of calls: rollout, credit, update, sync, record, checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from agent_r1.algorithms import ALGORITHMS, CREDITS
from agent_r1.algorithms.credit import attempts_of
from agent_r1.config.section import nearest
from agent_r1.errors import RunError
from agent_r1.learner.credit_assignment import batch_of, informative, trained_on
from agent_r1.learner.learner import Learner
from agent_r1.learner.mask_ablation import masks_of
from agent_r1.model.load import load_policy
from agent_r1.model.policy import Policy
from agent_r1.run.checkpoint import Checkpoints, State
from agent_r1.run.console import iteration_line, validation_line
from agent_r1.run.folder import RunFolder
from agent_r1.run.recipe import Recipe
from agent_r1.run.trackers.sending import Senders
from agent_r1.training.advice import Advice, on_demonstrations, on_iteration
from agent_r1.training.build import (
    demonstrations_of,
    evaluator,
    make_rollout,
    set_up_process,
    tasks_of,
)
from agent_r1.training.collector import Collector, Draws
from agent_r1.training.demonstrations import Demonstrations
from agent_r1.training.evaluate import Evaluation, evaluate, must_be_scored
from agent_r1.training.metrics import Clock, ages_of, figures_of
from agent_r1.training.preflight import memory_of, try_env, warnings_of
from agent_r1.types import Estimates, Group, derive_seed
from agent_r1.utils.log import LOG
from agent_r1.utils.run_files import CHECKPOINTS
from agent_r1.utils.scope import beside, held_up, run_async

T = TypeVar("T")


class Trainer:
    """One run, from its folder. A folder with a checkpoint is resumed, an empty one begun."""

    def __init__(self, recipe: Recipe, run: RunFolder) -> None:
        set_up_process(recipe)
        torch.manual_seed(recipe.seed)  # our code does not draw from it; other code may
        self.recipe, self.run = recipe, run
        self.validation = tasks_of(recipe, "validation")[: recipe.evaluation.tasks]
        self.checkpoints = Checkpoints(run.path / CHECKPOINTS, keep=recipe.checkpoint.keep)
        run.must_go_on(self.checkpoints)
        last = self.checkpoints.last
        plan = memory_of(recipe)
        self.policy = load_policy(recipe.model, checkpoint=last, seed=recipe.seed)
        self.algorithm = ALGORITHMS.make(recipe.algorithm)
        self.credit = CREDITS.make(recipe.credit)
        self.masks = masks_of(self.algorithm)
        rollout = make_rollout(recipe, self.policy, concurrency=recipe.train.concurrency)
        self.rollout = dataclasses.replace(rollout, proven=True)
        self.validator = evaluator(self.rollout, recipe)
        tasks = tasks_of(recipe, "train")
        self._has_tools = run_async(try_env(recipe, self.rollout.renderer))
        self.demonstrations: Demonstrations | None = None
        if self.algorithm.demonstrated:
            self.demonstrations = demonstrations_of(recipe, self.rollout)
            tasks = self.demonstrations.tasks
        self.draws = Draws(tasks, recipe.train, recipe.seed)
        self.collector = Collector(self.rollout, self.draws, recipe.train)
        # Demonstrations are not sampled: they are to become likely at temperature 1.
        temperature = 1.0 if self.algorithm.demonstrated else recipe.train.temperature
        self.learner = Learner(
            self.policy,
            self.algorithm,
            recipe.learner,
            temperature=temperature,
            reference=self._reference(),
            micro_batch_tokens=plan.micro_batch_tokens,
        )
        self.state = State()
        if last:
            self.state = self.checkpoints.restore(self.policy, self.learner)
            self.draws.cursor = self.state.cursor
            self.collector.restore(self.checkpoints.waiting(self.state))
            run_async(self._sync())
            if self.state.micro_batch_tokens:
                self.learner.micro_batch_tokens = self.state.micro_batch_tokens
            every = recipe.checkpoint.every
            for line in run.rewind(self.checkpoints, self.state, every=every):
                LOG.warning(line)
            LOG.info(f"going on after iteration {self.state.iteration}")
        else:
            run.forget_after(-1)
        rows = run.metrics()
        self.last_row: dict[str, Any] = rows[-1] if rows else {}
        self._spent: list[float] = []

    def train(self) -> State:
        """Runs the iterations that are left."""
        for line in warnings_of(self.recipe):
            LOG.warning(line)
        self.senders = Senders(self.recipe.trackers, self.run)
        try:
            if self.checkpoints.last is None:
                self._begin()
            while self.state.iteration < self.recipe.train.iterations and not self._out_of_time():
                self._iterate()
        finally:
            try:
                run_async(self.collector.close())
            finally:
                self.senders.close()
        rows = [row["figures"] for row in self.run.metrics() if "figures" in row]
        tried = sum(row["updates"] + row["updates_skipped"] for row in rows)
        if self.algorithm.demonstrated and not tried:
            raise RunError(
                f"{self.state.iteration} iterations and not one demonstration that was good: "
                "nothing was learned (`agent-r1 check` shows what gold() does; are "
                "limits.tokens_per_turn and limits.turns enough for it?)"
            )
        return self.state

    def _begin(self) -> None:
        """Iteration 0: the initial policy."""
        self.state.micro_batch_tokens = self.learner.micro_batch_tokens
        row: dict[str, Any] = {"iteration": 0}
        if self.recipe.evaluation.every:
            row["validation"] = self._validate()
        self._record(row)
        self._save()

    def _iterate(self) -> None:
        recipe, state = self.recipe, self.state
        iteration = state.iteration + 1
        seed = derive_seed(recipe.seed, "iteration", iteration)
        clock = Clock()
        self.rollout.engine.report()  # drops what a validation added
        sampled_before = self.collector.seconds_sampled
        groups, seen, known = self._collect(clock)
        batch = batch_of(seen, known, self.algorithm)
        if episodes := [t for g in groups for t in g.trajectories]:  # demonstrations may be missing
            must_be_scored(episodes, f"iteration {iteration}")
        with clock("learner"):
            lr = recipe.learner.rate(iteration, recipe.train.iterations)
            critic_only = iteration <= self.algorithm.critic_warmup
            update = self._beside(
                lambda: self.learner.update(batch, known, lr=lr, seed=seed, critic_only=critic_only)
            )
        with clock("sync"):
            state.iteration = iteration
            run_async(self._sync())
        with clock("other"):
            known.ratios, known.entropies = update.ratios, update.entropies
            used = trained_on(batch, known, self.algorithm)
            known = self.masks.own(groups, known)
            self._beside(lambda: self.run.write_trajectories(iteration, groups, known))
        sampling = self.collector.seconds_sampled - sampled_before
        state.micro_batch_tokens = self.learner.micro_batch_tokens
        state.train_seconds += clock.total
        for note in update.notes:
            LOG.warning(f"iteration {iteration}: {note}")
        for reason in update.skipped:
            LOG.warning(f"iteration {iteration}: update skipped: {reason}")
        faults = [t.fault for group in groups for t in group.trajectories if t.outcome is None]
        if faults:
            LOG.warning(
                f"iteration {iteration}: {len(faults)} episodes excluded, the first: {faults[0]}"
            )
        shaped = self._shaped(groups, known)
        sampled = clock.total if recipe.train.staleness else clock.seconds["rollout"]
        found = figures_of(groups, used, known, update, shaped, lr, clock, sampled)
        row = {"iteration": iteration, **found}
        if self.demonstrations is None:
            row["seconds"]["engine_idle"] = max(0.0, clock.total - sampling)
        if recipe.train.staleness:
            row["figures"] |= ages_of(groups, iteration)
        engine = self.rollout.engine.report()
        row["engine"] = engine
        for line in self.rollout.engine.advice(engine, sampled):
            LOG.warning(f"iteration {iteration}: {line}")
        has_signal = bool(informative(used, known, self.algorithm))
        self._advise_on(row, groups, used, has_signal=has_signal)
        total, spent = recipe.train.iterations, self._spent
        spent.append(clock.total)
        left = (total - iteration) * sum(spent) / len(spent)
        LOG.info(iteration_line(row, total, left), extra={"row": row, "total": total})
        best = state.best_iteration
        is_last = iteration == recipe.train.iterations or self._out_of_time()
        if recipe.evaluation.every and (iteration % recipe.evaluation.every == 0 or is_last):
            row["validation"] = self._validate()
        if state.best is None:
            state.best_iteration = iteration  # without figures, the newest is the best
        self._record(row, groups)
        self.last_row = row
        due = iteration % recipe.checkpoint.every == 0 or is_last
        if due or (state.best is not None and state.best_iteration != best):
            self._save()

    async def _sync(self) -> None:
        """Gives the engine the present weights, with which it goes on."""
        await self.rollout.engine.sync(self.policy, self.state.iteration)
        self.collector.resume()

    def _record(self, row: dict[str, Any], groups: Sequence[Group] = ()) -> None:
        self.run.append_metrics(row)
        self.senders.log(row, groups)

    def _save(self) -> None:
        self.state.metrics = self.run.metrics_sum(self.state.iteration)
        self.state.cursor, waiting = self.draws.cursor, self.collector.waiting()
        save = functools.partial(self.checkpoints.save, waiting=waiting)
        self._beside(lambda: save(self.state, self.policy, self.learner))

    def _beside(self, work: Callable[[], T]) -> T:
        """What ``work`` gives; with staleness, episodes go on meanwhile."""
        return beside(work) if self.recipe.train.staleness else work()

    async def _take(self, count: int) -> list[Group]:
        """Groups to learn from."""
        train = self.recipe.train
        if self.demonstrations is not None:
            draws = [self.draws.next() for _ in range(count)]
            return await self.demonstrations.groups(draws, attempts=train.attempts)
        left = train.iterations - self.state.iteration
        return await self.collector.take(count, iterations_left=left)

    def _collect(self, clock: Clock) -> tuple[list[Group], list[Group], Estimates]:
        """All groups of an iteration; the learner's view of them; and the estimates of their steps.
        Credit is assigned; groups without a signal are replaced by fresh ones, at most ``refills``
        times.
        """
        train = self.recipe.train
        groups: list[Group] = []
        seen: list[Group] = []
        known = Estimates()
        missing = train.tasks
        for _ in range(1 + self.algorithm.refills):
            with clock("rollout"):
                fresh = run_async(self._take(missing))
            with clock("credit"):
                for number, group in enumerate(fresh, len(groups)):
                    group.number = number
                view, found = self._beside(functools.partial(self._credited, fresh))
                groups += fresh
                seen += view
                known.add(found)
            missing -= len(informative(view, found, self.algorithm))
            if missing <= 0:
                break
        if self.algorithm.demonstrated and missing > 0:
            LOG.warning(
                f"{missing} of {train.tasks} demonstrations are missing: too few of those tried "
                "were good enough"
            )
        return groups, seen, known

    def _credited(self, groups: list[Group]) -> tuple[list[Group], Estimates]:
        return self.masks.credited(groups, self.learner, self.algorithm, self.credit)

    def _shaped(self, groups: list[Group], known: Estimates) -> float | None:
        """The mean reward of episodes as the algorithm and the credit compute it."""
        attempts = [attempts_of(group, known) for group in groups]
        totals = [
            sum(attempt.step_sums(row))
            for group in attempts
            for attempt, row in zip(group, self.algorithm.rewards(group, self.credit), strict=True)
        ]
        return sum(totals) / len(totals) if totals else None

    def _advise_on(
        self, row: dict[str, Any], groups: list[Group], used: list[Group], *, has_signal: bool
    ) -> None:
        """Warns of obstacles to learning, and records them in the row."""
        figures, before = row["figures"], self.last_row.get("figures", {})
        silent = before.get("iterations_without_signal", 0) + 1
        figures["iterations_without_signal"] = 0 if has_signal else silent
        has_tools = self._has_tools
        if not has_tools:
            figures["tool_calls"] = None
        advice: Advice = {}
        if self.algorithm.demonstrated:
            if row["iteration"] == 1:
                shown = [t for group in used for t in group.scored]
                advice = on_demonstrations(shown, has_tools=has_tools)
        else:
            advice = on_iteration(
                self.recipe,
                groups,
                figures,
                self.last_row,
                has_tools=has_tools,
                run=str(self.run.path),
            )
        if advice:
            row["advice"] = advice
        for name, words in advice.items():
            LOG.warning(f"iteration {row['iteration']}: {name}: {words}")
        for line in held_up():
            LOG.warning(f"iteration {row['iteration']}: {line}")

    def _validate(self) -> dict[str, Any]:
        """Evaluates on the validation tasks; remembers the best."""
        recipe, state = self.recipe, self.state
        evaluation = evaluate(
            self.validator,
            self.validation,
            temperature=recipe.train.temperature,
            seed=derive_seed(recipe.seed, "validation"),
        )
        figure = self._choosing(evaluation) if self._is_present(evaluation) else None
        if figure is not None and (state.best is None or figure >= state.best):
            state.best, state.best_iteration = figure, state.iteration
        figures = evaluation.figures()
        LOG.info(validation_line(state.iteration, recipe.train.iterations, figures))
        return figures

    def _is_present(self, evaluation: Evaluation) -> bool:
        """Whether the present weights were evaluated; an engine may not have been given them."""
        steps = (s for g in evaluation.groups for t in g.trajectories for s in t.steps)
        versions = {span.version for step in steps for span in step.action.versions}
        if old := versions - {self.state.iteration}:
            LOG.warning(
                f"iteration {self.state.iteration}: the engine had the weights of iteration "
                f"{min(old)} in this validation, so it chooses no best checkpoint"
            )
        return not old

    def _choosing(self, evaluation: Evaluation) -> float | None:
        """The figure that decides which checkpoint is best; ``None`` where this validation
        lacks it, e.g. a metric that only successes have.
        """
        metric, total = self.recipe.checkpoint.metric, evaluation.total
        known = {"success": total.success, "reward": total.reward, **total.metrics}
        if metric not in known:
            LOG.warning(
                f"checkpoint.metric = {metric!r}: no episode of this validation has it, so it "
                f"chooses no best checkpoint{nearest(metric, [*known])}"
            )
        return known.get(metric)

    def _reference(self) -> Policy | None:
        """The initial policy, frozen, if a KL term needs a copy."""
        lora = self.recipe.model.lora
        starts_bare = lora is not None and lora.start is None
        if self.algorithm.kl is None or starts_bare:
            return None  # the initial policy is this one with its adapter off
        return load_policy(self.recipe.model)

    def _out_of_time(self) -> bool:
        limit = self.recipe.train.seconds
        return limit is not None and self.state.train_seconds >= limit
