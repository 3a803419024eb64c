"""The recipe's section of the model; no torch, so that a recipe is checked without it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from agent_r1.config.section import Section


class LoraSettings(Section):
    """A low-rank adapter (arXiv 2106.09685) is trained, the model stays as it is.

    Attributes:
        rank: Rank of each product of two matrices that is added to a weight.
        alpha: The product is scaled by alpha / rank.
        targets: Names of the layers that get one, or ``all-linear``: all but the output layer.
        start: An adapter of this rank and alpha to go on with: the folder of a run (its best
            checkpoint), or one that peft wrote. By default a new one, without effect yet.
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
        device: Where it runs; ``auto`` takes the GPU if there is one.
        dtype: Type of weights and activations; trained weights have a float32 master in any case.
        matmul: ``bf16`` has matrix products of float32 tensors run in bfloat16 and added up in
            float32, on processors with matrix units for that (AMX). Sampling and training then
            differ by rounding, for which the algorithm's ``importance_cap`` is 2 by default.
        lora: Train an adapter instead of all weights.
    """

    path: str = "hopworld-base"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    matmul: Literal["bf16"] | None = None
    lora: LoraSettings | None = None
