"""Low-rank adapters: new ones, and those of a run or of peft, proven to fit."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from agent_r1.errors import ConfigError
from agent_r1.model.checkpoint_folder import model_folder
from agent_r1.model.settings import LoraSettings
from agent_r1.utils.run_files import BEST, is_run

PATTERN_SECONDS = 5.0


def with_adapter(
    model: PreTrainedModel, lora: LoraSettings | None, folder: Path | None, seed: int
) -> PreTrainedModel:
    """peft's wrapper with a new adapter, which has no effect at first, or a saved one."""
    import peft  # takes a second, and few runs need it

    if folder is not None:
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.base_model_name_or_path = model.name_or_path  # it may come from another machine
            with warnings.catch_warnings():  # of keys that are missing, which is an error here
                warnings.filterwarnings("ignore", ".*missing adapter keys.*")
                adapted = peft.PeftModel.from_pretrained(
                    model, folder, config=config, is_trainable=True
                )
            stored = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
        except Exception as error:  # whatever peft and safetensors raise
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ConfigError(
                f"the adapter in {folder} does not fit {model.name_or_path!r} "
                f"({type(error).__name__}: {reason:.300})"
            ) from error
        _must_fit(adapted, stored, folder)
        return adapted  # type: ignore[return-value]
    assert lora is not None
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config)  # type: ignore[return-value]
        except ValueError as error:
            raise ConfigError(f"model.lora.targets = {lora.targets!r}: {error}") from error


def _must_fit(adapted: Any, stored: dict[str, Tensor], folder: Path) -> None:
    """Raises ``ConfigError`` unless an adapter's file holds exactly what the model needs."""
    import peft

    needed = peft.get_peft_model_state_dict(adapted)
    if missing := sorted(needed.keys() - stored.keys()):
        others = sorted(stored.keys() - needed.keys())
        hint = f"; it has others, as {others[0]!r}" if others else ""
        raise ConfigError(
            f"the adapter in {folder} has no {missing[0]!r} ({len(missing)} of {len(needed)} are "
            f"missing){hint}: it was made for another model, or is not whole"
        )
    if surplus := sorted(stored.keys() - needed.keys()):
        raise ConfigError(
            f"the adapter in {folder} has {surplus[0]!r} and {len(surplus) - 1} more weights that "
            "its target_modules leave out: its two files do not belong together"
        )
    for name, values in stored.items():
        if not values.isfinite().all():
            raise ConfigError(f"the adapter in {folder} is not finite, first in {name!r}")


def start_folder(lora: LoraSettings | None) -> Path | None:
    """Folder of the adapter that training starts from, if any; an error if its shape differs."""
    if lora is None or lora.start is None:
        return None
    given = Path(lora.start).expanduser()
    folder = model_folder(given, BEST) if is_run(given) else given
    file = folder / "adapter_config.json"
    if not file.exists():
        raise ConfigError(
            f"model.lora.start = {lora.start!r}: there is no {file}; name the folder of a run that "
            "trained an adapter, or one that peft wrote (with a run that trained all weights go on "
            "as model.path = 'RUN/checkpoints/best')"
        )
    try:
        config = dict(json.loads(file.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.lora.start = {lora.start!r}: {file} cannot be read as an adapter's: {error}"
        ) from error
    _must_end(config.get("target_modules"), file)
    for key, ours, theirs in (("rank", lora.rank, "r"), ("alpha", lora.alpha, "lora_alpha")):
        if config.get(theirs) != ours:
            raise ConfigError(
                f"model.lora.{key} = {ours}: the adapter in {folder} has {config.get(theirs)}, "
                "and its shape stays; set that"
            )
    return folder.resolve()


def _must_end(targets: Any, file: Path) -> None:
    """Raises ``ConfigError`` for a pattern of layers' names on which matching may never end."""
    if not isinstance(targets, str) or targets == "all-linear":
        return
    code = "import re, sys; re.fullmatch(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-I", "-c", code, targets, "model.layers.10.self_attn.q_proj"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=PATTERN_SECONDS)
    except (subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"{file}: target_modules = {targets!r:.200}: no pattern that can be matched"
        ) from error
