"""The learner: one optimiser step per mini-batch, its gradient accumulated over micro-batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from agent_r1.algorithms.base import Algorithm
from agent_r1.algorithms.kl import ESTIMATORS, KLSettings
from agent_r1.learner.credit_assignment import loss_weights, minibatches, steps_of, trained_on
from agent_r1.learner.importance import importance_of
from agent_r1.learner.micro_batch import Actions, Batch, Forward, MicroBatch, MicroBatcher
from agent_r1.learner.optimizer import Optimizer
from agent_r1.learner.packed_trees import packs
from agent_r1.learner.padded_rows import rows
from agent_r1.learner.settings import LearnerSettings
from agent_r1.learner.sums import Sums, by_step
from agent_r1.model.policy import Policy
from agent_r1.types import Estimates, Group, PerToken, StepKey, derive_seed

T = TypeVar("T")


@dataclass
class Update:
    """Results of the updates of one iteration.

    Attributes:
        loss, grad_norm: Means over the optimiser steps.
        kl: KL to the reference, if there is one, by its estimator: weighed as in the loss, or, with
            the term in the reward, the mean over all tokens before the update.
        value_loss: Mean over the optimiser steps of the critic's part of the loss.
        explained_variance: Share of the value targets' variance that the critic explains before the
            update: 1 is perfect, 0 no better than the mean; ``None`` without a critic.
        clip_fraction: Share of action tokens whose ratio was outside the clip range.
        logprob_error: Largest difference between log-probabilities of engine and learner, before
            any step.
        num_tokens: Tokens run forward and backward, padding not counted.
        num_steps: Optimiser steps made.
        ratios, entropies: Of each step that was trained on, see ``Estimates``.
        importance: What each token's loss weighed for the policy that sampled it; empty if all
            weigh alike.
        skipped: Why optimiser steps were skipped, one line each.
        notes: Messages to the user, e.g. that memory ran out and micro-batches were halved.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    kl: float = 0.0
    value_loss: float = 0.0
    explained_variance: float | None = None
    clip_fraction: float = 0.0
    logprob_error: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0
    ratios: dict[StepKey, PerToken] = field(default_factory=dict)
    entropies: dict[StepKey, PerToken] = field(default_factory=dict)
    importance: dict[StepKey, PerToken] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Learner:
    """Owns the optimiser, and the critic's value head if the algorithm has one.

    Trees of tokens are packed, each node once; a model whose trees cannot be packed is trained on
    padded rows. ``reference`` is the frozen policy that the KL term, if any, pulls towards; with an
    adapter it is the policy itself, the adapter switched off.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        settings: LearnerSettings,
        *,
        temperature: float,
        reference: Policy | None = None,
        micro_batch_tokens: int = 4096,
    ) -> None:
        self.policy = policy
        self.algorithm = algorithm
        self.settings = settings
        self.temperature = temperature
        self.critic = value_head(policy) if algorithm.critic else None
        self.optimizer = Optimizer(
            policy.model.parameters(),
            settings,
            head=() if self.critic is None else self.critic.parameters(),
            head_lr=algorithm.value_lr,
        )
        by_tree = functools.partial(packs, attention=settings.attention)
        self.cut: MicroBatcher = rows if policy.unpackable else by_tree
        self.micro_batch_tokens = micro_batch_tokens
        self._notes: list[str] = []
        self.kl = algorithm.kl
        if self.kl and reference is None and not policy.has_adapter:
            raise ValueError(f"kl = {self.kl!r} needs a reference policy")
        self.reference = reference
        if settings.checkpointing:
            policy.base.activation_checkpointing_enable({"use_reentrant": False})

    @torch.no_grad()
    def prepare(self, groups: list[Group], *, old: bool = False) -> Estimates:
        """Numbers that must be known before credit is assigned: the critic's values,
        log-probabilities of the reference for a KL term in the reward, and with ``old`` or an
        importance cap those of the policy itself. Costs nothing where none is needed.
        """
        known = Estimates()
        old = old or self.algorithm.corrects
        if self.critic is not None or old:
            known = self._within_memory(functools.partial(self._estimate, groups, old=old))
        if self.kl is not None and self.kl.place == "reward":
            known.reference_logprobs = self._within_memory(functools.partial(self._refer, groups))
        return known

    def _estimate(self, groups: list[Group], *, old: bool) -> Estimates:
        """Log-probabilities under the policy itself, and the critic's values."""
        known = Estimates()
        with self._packed(self.policy):
            for micro in self._micro_batches(groups, ends=self.critic is not None):
                found = micro.forward(self.policy, self.temperature)
                if old:
                    known.old_logprobs |= by_step(micro.keys, micro.lengths, found.logprobs)
                if self.critic is not None:
                    known.values |= self._values_by_step(micro, found)
        return known

    def _values_by_step(self, micro: MicroBatch, found: Forward) -> dict[StepKey, PerToken]:
        assert found.after is not None
        before = by_step(micro.keys, micro.lengths, self._values(found.before))
        after = self._values(found.after).tolist()
        return {
            key: (*values, last) for (key, values), last in zip(before.items(), after, strict=True)
        }

    def _values(self, hidden: Tensor) -> Tensor:
        assert self.critic is not None
        values: Tensor = self.critic(hidden.float()).squeeze(-1)
        return values

    @torch.no_grad()
    def _refer(self, groups: list[Group]) -> dict[StepKey, PerToken]:
        """Log-probabilities under the reference policy."""
        policy = self.reference or self.policy
        found: dict[StepKey, PerToken] = {}
        with (
            nullcontext() if self.reference else self.policy.without_adapter(),
            self._packed(policy),
        ):
            for micro in self._micro_batches(groups):
                logprobs = micro.forward(policy, self.temperature).logprobs
                found |= by_step(micro.keys, micro.lengths, logprobs)
        return found

    def _micro_batches(self, groups: list[Group], *, ends: bool = False) -> Iterator[MicroBatch]:
        return self.cut(
            groups,
            max_tokens=self.micro_batch_tokens,
            device=self.policy.device,
            whole=self.algorithm.whole_trajectories,
            ends=ends,
        )

    def _packed(self, policy: Policy) -> Any:
        return nullcontext() if policy.unpackable else policy.packed()

    def update(
        self,
        groups: list[Group],
        known: Estimates,
        *,
        lr: float,
        seed: int,
        critic_only: bool = False,
    ) -> Update:
        """Trains on a batch's action tokens; credit must be assigned. No groups, no update.

        The loss is a mean over the whole batch, including groups that have nothing to train and are
        not run. ``critic_only``: only the value head is trained.
        """
        steps = steps_of(groups)
        result = Update()
        if self.critic is not None:
            result.explained_variance = explained_variance([*steps], known)
        num_batches, importance = 0, importance_of(steps, known, self.algorithm)
        result.importance = importance
        if self.kl is not None and self.kl.place == "loss":
            refer = functools.partial(self._refer, groups)
            known.reference_logprobs |= self._within_memory(refer)
        with self._mode():
            for epoch in range(self.settings.epochs if groups else 0):
                parts = minibatches(groups, self.settings.minibatches, derive_seed(seed, epoch))
                for index, part in enumerate(parts):
                    where = f"epoch {epoch + 1}, mini-batch {index + 1}"
                    batch = Batch(steps, known, loss_weights(part, self.algorithm), importance)
                    run = trained_on(part, known, self.algorithm)
                    num_batches += self._step(
                        run, batch, result, lr=lr, critic_only=critic_only, where=where
                    )
        if num_batches:
            result.clip_fraction /= num_batches
        result.notes, self._notes = self._notes, []
        for name in ("loss", "grad_norm", "kl", "value_loss"):
            setattr(result, name, getattr(result, name) / max(1, result.num_steps))
        if self.kl is not None and self.kl.place == "reward":
            sampled = {key: step.action.logprobs for key, step in steps.items()}
            result.kl = _mean_kl(sampled, known, self.kl)
        return result

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """Training mode, if activations are recomputed: layers do so only then. Dropout is off."""
        self.policy.model.train(self.settings.checkpointing)
        try:
            with self._packed(self.policy):
                yield
        finally:
            self.policy.model.eval()

    def _step(
        self,
        groups: list[Group],
        batch: Batch,
        result: Update,
        *,
        lr: float,
        critic_only: bool,
        where: str,
    ) -> bool:
        """One optimiser step on a mini-batch, of which ``groups`` are run; returns whether
        anything was trained.
        """
        if not any(batch.weights[key].weight for key in steps_of(groups)):
            return False  # no signal, or all of it masked
        accumulate = functools.partial(self._accumulate, groups, batch, critic_only=critic_only)
        sums = self._within_memory(accumulate)
        if result.num_steps == 0:
            result.logprob_error = max(result.logprob_error, sums.largest("logprob_error"))
        result.clip_fraction += sums.total("clipped") / sums.total("counted")
        result.num_tokens += sums.num_tokens
        # Of the first update that used a step.
        result.ratios = sums.table("ratios") | result.ratios
        result.entropies = sums.table("entropies") | result.entropies
        loss = sums.total("loss")
        norm = self.optimizer.clip_grad(self.settings.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            culprit = self._culprit()
            result.skipped.append(f"{where}: loss {loss}, gradient norm {norm}{culprit}")
            self.optimizer.zero_grad()
            return True
        self.optimizer.step(lr)
        self.optimizer.zero_grad()
        result.num_steps += 1
        result.loss += loss
        result.grad_norm += norm
        result.kl += sums.total("kl")
        result.value_loss += sums.total("value_loss")
        return True

    def _accumulate(self, groups: list[Group], batch: Batch, *, critic_only: bool) -> Sums:
        """The gradient of a mini-batch."""
        self.optimizer.zero_grad()
        sums = Sums()
        for micro in self._micro_batches(groups):
            self._backward(micro, batch, sums, critic_only=critic_only)
        return sums

    def _within_memory(self, run: Callable[[], T]) -> T:
        """What ``run`` gives; begun again with smaller micro-batches when the device's memory runs
        out.
        """
        while True:
            try:
                return run()
            except torch.OutOfMemoryError:
                if self.micro_batch_tokens < MIN_MICRO_BATCH:
                    raise
            # Outside the handler, whose traceback would keep the tensors alive.
            self.micro_batch_tokens //= 2
            self._notes.append(
                "the device's memory ran out; the iteration goes on with "
                f"learner.micro_batch_tokens = {self.micro_batch_tokens}"
            )
            torch.cuda.empty_cache()

    def _backward(
        self, micro: MicroBatch, batch: Batch, sums: Sums, *, critic_only: bool = False
    ) -> None:
        """Adds the gradient of one micro-batch, and its share of what is reported."""
        actions = Actions.of(micro.keys, batch, self.policy.device)
        found = micro.forward(self.policy, self.temperature)
        if critic_only:
            loss = torch.zeros_like(found.logprobs)
        else:
            loss = self._policy_loss(found, actions, sums)
        if self.critic is not None:
            through = self.algorithm.value_gradient and not critic_only
            values = self._values(found.before if through else found.before.detach())
            assert actions.old_values is not None and actions.value_targets is not None
            value_loss = self.algorithm.value_loss(
                values, actions.old_values, actions.value_targets
            )
            sums.add(value_loss=(actions.weights * value_loss).sum())
            loss = loss + value_loss
        total = (actions.weights * loss).sum()
        total.backward()
        sums.add(loss=total)
        sums.num_tokens += micro.num_tokens
        sampled = [batch.steps[key].action for key in micro.keys]
        if any(action.logprobs and not action.entropies for action in sampled):
            sums.add_rows(micro, entropies=found.entropies)  # which the engine does not tell
        self._note(micro, actions, found.logprobs.detach(), sums)

    def _policy_loss(self, found: Forward, actions: Actions, sums: Sums) -> Tensor:
        """(A,): the algorithm's loss, importance weights, KL and entropy terms."""
        loss = self.algorithm.policy_loss(
            found.logprobs, actions.old_logprobs, actions.advantages, actions.sequences
        )
        if actions.importance is not None:
            loss = loss * actions.importance
        if self.kl is not None and self.kl.place == "loss":
            assert actions.reference_logprobs is not None
            estimate: Callable[[Tensor, Tensor], Tensor] = ESTIMATORS[self.kl.estimator]
            penalty = estimate(found.logprobs, actions.reference_logprobs)
            sums.add(kl=(actions.weights * penalty).sum())
            loss = loss + self.kl.coef * penalty
        if self.algorithm.entropy_coef:
            loss = loss - self.algorithm.entropy_coef * found.entropies
        return loss

    def _note(self, micro: MicroBatch, actions: Actions, logprobs: Tensor, sums: Sums) -> None:
        """Records each token's ratio, and the figures that follow from ratios."""
        if actions.sampling_logprobs.numel():
            sums.add(logprob_error=(logprobs - actions.sampling_logprobs).abs().max())
        ratios = self.algorithm.ratio(logprobs, actions.old_logprobs, actions.sequences)
        low, high = self.algorithm.clip_bounds()
        counted = actions.weights > 0
        clipped = ((ratios < low) | (ratios > high)) & counted
        sums.add(clipped=clipped.sum(), counted=counted.sum())
        sums.add_rows(micro, ratios=ratios)

    def state_dict(self) -> dict[str, Any]:
        """State that the next update depends on, besides the policy."""
        critic = None if self.critic is None else self.critic.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "critic": critic}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])

    def _culprit(self) -> str:
        trained = (n for n, p in self.policy.model.named_parameters() if p.requires_grad)
        for name, master in zip(trained, self.optimizer.masters, strict=True):
            if master.grad is not None and not master.grad.isfinite().all():
                return f"; first in the gradient of {name}"
        return ""


