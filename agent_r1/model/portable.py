"""Makes model folders readable for other programs, and identifies weights by content hashes.

transformers 5 writes what its predecessors do not know: ``rope_parameters`` for ``rope_theta`` and
``rope_scaling`` (read as 10,000 and none by transformers 4, vLLM and converters, without a word),
``dtype`` for ``torch_dtype``, a tokenizer class of its own. Both forms are written.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

WHOLE_BYTES = 1 << 30
"""Weight files up to this size are hashed whole, larger ones by samples."""
NUM_SAMPLES = 256
"""Samples per file."""
SAMPLE_BYTES = 1 << 16
"""Bytes per sample, evenly spread: an update of the weights changes nearly every one."""


def make_portable(folder: Path) -> None:
    """Adds to a saved model what older readers look for."""
    if (file := folder / "config.json").exists():
        config = json.loads(file.read_text())
        for part in (config, *(v for k, v in config.items() if k == "text_config" and v)):
            part |= _old_names(part)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if (file := folder / "tokenizer_config.json").exists():
        config = json.loads(file.read_text())
        if config.get("tokenizer_class") in (None, "TokenizersBackend"):
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for key in ("backend", "is_local", "local_files_only"):  # of this machine
            config.pop(key, None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _old_names(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration's settings under the names of transformers 4."""
    names: dict[str, Any] = {}
    if "dtype" in config:
        names["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return names
    if isinstance(rope.get("full_attention"), dict):  # by kind of layer, as Gemma 3 has it
        local = rope.get("sliding_attention") or {}
        if "rope_theta" in local:
            names["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        names["rope_theta"] = rope["rope_theta"]
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "type")}
    if "partial_rotary_factor" in rest:
        names["partial_rotary_factor"] = rest.pop("partial_rotary_factor")
    names["rope_scaling"] = rest if rest.get("rope_type", "default") != "default" else None
    return names


def fingerprint(path: str) -> str | None:
    """Content hash of the weights in a folder; ``None`` where there are none."""
    folder = Path(path)
    files = sorted(
        file
        for pattern in ("*.safetensors", "*.bin")
        for file in folder.glob(pattern)
        if file.name not in ("training_args.bin", "optimizer.bin")
    )
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        _add_content(digest, file)
    return digest.hexdigest()


def file_print(file: Path) -> str | None:
    """Content hash of a file; ``None`` if the file cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        if not file.is_file():
            return None
        digest.update(f"{file.stat().st_size}\n".encode())
        _add_content(digest, file)
    except (OSError, ValueError):  # a text that is no path
        return None
    return digest.hexdigest()


def _add_content(digest: Any, file: Path) -> None:
    with file.open("rb") as content:
        if (size := file.stat().st_size) <= WHOLE_BYTES:
            while block := content.read(1 << 22):
                digest.update(block)
            return
        for number in range(NUM_SAMPLES):
            content.seek((size - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1), os.SEEK_SET)
            digest.update(content.read(SAMPLE_BYTES))


def check_weights(folder: Path) -> None:
    """Checks a model's weight files by their headers, which state the right length; raises
    ``ValueError`` for a file that is cut off, or that an index names but that is missing.
    """
    for index in folder.glob("*.safetensors.index.json"):
        files = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(name for name in files if not (folder / name).exists()):
            raise ValueError(f"{missing[0]}, which {index.name} names, is not there")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{file.name}: {error}; is it cut off, or a pointer of Git LFS?"
            ) from error
