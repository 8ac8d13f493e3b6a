# mypy: allow-untyped-defs
"""Sums on a grid as one pass each. Import it only where Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
_WARPS = 8


@triton.jit
def _snap(y, inverse: tl.constexpr, step: tl.constexpr):
    """round(y / step)·step, ties to even. From 2^23 on every float32 is a whole number; below, adding 2^23 rounds."""
    v = y * inverse
    size = tl.abs(v)
    whole = (size + 8388608.0) - 8388608.0
    whole = tl.where(v < 0, -whole, whole)
    return tl.where(size < 8388608.0, whole, v) * step


@triton.jit
def _move_kernel(
    a, y, out, n, INVERSE: tl.constexpr, STEP: tl.constexpr, BACK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out = a ± snap(y)."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < n
    change = _snap(tl.load(y + at, mask=inside, other=0.0).to(tl.float32), INVERSE, STEP)
    x = tl.load(a + at, mask=inside, other=0.0)
    tl.store(out + at, x - change if BACK else x + change, mask=inside)


@triton.jit
def _checksum_kernel(a, b, out, n, TILE: tl.constexpr):
    """out[i] = the i-th tile's share of the checksum, over both tensors."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < n
    first = tl.load(a + at, mask=inside, other=0).to(tl.int64)
    second = tl.load(b + at, mask=inside, other=0).to(tl.int64)
    share = first * (2 * at + 1) + second * (2 * (at + n) + 1)
    tl.store(out + tl.program_id(0), tl.sum(tl.where(inside, share, 0)))


def move(a: Tensor, y: Tensor, step: float, *, back: bool) -> Tensor:
    """a + snap(y), or a − snap(y) with `back`; a float32, y float32 or bfloat16, both contiguous and of one shape."""
    out = torch.empty_like(a)
    n = a.numel()
    with torch.cuda.device_of(a):
        _move_kernel[(triton.cdiv(n, _TILE),)](a, y, out, n, 1 / step, step, back, _TILE, num_warps=_WARPS)
    return out


def checksum(a: Tensor, b: Tensor) -> Tensor:
    """`checksum_reference` of two contiguous float32 tensors of one size."""
    n = a.numel()
    tiles = triton.cdiv(n, _TILE)
    out = torch.empty(tiles, dtype=torch.int64, device=a.device)
    with torch.cuda.device_of(a):
        _checksum_kernel[(tiles,)](a.view(torch.int32), b.view(torch.int32), out, n, _TILE, num_warps=_WARPS)
    return out.sum()