MIN_MICRO_BATCH = 64
"""Smaller micro-batches would not help: a single branch remains."""


def value_head(policy: Policy) -> torch.nn.Linear:
    """From a last hidden state to its value, which is 0 before any training."""
    width = policy.base.get_output_embeddings().weight.shape[1]
    head = torch.nn.Linear(width, 1, device=policy.device, dtype=torch.float32)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def explained_variance(keys: Sequence[StepKey], known: Estimates) -> float:
    """``1 - var(target - value) / var(target)`` over the action tokens; 0 if all targets are
    equal.
    """
    targets = torch.tensor([x for key in keys for x in known.value_targets[key]])
    values = torch.tensor([x for key in keys for x in known.values[key][:-1]])
    if len(targets) < 2 or (variance := targets.var().item()) == 0.0:
        return 0.0
    return 1.0 - (targets - values).var().item() / variance


def _mean_kl(sampled: dict[StepKey, PerToken], known: Estimates, kl: KLSettings) -> float:
    """The estimate at sampling, over all action tokens."""
    estimates = [
        ESTIMATORS[kl.estimator](logprob, reference)
        for key, logprobs in sampled.items()
        for logprob, reference in zip(logprobs, known.reference_logprobs[key], strict=True)
    ]
    return math.fsum(estimates) / max(1, len(estimates))
