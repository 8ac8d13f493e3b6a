"""Causal depthwise convolution + SiLU in PyTorch's own ops: the obvious twin of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None) -> Tensor:
    """Shapes as in `eco_llm.ops.causal_conv.causal_conv_silu`; sums are float32 (float64 for float64 inputs)."""
    taps = weight.shape[1]
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    # Autocast would cast the operands of the convolution down again.
    with torch.autocast(x.device.type, enabled=False):
        before = F.pad(x, (0, 0, taps - 1, 0)) if past is None else torch.cat((past.to(x.dtype), x), dim=1)
        if torch.compiler.is_compiling():
            # One fused pass over the tokens as they lie; conv1d cannot be fused, and wants channels first.
            time = x.shape[1]
            pre = bias.to(wide) + sum(before[:, k : k + time].to(wide) * weight[:, k].to(wide) for k in range(taps))
            return F.silu(pre).to(x.dtype)
        channels_first = before.to(wide).transpose(1, 2)
        pre = F.conv1d(channels_first, weight.to(wide).unsqueeze(1), bias.to(wide), groups=x.shape[2])
        return F.silu(pre).transpose(1, 2).to(x.dtype)
