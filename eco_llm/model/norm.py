"""RMSNorm with float32 statistics and the type of its input kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eco_llm.ops.add_norm import add_rms_norm, forked_rms_norm, rms_norm_of_sum
from eco_llm.ops.add_up import Ahead


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (arXiv 1910.07467).

    Statistics are float32 inside the kernel. The weight is cast to the type of x, not x to the weight's: PyTorch's
    fused kernel needs both alike, and casting `dim` numbers is free.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> the same shape and type."""
        # CUDA's autocast would cast a bf16 x up, and store a float32 result that the next product rounds again.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def of_sum(self, x: Tensor, delta: Tensor | None, *, keep_sum: bool) -> tuple[Tensor, Tensor]:
        """(x + delta in the type of x, its norm in the type of products); as `add_rms_norm`, all [B, T, dim]."""
        return add_rms_norm(x, delta, self.weight, self.eps, keep_sum=keep_sum)

    def alone(self, x: Tensor, delta: Tensor | None = None, beside: Tensor | None = None) -> Tensor:
        """The norm of x + delta in the type of products, the sum not kept; as `rms_norm_of_sum`, all [B, T, dim]."""
        return rms_norm_of_sum(x, delta, self.weight, self.eps, beside=beside)

    def forked(self, x: Tensor, ahead: Ahead) -> tuple[Tensor, Tensor]:
        """(x for its other reader, `alone(x)`); as `forked_rms_norm`, all [B, T, dim]."""
        return forked_rms_norm(x, self.weight, self.eps, ahead)
