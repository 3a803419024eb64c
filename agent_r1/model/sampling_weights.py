"""Copies of a model's linear layers, laid out for products with few rows: those of sampling.

On a CPU a product of a few rows with a weight is bound by how the weight lies in memory. oneDNN,
which PyTorch carries, has a layout of its own for it; the copies are made once for each version of
the weights, with an adapter already added to them. Where products are run in bfloat16, the copies
are in bfloat16, too, but for the last layer's: logits would be rounded to bfloat16 with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from agent_r1.model.policy import Policy
from agent_r1.model.products import are_rounded, exact_products

ROWS = 16
"""Rows that the layout is chosen for; others are nearly as fast."""
MIN_BYTES = 2**26
"""Smaller models lie in the processor's caches, and nothing is gained."""


class SamplingWeights:
    """Takes the place of a policy's linear layers while it samples.

    The weights of the moment are copied: a policy that is trained on needs new ones. Where the
    layout does not exist (on a GPU, for other PyTorch builds), for small models, and where the
    copies would take more than ``most_bytes``, nothing is copied.
    """

    def __init__(self, policy: Policy, most_bytes: float = math.inf) -> None:
        self._layers: list[tuple[torch.nn.Module, Callable[[Tensor], Tensor]]] = []
        dtype = torch.bfloat16 if are_rounded(policy.device) else torch.float32
        if policy.device.type != "cpu" or not _layout_works(dtype):
            return
        size = sum(parameter.nbytes for parameter in policy.base.parameters())
        if not MIN_BYTES <= size <= most_bytes:
            return
        base, known = policy.base, set[int]()
        head = base.get_output_embeddings()
        for module in [*base.get_decoder().modules(), head]:
            if id(module) in known or "forward" in module.__dict__:  # somebody's own
                continue
            if (weight := _weight(module)) is None:
                continue
            known |= {id(inner) for inner in module.modules()}
            own = torch.float32 if module is head else dtype
            self._layers.append((module, _packed(weight, _bias(module), own)))

    @contextmanager
    def used(self) -> Iterator[None]:
        """The layers compute with the copies, without gradients; all else is exact."""
        for module, forward in self._layers:
            module.__dict__["forward"] = forward
        try:
            with exact_products():
                yield
        finally:
            for module, _ in self._layers:
                del module.__dict__["forward"]


def _packed(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), ROWS)
    bias = None if bias is None else bias.to(dtype)

    def forward(x: Tensor) -> Tensor:
        out = torch.ops.mkldnn._linear_pointwise(x.to(dtype), laid_out, bias, "none", [], "")
        return out.to(x.dtype)  # type: ignore[no-any-return]

    return forward


def _weight(module: Any) -> Tensor | None:
    """(outputs, inputs): what a linear layer multiplies by, its adapter included; ``None`` for
    every other module, for half precision, and for adapters that do more than add a product.
    """
    base = getattr(module, "base_layer", module)
    if type(base) is not torch.nn.Linear or base.weight.dtype != torch.float32:
        return None
    weight: Tensor = base.weight.detach()
    if base is module:
        return weight
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged:
        return None
    if any(name in module.lora_variant or module.lora_bias.get(name) for name in names):
        return None
    for name in names:
        weight = weight + module.get_delta_weight(name).detach()
    return weight


def _bias(module: Any) -> Tensor | None:
    bias = getattr(module, "base_layer", module).bias
    return None if bias is None else bias.detach()


@functools.cache
def _layout_works(dtype: torch.dtype) -> bool:
    """Whether this PyTorch's operators do what we rely on; they are not public ones."""
    weight, bias = torch.linspace(-1, 1, 64 * 48).reshape(64, 48), torch.linspace(0, 1, 64)
    x = torch.linspace(1, -1, 2 * 48).reshape(1, 2, 48)
    try:
        ours = _packed(weight, bias, dtype)(x)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    error = (ours - torch.nn.functional.linear(x, weight, bias)).abs().max()
    return bool(error < (1e-5 if dtype == torch.float32 else 0.1))
