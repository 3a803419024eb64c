"""Models from folders, the hub and packages: found, checked to be complete, with their adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from agent_r1.errors import ConfigError
from agent_r1.model.adapter import start_folder, with_adapter
from agent_r1.model.places import local_path
from agent_r1.model.policy import Policy, make_policy
from agent_r1.model.portable import check_weights, fingerprint
from agent_r1.model.settings import ModelSettings
from agent_r1.utils.run_files import is_run


def load_policy(
    settings: ModelSettings, *, checkpoint: Path | None = None, adapter: bool = True, seed: int = 0
) -> Policy:
    """Loads model and tokenizer. Dropout is off for good: sampling and training must agree.

    Args:
        settings: Which model, and whether it gets an adapter.
        checkpoint: A folder that ``Policy.save`` wrote: the whole model, or its adapter.
        adapter: Whether to add a new adapter, if the settings ask for one; an untrained adapter
            has no effect.
        seed: Seed of a new adapter's weights.
    """
    disable_progress_bar()
    tokenizer = load_tokenizer(settings)
    is_adapter = checkpoint is not None and (checkpoint / "adapter_config.json").exists()
    path = str(checkpoint) if checkpoint and not is_adapter else local_path(settings.path)
    with _readable(settings, path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, settings.dtype),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    model: PreTrainedModel = loaded[0]
    torch.nn.Module.to(model, device_of(settings))
    _must_be_whole(model, loaded[1], path)
    folder = checkpoint if is_adapter else start_folder(settings.lora)
    if folder or (settings.lora and adapter):
        with warnings.catch_warnings():  # peft asks for what transformers renames
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            model = with_adapter(model, settings.lora, folder, seed)
    return make_policy(model, tokenizer)


def contents_of(settings: ModelSettings) -> dict[str, str]:
    """Content hashes of a model and of the adapter that it starts from."""
    path = local_path(settings.path)
    found = fingerprint(path) if Path(path).is_dir() else load_config(settings)._commit_hash
    contents = {} if found is None else {"model": found}
    if (folder := start_folder(settings.lora)) is not None:
        contents |= {"adapter": fingerprint(str(folder)) or ""}
    return contents


def _must_be_whole(model: PreTrainedModel, found: dict[str, Any], path: str) -> None:
    """Raises ``ConfigError`` if weights are missing (they would be random) or not finite."""
    mismatched = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    missing = sorted({*found["missing_keys"], *mismatched})
    if missing:
        others = sorted(found["unexpected_keys"])
        hint = f"; it has others, as {others[0]!r}: are their names prefixed?" if others else ""
        raise ConfigError(
            f"{path}: {len(missing)} weights of {type(model).__name__} are missing or of another "
            f"shape, the first: {missing[0]!r}{hint}"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ConfigError(f"{path}: the weights are not finite, first in {name!r}")


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerFast:
    """The tokenizer alone."""
    path = local_path(settings.path)
    with _readable(settings, path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"model.path = {settings.path!r}: it has no fast tokenizer")
    return tokenizer


def load_config(settings: ModelSettings) -> PreTrainedConfig:
    """The model's configuration alone; fails early where loading the model would fail late."""
    device_of(settings)
    path = local_path(settings.path)
    with _readable(settings, path):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_weights(Path(path))
    if "/" in str(named := getattr(config, "_attn_implementation", None)):
        raise ConfigError(
            f"model.path = {settings.path!r}: its config.json names attention code to be fetched "
            f"from elsewhere ({named!r}), which is never run; take attn_implementation out"
        )
    if reason := _why_not_trainable(config):
        raise ConfigError(f"model.path = {settings.path!r}: {reason}")
    return config


def _why_not_trainable(config: PreTrainedConfig) -> str | None:
    """Why our engines and learner cannot use a configuration, or ``None``."""
    if config.is_encoder_decoder:
        return "it has an encoder and a decoder; take one that goes on with a text"
    if config.get_text_config() is not config:
        return (
            f"it is a {config.model_type} model wrapped for images or sound, whose text part alone "
            "cannot be trained yet; take a model for text"
        )
    quantised = ("quantization_config", "compression_config")
    if any(getattr(config, name, None) is not None for name in quantised):
        return "its weights are quantised, which cannot be trained; take the original"
    return None


def check_sizes(config: PreTrainedConfig, tokenizer: Any, *, longest: int) -> None:
    """Raises ``ConfigError`` where a token has no row in the model, or a position no encoding.

    Args:
        config, tokenizer: Both of one model.
        longest: Tokens of the longest episode.
    """
    last = max(tokenizer.get_vocab().values())
    if last >= config.vocab_size:
        raise ConfigError(
            f"the tokenizer has the id {last}, the model {config.vocab_size} rows: they do not "
            "belong together; resize the model's embeddings"
        )
    positions = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) is not None
    if positions and longest > positions and not rotary:
        raise ConfigError(f"limits.tokens = {longest}: the model has {positions} positions")


def device_of(settings: ModelSettings) -> torch.device:
    """The device that the settings select on this machine."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device = 'cuda': PyTorch sees no CUDA device here; use 'auto'")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(best if settings.device == "auto" else settings.device)


@contextmanager
def _readable(settings: ModelSettings, path: str) -> Iterator[None]:
    """Errors of loading become one line that says what to do."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # whatever transformers, safetensors and the hub's client raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "LFS" in str(error) or "Header" in str(error) or "SafetensorError" in repr(type(error)):
            reason += "; is a file of weights cut off, or a pointer of Git LFS?"
        if is_run(path):
            reason = f"it is a run; its model is {settings.path}/checkpoints/best"
        elif (Path(path) / "adapter_config.json").exists():
            reason = (
                "it holds an adapter, which goes into model.lora.start, with the model that it was "
                "trained on as model.path"
            )
        raise ConfigError(
            f"model.path = {settings.path!r}: no model can be loaded from there ({reason})"
        ) from error
