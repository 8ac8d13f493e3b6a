"""Residual sum and RMSNorm in PyTorch's own ops: the obvious twin of the kernels."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_rms_norm_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Shapes as in `eco_llm.ops.add_norm.add_rms_norm`; the normalised sum is rounded to `dtype` once."""
    with torch.autocast(x.device.type, enabled=False):
        total = x if delta is None else x + delta
        return total, F.rms_norm(total, weight.shape, weight.to(total.dtype), eps).to(dtype)


def rms_norm_of_sum_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, beside: Tensor | None = None
) -> Tensor:
    """As `eco_llm.ops.add_norm.rms_norm_of_sum`; the sum is in at least float32."""
    if delta is not None and beside is not None:
        delta = cast(Tensor, _Beside.apply(delta, beside))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return add_rms_norm_reference(wide, delta, weight, eps, dtype)[1]


class _Beside(torch.autograd.Function):
    """The identity; the gradient gets `beside` added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beside: Tensor) -> Tensor:
        ctx.save_for_backward(beside)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] + gradients[0], None
