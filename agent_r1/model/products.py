"""Matrix products of float32 tensors in bfloat16, on processors with matrix units for them.

oneDNN, which PyTorch carries, then rounds both factors and adds up in float32; weights, activations
and gradients stay float32. The choice holds for the whole process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from agent_r1.errors import ConfigError
from agent_r1.model.settings import ModelSettings

_changed_from: list[str] = []
"""PyTorch's precision before a run asked for rounded products, until one does without."""
_exact: list[None] = []
"""One for each ``exact_products`` in force."""
_LOCK = threading.Lock()


def must_be_of_use(settings: ModelSettings, device: torch.device) -> None:
    """Raises ``ConfigError`` where ``model.matmul`` is set and could not make anything faster."""
    if settings.matmul is None:
        return
    if settings.dtype != "float32":
        reason = f"model.dtype = {settings.dtype!r} does so already; leave one of them out"
    elif device.type != "cpu":
        reason = "it is for processors; on a GPU take model.dtype = 'bfloat16'"
    elif not are_of_use(device):
        reason = (
            "this processor has no matrix units for it (AMX), so that it would be no faster; leave "
            "it out"
        )
    else:
        return
    raise ConfigError(f"model.matmul = {settings.matmul!r}: {reason}")


def set_products(settings: ModelSettings, device: torch.device) -> None:
    """Has products rounded, or no longer: the last call decides for the whole process. Where that
    would be of no use (a run that was made on another machine), they stay exact.
    """
    wanted = settings.matmul is not None and are_of_use(device)
    if wanted and not _changed_from:
        try:
            _changed_from.append(torch.get_float32_matmul_precision())
        except RuntimeError as error:
            raise ConfigError(
                f"model.matmul = {settings.matmul!r}: this program has set the precision of "
                "products already (torch.backends' fp32_precision); leave one of them out"
            ) from error
        torch.set_float32_matmul_precision("medium")  # PyTorch's word for bfloat16
    elif not wanted and _changed_from:
        torch.set_float32_matmul_precision(_changed_from.pop())


@contextmanager
def exact_products() -> Iterator[None]:
    """Products that a run has had rounded are exact meanwhile, in the whole process: for the many
    small ones of attention in sampling, which oneDNN takes longer to prepare than to run. Threads
    may be in it side by side: the last one ends it.
    """
    with _LOCK:
        _exact.append(None)
        if _changed_from:
            torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with _LOCK:
            _exact.pop()
            if _changed_from and not _exact:
                torch.set_float32_matmul_precision("medium")


def are_rounded(device: torch.device) -> bool:
    """Whether products of float32 tensors may be rounded on this device at the moment."""
    if not are_of_use(device):
        return False
    if _changed_from:  # also while ``exact_products`` is in force
        return True
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by PyTorch's other interface
        return True


def are_of_use(device: torch.device) -> bool:
    """Whether the device is a processor with matrix units for bfloat16. oneDNN uses AMX alone for
    products of float32 tensors; AVX512-BF16 it uses for those of bfloat16 only.
    """
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16"))
