"""Residual sum and RMSNorm in PyTorch's own ops: the obvious twin of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_rms_norm_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Shapes as in `eco_llm.ops.add_norm.add_rms_norm`; the normalised sum is rounded to `dtype` once."""
    with torch.autocast(x.device.type, enabled=False):
        total = x if delta is None else x + delta
        return total, F.rms_norm(total, weight.shape, weight.to(total.dtype), eps).to(dtype)


def rms_norm_of_sum_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Shapes as in `eco_llm.ops.add_norm.rms_norm_of_sum`; the sum is in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return add_rms_norm_reference(wide, delta, weight, eps, dtype)[1]
