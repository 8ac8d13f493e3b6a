"""The settings of the C3O rule, checked once, and the facts both paths must agree on.

A parameter group of `C3O` is a plain dictionary (so that state dicts stay plain); `Rule` is its checked, typed
view. Nothing here touches a tensor's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eco_llm.optim.storage import STORAGES, Storage

BLOCK = 4096
"""Elements in a credit block; blocks run over a tensor's elements in row-major order, the last may be short."""

WEIGHT_ROUNDINGS = ("dithered", "nearest")


@dataclass(frozen=True)
class Rule:
    """One parameter group's settings; `docs/c3o.md` defines each of them."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    trust_radius: float
    trust_floor: float
    sphere: float
    trust_norm_refresh_drift: float
    trust_norm_refresh_steps: int
    credit_gain: float
    credit_min: float
    credit_max: float
    credit_beta: float
    nesterov: bool
    grad_clip: float
    grad_clip_mode: str
    weight_rounding: str
    error_bits: int
    storage: Storage

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Rule:
        """The group's settings as they are now (schedules may have changed `lr` since the last step)."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        return cls(
            lr=lr.reshape(()) if isinstance(lr, Tensor) else lr,
            beta1=beta1,
            beta2=beta2,
            storage=STORAGES[group["state_dtype"]],
            **{name: group[name] for name in _PLAIN},
        )

    @property
    def clips_norm(self) -> bool:
        return self.grad_clip > 0 and self.grad_clip_mode == "norm"

    @property
    def clips_value(self) -> bool:
        return self.grad_clip > 0 and self.grad_clip_mode == "value"

    @property
    def has_trust(self) -> bool:
        return self.trust_radius > 0

    @property
    def has_sphere(self) -> bool:
        return self.sphere > 0

    @property
    def measures(self) -> bool:
        """Whether a step needs the norms of weights and updates, unless they may be skipped."""
        return self.has_trust or self.has_sphere

    @property
    def may_skip_norms(self) -> bool:
        """The sphere divides by norms, so it always measures them."""
        return self.has_trust and self.trust_norm_refresh_drift > 0 and not self.has_sphere

    @property
    def has_credit(self) -> bool:
        return self.credit_gain > 0

    @property
    def dithers_weights(self) -> bool:
        """bfloat16 parameters; others are stored as they are computed, or (float16) rounded to nearest."""
        return self.weight_rounding == "dithered"

    def keeps_error(self, param: torch.dtype) -> bool:
        """Whether parameters of this type have 8 more bits in the state."""
        return self.error_bits > 0 and param == torch.bfloat16

    @property
    def credit_range(self) -> tuple[float, float]:
        """(s_min, s_max) that the credit factors can take."""
        return (self.credit_min, self.credit_max) if self.has_credit else (1.0, 1.0)


_PLAIN = (
    "eps", "weight_decay", "trust_radius", "trust_floor", "sphere", "trust_norm_refresh_drift",
    "trust_norm_refresh_steps", "credit_gain", "credit_min", "credit_max", "credit_beta", "nesterov", "grad_clip",
    "grad_clip_mode", "weight_rounding", "error_bits",
)  # fmt: skip


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting outside the rule's definition. NaN is always refused."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"C3O: Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    elif not 0.0 <= lr < float("inf"):
        raise ValueError(f"C3O: lr must be finite and >= 0, got {lr}")
    if len(group["betas"]) != 2 or not all(0.0 <= b < 1.0 for b in group["betas"]):
        raise ValueError(f"C3O: betas must be two numbers in [0, 1), got {group['betas']}")
    if not 0.0 < group["eps"] < float("inf"):
        raise ValueError(f"C3O: eps must be > 0 (an element that never had a gradient is 0/0), got {group['eps']}")
    for name in ("weight_decay", "trust_radius", "trust_floor", "sphere", "credit_gain", "grad_clip"):
        if not 0.0 <= group[name] < float("inf"):
            raise ValueError(f"C3O: {name} must be finite and >= 0, got {group[name]}")
    if not (isinstance(lr, Tensor) and lr.device.type != "cpu") and not group["sphere"] * float(lr) < 1.0:
        raise ValueError(
            f"C3O: sphere · lr must be under 1, the share of |θ| that a step moves; got {group['sphere']} · {float(lr)}"
        )
    for name in ("trust_norm_refresh_drift", "credit_beta"):
        if not 0.0 <= group[name] < 1.0:
            raise ValueError(f"C3O: {name} must be in [0, 1), got {group[name]}")
    if not group["trust_norm_refresh_steps"] >= 1:
        raise ValueError(f"C3O: trust_norm_refresh_steps must be >= 1, got {group['trust_norm_refresh_steps']}")
    if not 0.0 < group["credit_min"] <= 1.0 <= group["credit_max"] < float("inf"):
        raise ValueError(
            "C3O: credit factors need 0 < credit_min <= 1 <= credit_max,"
            f" got {group['credit_min']} and {group['credit_max']}"
        )
    if group["grad_clip_mode"] not in ("value", "norm"):
        raise ValueError(f"C3O: grad_clip_mode must be 'value' or 'norm', got {group['grad_clip_mode']!r}")
    if group["state_dtype"] not in STORAGES:
        raise ValueError(f"C3O: state_dtype must be one of {', '.join(STORAGES)}, got {group['state_dtype']!r}")
    if group["weight_rounding"] not in WEIGHT_ROUNDINGS:
        raise ValueError(
            f"C3O: weight_rounding must be one of {', '.join(WEIGHT_ROUNDINGS)}, got {group['weight_rounding']!r}"
        )
    if group["error_bits"] not in (0, 8):
        raise ValueError(f"C3O: error_bits must be 0 or 8, got {group['error_bits']!r}")
    if group["error_bits"] and group["weight_rounding"] != "dithered":
        raise ValueError("C3O: error_bits are dithered: they need weight_rounding='dithered'")


def compiled_settings(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Settings of a group that the kernels are compiled for: groups that differ in one have launches of their own."""
    return group["weight_rounding"], group["nesterov"]


def compute_dtype(param: Tensor, storage: Storage) -> torch.dtype:
    """The type arithmetic is done in: float64 if the parameter or its state is, otherwise float32."""
    return torch.promote_types(torch.promote_types(param.dtype, storage.number), torch.float32)


def block_count(numel: int) -> int:
    """Credit blocks that cover `numel` elements."""
    return -(-numel // BLOCK)
