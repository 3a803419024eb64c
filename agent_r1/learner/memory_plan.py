"""Free memory, and the memory that a run would need: estimated in advance, because running out of
memory on a CPU kills the process instead of raising an exception.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from agent_r1.errors import ConfigError
from agent_r1.learner.settings import LearnerSettings
from agent_r1.model.logprobs import CHUNK_BYTES, KEPT_BYTES
from agent_r1.model.policy import Policy, cache_shape, why_unpackable
from agent_r1.model.settings import ModelSettings
from agent_r1.model.tree_attention import PackedTree, Span

SHARE = 0.85
"""Share of the free memory that a run plans with; the rest covers the estimate's gaps."""
TRANSIENT = 1.3
"""Ratio of peak backward memory to saved activations."""
CHUNKS = 4
"""Chunks of logits at once: as computed, in float32, their exponentials, their gradient."""
MAX_MICRO_BATCH = {"cpu": 4096, "cuda": 32768}
"""Larger micro-batches are not faster; on a CPU their data would not fit the caches."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, estimated.

    Attributes:
        available: Free now.
        weights: Weights, gradients, masters and moments of the optimiser, a reference model.
        activations: Saved for the backward pass, per token of a micro-batch.
        logits: Logits of a micro-batch.
        cache: Keys and values of one token.
        micro_batch_tokens: Tokens of a micro-batch.
    """

    available: int
    weights: int
    activations: int
    logits: int
    cache: int
    micro_batch_tokens: int

    def figures(self, *, episodes: int, tokens: int) -> dict[str, int]:
        """Bytes by use, for ``episodes`` at once of ``tokens`` tokens."""
        return {
            "weights, gradients, optimiser": self.weights,
            f"activations of a micro-batch of {self.micro_batch_tokens:,} tokens": (
                self.activations * self.micro_batch_tokens + self.logits
            ),
            "key-value caches, at most": episodes * tokens * self.cache,
            "free now": self.available,
        }


def plan_memory(
    config: PreTrainedConfig,
    model: ModelSettings,
    learner: LearnerSettings,
    *,
    device: torch.device,
    longest: int,
    reference: bool,
) -> MemoryPlan:
    """Chooses the size of micro-batches so that training fits in the memory that is free.

    Args:
        config: The model's.
        model, learner: Settings; a size of micro-batches given there is kept.
        device: Where training runs.
        longest: Tokens of the longest episode, which is never cut.
        reference: Whether a reference model is loaded, too.

    Raises:
        ConfigError: Not even one episode fits.
    """
    dtype: torch.dtype = getattr(torch, model.dtype)
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    num_weights = sum(parameter.numel() for parameter in skeleton.parameters())
    weights = num_weights * dtype.itemsize
    if model.lora is None:  # gradient and two moments, and a master if weights are not float32
        weights += num_weights * 4 * (3 if dtype == torch.float32 else 4)
    if reference and (model.lora is None or model.lora.start):
        weights += num_weights * dtype.itemsize
    activations = int(TRANSIENT * _activations(skeleton, learner.checkpointing))
    logits = CHUNKS * CHUNK_BYTES[device.type] + min(KEPT_BYTES, longest * config.vocab_size * 4)
    available = free_memory(device)
    room = int(SHARE * available) - weights - logits
    fits = room // activations
    if fits < longest:
        raise ConfigError(
            f"limits.tokens = {longest}: training on one episode of that length needs about "
            f"{_gib(weights + logits + longest * activations)}, {_gib(available)} are free; lower "
            "it, set learner.checkpointing = true, or train an adapter with [model.lora]"
        )
    chosen = learner.micro_batch_tokens
    chosen = chosen or max(longest, min(fits, MAX_MICRO_BATCH[device.type]))
    packable = why_unpackable(config) is None
    cache = 2 * math.prod(cache_shape(config)) * dtype.itemsize if packable else 0
    return MemoryPlan(available, weights, activations, logits, cache, chosen)


def free_memory(device: torch.device) -> int:
    """Bytes still available, limits of a container included."""
    if device.type == "cuda":  # blocks that PyTorch holds and nobody uses are free, too
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (group / "memory.current").exists():
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            lines = (group / "memory.stat").read_text().splitlines()
            reclaimable = next(
                (int(x.split()[1]) for x in lines if x.startswith("inactive_file ")), 0
            )
            available = min(available, int(limit) - used + reclaimable)
    return max(available, 0)


def _activations(skeleton: PreTrainedModel, checkpointing: bool) -> float:
    """Bytes that a forward pass keeps for each token, counted on a model without weights."""
    num_tokens = 64
    config = skeleton.config
    width = int(config.hidden_size) * skeleton.dtype.itemsize
    rough = 34.0 * int(config.num_hidden_layers) * width
    kept = rough
    if why_unpackable(config) is None:
        try:
            kept = _saved_bytes(Policy(skeleton, None), num_tokens) / num_tokens  # type: ignore[arg-type]
        except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError):
            kept = rough  # its layers do not run without weights
    if checkpointing:  # the input of every layer, and all of the layer being recomputed
        return int(config.num_hidden_layers) * width + kept / int(config.num_hidden_layers)
    return kept


def _saved_bytes(policy: Policy, num_tokens: int) -> int:
    weights = {id(parameter) for parameter in policy.model.parameters()}
    sizes: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights and id(tensor._base) not in weights:
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.device("meta"):
        positions = torch.arange(num_tokens)
        tree = PackedTree([Span(0, num_tokens, num_tokens, 0)], torch.device("meta"))
        with policy.packed(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            policy.hidden(torch.zeros_like(positions), positions, tree)
    return sum(sizes.values())


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
