"""SwiGLU in PyTorch's own ops."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from eco_llm.ops.products import linear, linear_unread


def swiglu_mlp_reference(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Shapes as in `eco_llm.ops.swiglu.swiglu_mlp`; honours autocast."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear(F.silu(gate) * up, down)


def swiglu_mlp_unread_reference(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`eco_llm.ops.swiglu.swiglu_mlp_unread`; honours autocast."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear_unread(F.silu(gate) * up, down)
