"""The trainer's seam to the optimizer: clip, refuse bad gradients, step.

A step whose loss or gradient norm is not finite changes nothing. For C3O and for PyTorch's fused AdamW the verdict
stays on the device (`found_inf`, the gradient scalers' protocol) and the host never waits; any other optimizer (Muon,
unfused AdamW: comparison only) costs one host read a step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from eco_llm.config import OptimizerConfig
from eco_llm.optim.c3o import C3O
from eco_llm.optim.grads import clamp_, clip_factor, global_norm, scale_


class UpdateResult(NamedTuple):
    """What a step did; device tensors, so that the trainer can read them a step later."""

    grad_norm: Tensor
    """0-dim: 2-norm of all gradients, before clipping."""
    applied: Tensor
    """0-dim bool: loss and gradients were finite and the step was taken."""


class Update:
    """One optimizer and how to step it.

    Args:
        optimizer: what `build_optimizer` made; C3O clips by its own settings, which come from the same config.
        config: clip threshold and mode for the others.
    """

    def __init__(self, optimizer: Optimizer, config: OptimizerConfig) -> None:
        self.optimizer = optimizer
        self._clip, self._clip_mode = config.grad_clip, config.grad_clip_mode
        self._gated_on_device = bool(getattr(optimizer, "_step_supports_amp_scaling", False))

    @torch.no_grad()
    def step(self, loss: Tensor) -> UpdateResult:
        """Apply the gradients that `backward` left in the parameters, unless something is not finite.

        Args:
            loss: 0-dim, the loss that the gradients belong to.

        Raises:
            ValueError: no parameter has a gradient.
        """
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = global_norm(grads)
        applied = torch.isfinite(norm) & torch.isfinite(loss.detach()).to(norm.device, non_blocking=True)
        if isinstance(self.optimizer, C3O):
            self.optimizer.grad_norm = norm
        elif self._clip > 0:
            self._clip_gradients(grads, norm)

        if self._gated_on_device:
            optimizer: Any = self.optimizer
            optimizer.found_inf = (~applied).to(torch.float32)
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf
        elif applied:  # the one host read
            self.optimizer.step()
        return UpdateResult(norm, applied)

    def _clip_gradients(self, grads: list[Tensor], norm: Tensor) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for g in grads:
            kinds.setdefault((g.device, g.dtype), []).append(g)
        for members in kinds.values():
            if self._clip_mode == "norm":
                scale_(members, clip_factor(norm, self._clip).to(members[0].device, non_blocking=True))
            else:
                clamp_(members, self._clip)

    def set_lr(self, lr: float) -> None:
        """Learning rate of every group from the next step on."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def zero_grad(self) -> None:
        """Drop all gradients (their memory too)."""
        self.optimizer.zero_grad(set_to_none=True)

    def metrics(self) -> dict[str, float]:
        """The optimizer's own figures; empty for PyTorch's. Synchronises with the device."""
        return self.optimizer.metrics() if isinstance(self.optimizer, C3O) else {}

    def metrics_tensor(self) -> tuple[tuple[str, ...], Tensor]:
        """`metrics` without the wait: (names, float32 [names] on the device)."""
        if isinstance(self.optimizer, C3O):
            return self.optimizer.metrics_tensor()
        return (), torch.empty(0)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state dict."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.optimizer.load_state_dict(state_dict)
