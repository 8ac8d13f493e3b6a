# mypy: allow-untyped-defs
"""Sums on a grid, with their checksums, as one pass each. Import it only where Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def _store_checksum(x, sums, inside, TILE: tl.constexpr):
    bits = tl.where(inside, x.to(tl.int32, bitcast=True), 0).to(tl.int64)
    tl.store(sums + tl.program_id(0), tl.sum(bits * (2 * tl.arange(0, TILE) + 1)))


@triton.jit
def _move_kernel(a, y, out, sums, n, INVERSE: tl.constexpr, STEP: tl.constexpr, BACK: tl.constexpr, TILE: tl.constexpr):
    """out = a ± snap(y), and the checksums of out."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < n
    change = _snap(tl.load(y + at, mask=inside, other=0.0).to(tl.float32), INVERSE, STEP)
    x = tl.load(a + at, mask=inside, other=0.0)
    x = x - change if BACK else x + change
    tl.store(out + at, x, mask=inside)
    _store_checksum(x, sums, inside, TILE)


@triton.jit
def _checksum_kernel(x, sums, n, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < n
    _store_checksum(tl.load(x + at, mask=inside, other=0.0), sums, inside, TILE)


def move(a: Tensor, y: Tensor, step: float, tile: int, *, back: bool) -> tuple[Tensor, Tensor]:
    """(a + snap(y), or a − snap(y) with `back`; its checksums).

    a float32, y float32 or bfloat16, both contiguous and of one shape.
    """
    out, n = torch.empty_like(a), a.numel()
    sums = torch.empty(triton.cdiv(n, tile), dtype=torch.int64, device=a.device)
    with torch.cuda.device_of(a):
        _move_kernel[sums.shape](a, y, out, sums, n, 1 / step, step, back, tile, num_warps=_WARPS)
    return out, sums


def checksums(x: Tensor, tile: int) -> Tensor:
    """`checksums_reference` of a contiguous float32 tensor."""
    sums = torch.empty(triton.cdiv(x.numel(), tile), dtype=torch.int64, device=x.device)
    with torch.cuda.device_of(x):
        _checksum_kernel[sums.shape](x, sums, x.numel(), tile, num_warps=_WARPS)
    return sums
