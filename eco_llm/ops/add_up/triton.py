# mypy: allow-untyped-defs
"""The sum in one pass. Import it only where Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE, _WARPS = 4096, 8


@triton.jit
def _add_up_kernel(total, one, other, out, narrowed, n, NARROW: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < n
    parts = tl.load(one + at, mask=inside, other=0.0).to(tl.float32)
    parts += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    result = tl.load(total + at, mask=inside, other=0.0) + parts
    tl.store(out + at, result, mask=inside)
    if NARROW:
        tl.store(narrowed + at, result.to(narrowed.dtype.element_ty), mask=inside)


def add_up_kernels(total: Tensor, one: Tensor, other: Tensor, narrow: torch.dtype) -> tuple[Tensor, Tensor]:
    """`add_up_reference` of a float32 total and float32 or bfloat16 parts, contiguous and of one shape."""
    out, n = torch.empty_like(total), total.numel()
    narrowed = out if narrow == out.dtype else torch.empty_like(out, dtype=narrow)
    if n:
        with torch.cuda.device_of(total):
            _add_up_kernel[(triton.cdiv(n, _TILE),)](
                total, one, other, out, narrowed, n, narrow != out.dtype, _TILE, num_warps=_WARPS
            )
    return out, narrowed
