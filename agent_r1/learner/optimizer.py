"""AdamW on float32 master weights, whatever the model's own precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from agent_r1.learner.settings import LearnerSettings


class Optimizer:
    """Updates the trainable parameters, and those of a value head at a rate of their own.

    A parameter in half precision has a float32 master: gradients of micro-batches are summed in
    float32, the step is made there, and the parameter is its rounding. Small steps are not lost.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        settings: LearnerSettings,
        *,
        head: Iterable[Parameter] = (),
        head_lr: float = 0.0,
    ) -> None:
        """``head``: float32; ``head_lr``: its rate while the others use ``settings.lr``."""
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [self._master(p) for p in self.parameters]
        self.head = list(head)
        self._scales = (1.0, head_lr / settings.lr)
        groups: list[dict[str, Any]] = [
            {"params": self.masters},
            *([{"params": self.head}] if self.head else []),
        ]
        self._adamw = torch.optim.AdamW(
            groups,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    @staticmethod
    def _master(parameter: Parameter) -> Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        master = parameter.detach().float().requires_grad_()

        def add_up(_: Tensor) -> None:
            assert parameter.grad is not None
            grad, parameter.grad = parameter.grad.float(), None
            master.grad = grad if master.grad is None else master.grad.add_(grad)

        parameter.register_post_accumulate_grad_hook(add_up)
        return master

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)
        for parameter in self.parameters:  # left behind where memory ran out
            parameter.grad = None

    def clip_grad(self, max_norm: float) -> float:
        """Scales the gradient down to ``max_norm``; returns its norm before. The head's gradient
        is clipped separately, as its size is unrelated.
        """
        if self.head:
            torch.nn.utils.clip_grad_norm_(self.head, max_norm, error_if_nonfinite=False)
        return torch.nn.utils.clip_grad_norm_(self.masters, max_norm).item()

    def step(self, lr: float) -> None:
        for group, scale in zip(self._adamw.param_groups, self._scales, strict=False):
            group["lr"] = lr * scale
        self._adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Moments, and the masters of parameters that are not float32 themselves."""
        pairs = zip(self.parameters, self.masters, strict=True)
        masters = [None if master is p else master.detach() for p, master in pairs]
        return {"adamw": self._adamw.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adamw.load_state_dict(state["adamw"])
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                if saved is not None:
                    master.copy_(saved)
