"""Addition, RMSNorm and their gradient in PyTorch's own ops: the obvious twin of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from eco_llm.ops.add_norm.reference import add_rms_norm_reference


def residual_norm_reference(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the stream and of what a sub-layer adds to it, and the sum's norm.

    Args:
        x: [B, T, D] float32.
        y: [B, T, D], float32 or narrower; None adds nothing.
        weight: [D] float32.
        eps: added to the mean square.
        dtype: of u.

    Returns:
        (x + y [B, T, D] float32, u [B, T, D], 1 / rms [B, T] float32).
    """
    total, u = add_rms_norm_reference(x, y, weight, eps, dtype)
    return total, u, torch.rsqrt(total.square().mean(dim=-1) + eps)


def residual_norm_backward_reference(
    d_u: Tensor, u: Tensor, inverse: Tensor, weight: Tensor, d_total: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `residual_norm_reference` from its result u, in the place of which an approximation may stand.

    Args:
        d_u, u: [B, T, D].
        inverse: [B, T] float32.
        weight: [D] float32; a channel whose weight is 0, or subnormal, counts as 0 before it, for u does not tell.
        d_total: [B, T, D] float32, what reaches the sum by other ways.

    Returns:
        (of the sum [B, T, D] float32, of the weight [D] float32).
    """
    d_u, u = d_u.float(), u.float()
    over = torch.where(weight.abs() < torch.finfo(torch.float32).tiny, 0.0, 1 / weight)
    mean = (u * d_u).mean(dim=-1, keepdim=True)
    d_sum = d_total + inverse[..., None] * (weight * d_u - u * over * mean)
    return d_sum, (d_u * u).sum(dim=(0, 1)) * over
