"""The simple learner: padded rows, plain forward passes, one optimiser step a mini-batch. Written
to be the oracle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from agent_r1.algorithms.base import Algorithm
from agent_r1.algorithms.losses import k3
from agent_r1.batch import Rows, microbatches, minibatches
from agent_r1.policy import Policy, token_logprobs
from agent_r1.sections import LearnerSettings
from agent_r1.types import Group, derive_seed


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
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    kl: float = 0.0
    clip_fraction: float = 0.0
    logprob_error: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0
    skipped: list[str] = field(default_factory=list)


class Learner:
    """Owns the optimiser. ``reference`` is the frozen policy that the KL term, if any, pulls
    towards.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        settings: LearnerSettings,
        *,
        temperature: float,
        reference: Policy | None = None,
    ) -> None:
        self.policy = policy
        self.algorithm = algorithm
        self.settings = settings
        self.temperature = temperature
        self.optimizer = torch.optim.AdamW(
            policy.model.parameters(),
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.kl_coef: float = algorithm.settings.kl_coef
        if self.kl_coef and reference is None:
            raise ValueError(f"kl_coef = {self.kl_coef} needs a reference policy")
        self.reference = reference

    def update(self, groups: list[Group], *, lr: float, seed: int) -> Update:
        """Trains on the groups' action tokens; credit must be assigned. No groups, no update."""
        result = Update()
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        num_batches = 0
        for epoch in range(self.settings.epochs if groups else 0):
            parts = minibatches(groups, self.settings.minibatches, derive_seed(seed, epoch))
            for index, part in enumerate(parts):
                self._step(part, result, where=f"epoch {epoch + 1}, mini-batch {index + 1}")
                num_batches += 1
        if num_batches:
            result.clip_fraction /= num_batches
        for name in ("loss", "grad_norm", "kl"):
            setattr(result, name, getattr(result, name) / max(1, result.num_steps))
        return result

    def _step(self, groups: list[Group], result: Update, *, where: str) -> None:
        """One optimiser step on one mini-batch, accumulated over micro-batches."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = kl = 0.0
        for rows in microbatches(
            groups,
            self.algorithm,
            max_tokens=self.settings.micro_batch_tokens,
            device=self.policy.device,
        ):
            part, part_kl = self._backward(rows, result)
            loss += part
            kl += part_kl
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.model.parameters(), self.settings.max_grad_norm
        ).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            result.skipped.append(f"{where}: loss {loss}, gradient norm {norm}{self._culprit()}")
            self.optimizer.zero_grad(set_to_none=True)
            return
        self.optimizer.step()
        result.num_steps += 1
        result.loss += loss
        result.grad_norm += norm
        result.kl += kl

    def _backward(self, rows: Rows, result: Update) -> tuple[float, float]:
        """Adds the gradient of one micro-batch; returns its share of loss and KL."""
        logprobs = action_logprobs(self.policy.model, rows, self.temperature)
        loss = self.algorithm.policy_loss(logprobs, rows.sampling_logprobs, rows.advantages)
        kl = 0.0
        if self.reference is not None:
            with torch.no_grad():
                reference = action_logprobs(self.reference.model, rows, self.temperature)
            penalty = k3(logprobs, reference)
            kl = (rows.weights * penalty.detach()).sum().item()
            loss = loss + self.kl_coef * penalty
        total = (rows.weights * loss).sum()
        total.backward()
        self._note(rows, logprobs.detach(), result)
        return total.item(), kl

    def _note(self, rows: Rows, logprobs: Tensor, result: Update) -> None:
        """Keeps the first ratios of each token with its step, and what they say about the
        update.
        """
        difference = logprobs - rows.sampling_logprobs
        ratios = difference.exp()
        if result.num_steps == 0 and difference.numel():
            result.logprob_error = max(result.logprob_error, difference.abs().max().item())
        low, high = self.algorithm.clip_bounds()
        outside = (ratios < low) | (ratios > high)
        result.clip_fraction += (rows.weights * outside).sum().item()
        result.num_tokens += rows.num_tokens
        values = ratios.tolist()
        for step in rows.steps:
            count = len(step.action.token_ids)
            if step.ratios is None:
                step.ratios = tuple(values[:count])
            values = values[count:]

    def _culprit(self) -> str:
        for name, parameter in self.policy.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"; first in the gradient of {name}"
        return ""


def action_logprobs(model: Any, rows: Rows, temperature: float) -> Tensor:
    """Log-probabilities (A,) of the rows' action tokens. Logits are made only where some row needs
    them.
    """
    wanted = torch.unique(rows.column) - 1  # the logits at t - 1 predict token t
    logits = model(
        input_ids=rows.token_ids,
        attention_mask=rows.mask,
        use_cache=False,
        logits_to_keep=wanted,
    ).logits
    chosen = logits[rows.row, torch.searchsorted(wanted, rows.column - 1)]
    logprobs, _ = token_logprobs(chosen, rows.token_ids[rows.row, rows.column], temperature)
    return logprobs
