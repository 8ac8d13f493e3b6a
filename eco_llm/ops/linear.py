"""Matrix products shaped for the device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

CPU_TILE = 16
"""Output columns that a CPU's product kernels take at a time: one AVX-512 register of float32. A rest of fewer falls
on a path that slows the whole product (1612 columns: by 0.7 of 1616's rate; docs/LOG.md)."""


def linear_in_full_tiles(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K], weight [N, K] -> x · weightᵀ [..., N]; on a CPU the product has its columns filled up to a tile."""
    rest = -weight.shape[0] % CPU_TILE
    if x.device.type != "cpu" or not rest:
        return F.linear(x, weight)
    return F.linear(x, F.pad(weight, (0, 0, 0, rest)))[..., : weight.shape[0]]
