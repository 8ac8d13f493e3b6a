"""The trainer's seam to the optimizer: clip, refuse bad gradients, step.

A step whose loss or gradient norm is not finite changes nothing. For C3O and for PyTorch's fused AdamW the verdict
stays on the device and the host never waits (AdamW: `found_inf`, the gradient scalers' protocol; C3O's kernels also
measure the norm and clip); any other optimizer (Muon, unfused AdamW: comparison only) costs one host read a step.

CUDA graphs: `make_capturable()` before each capture, then `step` inside it, and `set_lr` between replays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from eco_llm.config import OptimizerConfig
from eco_llm.optim.c3o import C3O
from eco_llm.optim.grads import clamp_, clip_factor, global_norm, scale_

SETTINGS_OF_THIS_RUN = ("trust_norm_refresh_drift",)
"""Settings of parameter groups that a loaded state leaves alone: `--c3o-trust-norm-refresh-drift` is free on resume."""


class UpdateResult(NamedTuple):
    """What a step did; device tensors, so that the trainer can read them a step later."""

    grad_norm: Tensor
    """0-dim: 2-norm of all gradients, before clipping."""
    applied: Tensor
    """0-dim bool: loss and gradients were finite and the step was taken."""


class Update:
    """One optimizer and how to step it. (`release.ReleasedUpdate` does the same from inside backward.)

    Args:
        optimizer: what `build_optimizer` made; C3O clips by its own settings, which come from the same config.
        config: clip threshold and mode for the others.
    """

    def __init__(self, optimizer: Optimizer, config: OptimizerConfig) -> None:
        self.optimizer = optimizer
        self._clip, self._clip_mode = config.grad_clip, config.grad_clip_mode
        self._made_capturable = False
        self._gated_on_device = bool(getattr(optimizer, "_step_supports_amp_scaling", False))

    @property
    def optimizers(self) -> list[Optimizer]:
        """All there are."""
        return [self.optimizer]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to the parameters'."""
        loss.backward()

    def rehearse(self, loss: Tensor) -> None:
        """`backward` for the sake of what it compiles and tunes; its gradients are to be dropped."""
        loss.backward()

    @torch.no_grad()
    def step(self, loss: Tensor) -> UpdateResult:
        """Apply the gradients that `backward` left in the parameters, unless something is not finite.

        Args:
            loss: 0-dim, the loss that the gradients belong to.

        What gradients hold afterwards is unspecified: some paths clip them in place.

        Raises:
            ValueError: no parameter has a gradient.
        """
        if isinstance(self.optimizer, C3O):
            return UpdateResult(*self.optimizer.guarded_step(loss))
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = global_norm(grads)
        applied = torch.isfinite(norm) & torch.isfinite(loss.detach()).to(norm.device, non_blocking=True)
        if self._clip > 0:
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

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can record `step`: C3O when its kernels serve every parameter, fused AdamW on a GPU.

        Muon never: it reads the verdict on the host, and PyTorch's takes its learning rate as a number.
        """
        if isinstance(self.optimizer, C3O):
            return self.optimizer.capturable
        return isinstance(self.optimizer, torch.optim.AdamW) and all(
            group["fused"] and all(p.device.type == "cuda" for p in group["params"])
            for group in self.optimizer.param_groups
        )

    @torch.no_grad()
    def make_capturable(self) -> None:
        """Prepare for CUDA-graph capture of `step`; changes no parameter. Idempotent; call before each capture.

        Learning rates become device values, which `set_lr` fills between replays. All state that a step would create is
        created (inside a capture it would be zeroed by every replay), and C3O's kernels are compiled and loaded.
        `load_state_dict` ends the validity of graphs captured before.

        Raises:
            RuntimeError: not `capturable`.
        """
        if not self.capturable:
            raise RuntimeError(f"{type(self.optimizer).__name__}: a CUDA graph cannot record this step")
        if isinstance(self.optimizer, C3O):
            self.optimizer.make_capturable()
        else:
            self._make_adamw_capturable()
        self._made_capturable = True

    def _make_adamw_capturable(self) -> None:
        for group in self.optimizer.param_groups:
            params = [p for p in group["params"] if p.requires_grad]
            if not isinstance(group["lr"], Tensor) and params:
                group["lr"] = torch.full((1,), group["lr"], dtype=torch.float32, device=params[0].device)
            group["capturable"] = True
            for p in params:
                state = self.optimizer.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)

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
        """The optimizer's state dict; learning rates are numbers in it whatever `make_capturable` made of them."""
        state = self.optimizer.state_dict()
        if self._made_capturable:
            for group in state["param_groups"]:
                group["lr"] = float(group["lr"])
                if "capturable" in group:  # a CPU that resumes would refuse it
                    group["capturable"] = False
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Graphs captured before then update memory that is no longer the state.

        Settings of groups are the saved ones, but for `SETTINGS_OF_THIS_RUN`.
        """
        mine = [{k: group[k] for k in SETTINGS_OF_THIS_RUN if k in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state_dict)
        for group, settings in zip(self.optimizer.param_groups, mine, strict=True):
            group |= settings
        if self._made_capturable:
            self.make_capturable()
