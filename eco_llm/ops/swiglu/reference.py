"""SwiGLU in PyTorch's own ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ in the type of x, or in autocast's if that is on (its cache then casts a weight once a context)."""
    return F.linear(x, weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype))


def swiglu_mlp_reference(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Shapes as in `eco_llm.ops.swiglu.swiglu_mlp`; honours autocast."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear(F.silu(gate) * up, down)
