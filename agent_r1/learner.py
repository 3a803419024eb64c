"""The learner: one optimiser step a mini-batch, its gradient accumulated over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agent_r1.algorithms.base import Algorithm
from agent_r1.algorithms.losses import k3
from agent_r1.batch import Cut, MicroBatch, minibatches, step_weights
from agent_r1.optimizer import Optimizer
from agent_r1.pack import packs
from agent_r1.policy import Policy
from agent_r1.rows import rows
from agent_r1.sections import LearnerSettings
from agent_r1.types import Group, Step, derive_seed


@dataclass
class Update:
    """What the updates of one iteration did.

    Attributes:
        loss, grad_norm, kl: Means over the optimiser steps; ``kl`` is to the reference, if there
            is one.
        clip_fraction: Share of action tokens whose ratio was outside the clip range.
        logprob_error: Largest difference between log-probabilities of engine and learner, before
            any step.
        num_tokens: Tokens run forward and backward, padding not counted.
        num_steps: Optimiser steps made.
        skipped: Why optimiser steps were skipped, one line each.
        notes: What else the user should know, e.g. that memory ran out and was made do with.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    kl: float = 0.0
    clip_fraction: float = 0.0
    logprob_error: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Sums:
    """What the micro-batches of one optimiser step add up to."""

    loss: float = 0.0
    kl: float = 0.0
    clip_fraction: float = 0.0
    logprob_error: float = 0.0
    num_tokens: int = 0
    ratios: list[tuple[Step, tuple[float, ...]]] = field(default_factory=list)


class Learner:
    """Owns the optimiser.

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
        self.optimizer = Optimizer(policy.model.parameters(), settings)
        self.cut: Cut = rows if policy.unpackable else packs
        self.micro_batch_tokens = micro_batch_tokens
        self.kl_coef: float = algorithm.settings.kl_coef
        if self.kl_coef and reference is None and not policy.has_adapter:
            raise ValueError(f"kl_coef = {self.kl_coef} needs a reference policy")
        self.reference = reference
        if settings.checkpointing:
            policy.base.activation_checkpointing_enable({"use_reentrant": False})

    def update(self, groups: list[Group], *, lr: float, seed: int) -> Update:
        """Trains on the groups' action tokens; credit must be assigned. No groups, no update."""
        result = Update()
        num_batches = 0
        with self._mode():
            for epoch in range(self.settings.epochs if groups else 0):
                parts = minibatches(groups, self.settings.minibatches, derive_seed(seed, epoch))
                for index, part in enumerate(parts):
                    where = f"epoch {epoch + 1}, mini-batch {index + 1}"
                    self._step(part, result, lr=lr, where=where)
                    num_batches += 1
        if num_batches:
            result.clip_fraction /= num_batches
        for name in ("loss", "grad_norm", "kl"):
            setattr(result, name, getattr(result, name) / max(1, result.num_steps))
        return result

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """Layers recompute their activations in training mode only; there is no dropout anyway."""
        self.policy.model.train(self.settings.checkpointing)
        try:
            with nullcontext() if self.policy.unpackable else self.policy.packed():
                yield
        finally:
            self.policy.model.eval()

    def _step(self, groups: list[Group], result: Update, *, lr: float, where: str) -> None:
        """One optimiser step on one mini-batch."""
        sums = self._accumulate(groups, result)
        if result.num_steps == 0:
            result.logprob_error = max(result.logprob_error, sums.logprob_error)
        result.clip_fraction += sums.clip_fraction
        result.num_tokens += sums.num_tokens
        for step, ratios in sums.ratios:
            step.ratios = step.ratios or ratios
        norm = self.optimizer.clip_grad(self.settings.max_grad_norm)
        if not (math.isfinite(sums.loss) and math.isfinite(norm)):
            culprit = self._culprit()
            result.skipped.append(f"{where}: loss {sums.loss}, gradient norm {norm}{culprit}")
            self.optimizer.zero_grad()
            return
        self.optimizer.step(lr)
        self.optimizer.zero_grad()
        result.num_steps += 1
        result.loss += sums.loss
        result.grad_norm += norm
        result.kl += sums.kl

    def _accumulate(self, groups: list[Group], result: Update) -> _Sums:
        """The gradient of a mini-batch; begun again in smaller cuts when the device's memory runs
        out.
        """
        weights = step_weights(groups, self.algorithm)
        while True:
            self.optimizer.zero_grad()
            sums = _Sums()
            try:
                for micro in self.cut(
                    groups,
                    weights,
                    max_tokens=self.micro_batch_tokens,
                    device=self.policy.device,
                ):
                    self._backward(micro, sums)
                return sums
            except torch.OutOfMemoryError:
                if self.micro_batch_tokens < MIN_MICRO_BATCH:
                    raise
            # Outside the handler, whose traceback would hold on to the tensors.
            self.micro_batch_tokens //= 2
            result.notes.append(
                "the device's memory ran out; the iteration goes on with "
                f"learner.micro_batch_tokens = {self.micro_batch_tokens}"
            )
            torch.cuda.empty_cache()

    def _backward(self, micro: MicroBatch, sums: _Sums) -> None:
        """Adds the gradient of one micro-batch, and its share of what is reported."""
        actions = micro.actions
        reference = self._reference_logprobs(micro) if self.kl_coef else None
        logprobs, entropies = micro.logprobs(self.policy, self.temperature)
        loss = self.algorithm.policy_loss(logprobs, actions.sampling_logprobs, actions.advantages)
        if reference is not None:
            penalty = k3(logprobs, reference)
            sums.kl += (actions.weights * penalty.detach()).sum().item()
            loss = loss + self.kl_coef * penalty
        if entropy_coef := self.algorithm.settings.entropy_coef:
            loss = loss - entropy_coef * entropies
        total = (actions.weights * loss).sum()
        total.backward()
        sums.loss += total.item()
        sums.num_tokens += micro.num_tokens
        self._note(micro, logprobs.detach(), sums)

    def _reference_logprobs(self, micro: MicroBatch) -> Tensor:
        with torch.no_grad():
            if self.reference is None:
                with self.policy.without_adapter():
                    return micro.logprobs(self.policy, self.temperature)[0]
            with nullcontext() if self.policy.unpackable else self.reference.packed():
                return micro.logprobs(self.reference, self.temperature)[0]

    def _note(self, micro: MicroBatch, logprobs: Tensor, sums: _Sums) -> None:
        """The ratios of each token, and what they say about the update."""
        difference = logprobs - micro.actions.sampling_logprobs
        ratios = difference.exp()
        if difference.numel():
            sums.logprob_error = max(sums.logprob_error, difference.abs().max().item())
        low, high = self.algorithm.clip_bounds()
        outside = (ratios < low) | (ratios > high)
        sums.clip_fraction += (micro.actions.weights * outside).sum().item()
        values = ratios.tolist()
        for step in micro.actions.steps:
            count = len(step.action.token_ids)
            sums.ratios.append((step, tuple(values[:count])))
            values = values[count:]

    def _culprit(self) -> str:
        trained = (n for n, p in self.policy.model.named_parameters() if p.requires_grad)
        for name, master in zip(trained, self.optimizer.masters, strict=True):
            if master.grad is not None and not master.grad.isfinite().all():
                return f"; first in the gradient of {name}"
        return ""


MIN_MICRO_BATCH = 64
"""Smaller cuts would not help: what remains is a single branch."""
