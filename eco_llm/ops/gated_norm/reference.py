"""Gated RMSNorm in PyTorch's own ops: the obvious twin of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm_reference(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Shapes as in `eco_llm.ops.gated_norm.gated_rms_norm`; inside, float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(torch.promote_types(y.dtype, weight.dtype), torch.float32)
    with torch.autocast(y.device.type, enabled=False):
        gated = y.to(wide) * F.silu(z.to(wide))
        return F.rms_norm(gated, weight.shape, weight.to(wide), eps).to(y.dtype)
