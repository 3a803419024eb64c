"""The policy: a Hugging Face causal language model, its tokenizer, its forward pass over trees."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from agent_r1.model import tree_attention as attention
from agent_r1.model.logprobs import head_logprobs
from agent_r1.model.portable import make_portable
from agent_r1.model.products import are_rounded
from agent_r1.model.tree_attention import PackedTree, Span, Tree


@dataclass
class Policy:
    """A model with its tokenizer. The same model object samples and is trained.

    Attributes:
        model: The causal language model, or peft's wrapper around it.
        tokenizer: Its tokenizer.
        unpackable: Why the model cannot run trees of tokens; ``None`` if it can.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    unpackable: str | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def base(self) -> PreTrainedModel:
        """The model without peft's wrapper; adapters, if any, are in its layers."""
        return self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, key-value heads and head width: the shape of a token's keys and values."""
        return cache_shape(self.base.config)

    @property
    def cache_bytes(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * math.prod(self.cache_shape) * self.base.dtype.itemsize

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Turns the adapter off: the base policy runs."""
        with self.model.disable_adapter():  # type: ignore[operator]
            yield

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Lets trees be run, forward and backward; outside, the model is an ordinary one."""
        config = self.base.config
        before = config._attn_implementation
        config._attn_implementation = attention.NAME
        try:
            yield
        finally:
            config._attn_implementation = before

    def hidden(self, token_ids: Tensor, positions: Tensor, tree: Tree) -> Tensor:
        """The last hidden states (T, W) of a tree's tokens (T,) at positions (T,), in
        ``packed()``.
        """
        assert self.base.config._attn_implementation == attention.NAME, "only in packed()"
        output = self.base.get_decoder()(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False, tree=tree
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(A, W) to (A, V)."""
        logits: Tensor = self.base.get_output_embeddings()(hidden)
        return logits

    def logprobs(
        self, hidden: Tensor, token_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (A,) of tokens (A,) from the hidden states (A, W) before
        them.
        """
        head = self.base.get_output_embeddings()
        return head_logprobs(hidden, head.weight, head.bias, token_ids, temperature)

    def save(self, folder: Path) -> None:
        """Writes a plain Hugging Face model folder, or peft's adapter alone; other programs can
        read it, too.
        """
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        make_portable(folder)

    def stops_at(self, token_ids: Sequence[int]) -> None:
        """Records in saved folders that these tokens end a turn, for programs that read
        ``generation_config``.
        """
        config = self.base.generation_config
        if config is None:
            return
        known = config.eos_token_id
        known = [] if known is None else [known] if isinstance(known, int) else list(known)
        config.eos_token_id = list(dict.fromkeys([*token_ids, *known]))

    def merged(self) -> Policy:
        """A policy with the adapter merged into the weights, for good. If the adapter changes an
        embedding that is tied to the output layer, the two are untied first.
        """
        base = self.base
        heads = (base.get_input_embeddings(), base.get_output_embeddings())
        if base.config.tie_word_embeddings and any(hasattr(h, "base_layer") for h in heads):
            layer = getattr(heads[1], "base_layer", heads[1])
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
            base.config.tie_word_embeddings = False
        merged = self.model.merge_and_unload()  # type: ignore[operator]
        return dataclasses.replace(self, model=merged)


def make_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Policy:
    """A policy around a loaded model, dropout off; finds out whether trees can be packed."""
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  # mypy takes it for a layer
    policy = Policy(model, tokenizer, why_unpackable(model.config))
    if policy.unpackable is None:
        policy.unpackable = _prove(policy)
    return policy


def cache_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, key-value heads and head width of a configuration."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers, key_heads, width


def why_unpackable(config: PreTrainedConfig) -> str | None:
    """Why trees cannot be packed, as far as a configuration shows; ``None`` if nothing forbids it.

    The rotation of a packed token must depend on its position alone, and its past must be nothing
    but keys and values.
    """
    if getattr(config, "kv_lora_rank", None) is not None:
        return "its attention is latent (MLA)"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if odd := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of type {', '.join(sorted(odd))}"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type", "default") in ("dynamic", "longrope"):
            return f"its position encoding ({parameters['rope_type']}) depends on the length"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            return f"it caps logits ({name})"
    return None


@torch.no_grad()
def _prove(policy: Policy) -> str | None:
    """Compares a small packed tree with plain forward passes over its branches; returns what
    differs, or ``None``.
    """
    base = policy.base
    if not isinstance(base.get_output_embeddings(), torch.nn.Linear):
        return "its output layer is not a plain linear one"
    if not getattr(base, "_supports_attention_backend", False):
        return f"{type(base).__name__} has no exchangeable attention function"
    ids = [(7 * i + 3) % base.config.vocab_size for i in range(13)]
    spans = [Span(0, 5, 13, 0), Span(5, 9, 9, 5), Span(9, 13, 13, 5)]
    positions = [*range(5), *range(5, 9), *range(5, 9)]
    as_tensor = functools.partial(torch.tensor, device=policy.device)
    with policy.packed():
        try:
            tree = PackedTree(spans, policy.device)
            hidden = policy.hidden(as_tensor(ids), as_tensor(positions), tree)
        except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__} in its forward pass: {error}"
    packed = policy.logits(hidden).float().log_softmax(-1)
    # Half precision rounds single logits by more than a small mistake would move them, but on
    # average SmolLM2 stays within .04, where one position off gives .13.
    single = base.dtype == torch.float32 and not are_rounded(policy.device)
    worst, tolerance = 0.0, 1e-3 if single else 0.08
    for path in ([*range(9)], [*range(5), *range(9, 13)]):
        plain = policy.model(input_ids=as_tensor([[ids[i] for i in path]]), use_cache=False)
        difference = (plain.logits[0].float().log_softmax(-1) - packed[path]).abs()
        worst = max(worst, (difference.max() if single else difference.mean()).item())
    return None if worst < tolerance else f"packed log-probabilities differ by {worst:.2g}"
