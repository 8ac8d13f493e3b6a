"""Rotary position embedding (RoPE, arXiv 2104.09864), half-split convention.

Channel i < R/2 is paired with channel i + R/2 and the pair turns by position · θ^(−2i/R). Other code pairs channels 2i
and 2i + 1 ("interleaved"); the two differ by a fixed permutation of the R rows of the projections that feed them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(start: int, length: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each [length, dim / 2] float32, for positions start … start + length − 1.

    Made anew at each call: a few tiny kernels, against a buffer that would fix the longest sequence at
    construction or change under a compiled block.
    """
    frequencies = theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / -dim)
    angles = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x [..., T, R] by `rotary_table(…, T, R, …)`; computed in at least float32, returned in the type of x."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)
