"""Sums on a grid by PyTorch's calls, one idea a line."""

from __future__ import annotations

import torch
from torch import Tensor


def snap_reference(x: Tensor, step: float) -> Tensor:
    """The nearest multiple of `step`, ties to even."""
    return torch.round(x * (1 / step)) * step


def checksum_reference(a: Tensor, b: Tensor) -> Tensor:
    """Σ bits(i)·(2i + 1) modulo 2^64 over the elements of a, then of b: 0-dim int64."""
    bits = torch.cat(
        [t.contiguous().view(torch.int32 if t.element_size() == 4 else torch.int64).flatten() for t in (a, b)]
    )
    odd = torch.arange(bits.numel(), device=bits.device, dtype=torch.int64) * 2 + 1
    return (bits * odd).sum()
