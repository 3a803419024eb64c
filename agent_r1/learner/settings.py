"""The recipe's section of the learner; no torch, so that a recipe is checked without it."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from agent_r1.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class LearnerSettings(Section):
    """AdamW, its schedule over the iterations, and how often a rollout is used.

    Attributes:
        lr: Learning rate; without an adapter small, 1e-6, with one larger, 1e-4.
        betas: AdamW's decay rates of its two means.
        weight_decay: AdamW's decoupled weight decay.
        warmup: Iterations of linear warm-up.
        schedule: Rate after warm-up: constant, or falling to 0 after the last iteration.
        max_grad_norm: Gradients are scaled down to this norm.
        epochs: Passes over the same rollout.
        minibatches: Optimiser steps per pass.
        micro_batch_tokens: Tokens per forward pass; memory, not results, depends on it. By default
            as many as the memory estimate allows.
        checkpointing: Keep the activations of layer boundaries only and compute the rest again:
            less memory, a third more work.
        attention: How packed trees are run: ``parts``, a few calls for each run of tokens, on any
            device; ``flex``, one compiled kernel a layer (FlexAttention), on a GPU.
    """

    lr: float = Field(1e-6, gt=0, le=1e3)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(1, ge=1)
    micro_batch_tokens: int | None = Field(None, ge=1)
    checkpointing: bool = False
    attention: Literal["parts", "flex"] = "parts"

    def rate(self, iteration: int, num_iterations: int) -> float:
        """Learning rate of an iteration, counted from 1."""
        if iteration <= self.warmup:
            return self.lr * iteration / self.warmup
        done = (iteration - 1 - self.warmup) / max(1, num_iterations - self.warmup)
        if self.schedule == "linear":
            return self.lr * (1.0 - done)
        if self.schedule == "cosine":
            return self.lr * (1.0 + math.cos(math.pi * done)) / 2
        return self.lr
