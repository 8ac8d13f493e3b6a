# mypy: allow-untyped-defs
"""Sums on a grid, with values and checksums, in one pass. Import it only where Triton is installed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eco_llm.ops.grid.reference import MOST

_WARPS = 8


@triton.jit
def _whole(v):
    """v to the nearest whole number, ties to even. From 2^23 on every float32 is one; below, adding 2^23 rounds."""
    size = tl.abs(v)
    whole = (size + 8388608.0) - 8388608.0
    return tl.where(size < 8388608.0, tl.where(v < 0, -whole, whole), v)


@triton.jit
def _move_kernel(
    a, y, more, out, value, sums, n,
    INVERSE: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr, FROM: tl.constexpr, MORE: tl.constexpr,
    BACK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out = a ± (y + more) in whole steps, its value, and its checksums; without FROM a is 0, without MORE more is."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < n
    change = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    if MORE:
        change += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
    steps = _whole(change * INVERSE)
    fits = tl.abs(steps) <= MOST  # not so for NaN
    exact = tl.where(fits, steps, 0.0).to(tl.int32).to(tl.int64)
    if FROM:
        before = tl.load(a + at, mask=inside, other=0).to(tl.int64)
        exact = before - exact if BACK else before + exact
    q = exact.to(tl.int32)  # modulo 2^32
    x = q.to(tl.float32) * STEP
    if not BACK:
        x = tl.where(fits & (q.to(tl.int64) == exact), x, float("nan"))
    tl.store(out + at, q, mask=inside)
    tl.store(value + at, x.to(value.dtype.element_ty), mask=inside)
    numbers = tl.where(inside, q, 0).to(tl.int64)
    tl.store(sums + tl.program_id(0), tl.sum(numbers * (2 * tl.arange(0, TILE) + 1)))


def move(
    a: Tensor | None, ys: Sequence[Tensor], step: float, tile: int, dtype: torch.dtype, *, back: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`move_reference` and `checksums_reference` of the result.

    a int32 or None, one or two ys in float32 or bfloat16, contiguous and of one shape; values in float32 or bfloat16.
    """
    y, more = ys[0], ys[-1]
    out, n = torch.empty_like(y, dtype=torch.int32), y.numel()
    value = torch.empty_like(y, dtype=dtype)
    sums = torch.empty(triton.cdiv(n, tile), dtype=torch.int64, device=y.device)
    with torch.cuda.device_of(y):
        _move_kernel[sums.shape](
            a, y, more, out, value, sums, n, 1 / step, step, MOST, a is not None, len(ys) == 2, back, tile,
            num_warps=_WARPS,
        )  # fmt: skip
    return out, value, sums
