"""Sums on a grid by PyTorch's calls, one idea a line."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def snap_reference(x: Tensor, step: float) -> Tensor:
    """The nearest multiple of `step`, ties to even."""
    return torch.round(x * (1 / step)) * step


def checksums_reference(x: Tensor, tile: int) -> Tensor:
    """Σ bits(i)·(2i + 1) modulo 2^64 over every `tile` elements, the last padded with zeros: int64 [tiles]."""
    bits = x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int64).flatten().to(torch.int64)
    tiles = pad(bits, (0, -bits.numel() % tile)).view(-1, tile)
    return (tiles * (2 * torch.arange(tile, device=x.device) + 1)).sum(1)
