"""Sections of the recipe whose owners need torch, kept apart so that a recipe is checked without
it.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from agent_r1.config import Section


class LoraSettings(Section):
    """A low-rank adapter (arXiv 2106.09685) is trained, the model stays as it is.

    Attributes:
        rank: Of each product of two matrices that is added to a weight.
        alpha: The product is scaled by alpha / rank.
        targets: Names of the layers that get one, or ``all-linear``: all but the output layer.
        start: An adapter of this rank and alpha to go on with: the folder of a run (its best
            checkpoint), or one that peft wrote. By default a new one, which changes nothing yet.
    """

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    start: str | None = None


class ModelSettings(Section):
    """Which model is trained, and where it runs.

    Attributes:
        path: A folder in Hugging Face format, a name on the hub, or one of ours: ``hopworld-base``
            (in the package), ``smollm2-135m`` (from the extra ``agent-r1[smollm2]``).
        dtype: Of weights and activations; trained weights have a float32 master in any case.
        lora: Train an adapter instead of all weights.
    """

    path: str = "hopworld-base"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraSettings | None = None


Beta = Annotated[float, Field(ge=0, lt=1)]


class LearnerSettings(Section):
    """AdamW, its schedule over the iterations, and how often a rollout is used.

    Attributes:
        warmup: Iterations of linear warm-up.
        schedule: What follows: constant, or falling so as to reach 0 after the last iteration.
        max_grad_norm: Gradients are scaled down to this norm.
        epochs: Passes over the same rollout.
        minibatches: Optimiser steps a pass.
        micro_batch_tokens: Tokens per forward pass; memory, not results, depends on it. By default
            what the estimate of memory allows.
        checkpointing: Keep the activations of layer boundaries only and compute the rest again:
            less memory, a third more work.
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
