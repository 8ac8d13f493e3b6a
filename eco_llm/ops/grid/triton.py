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
def _steps(y, at, inside, INVERSE: tl.constexpr, MOST: tl.constexpr):
    """(y in whole steps as int64, 0 where it does not fit; where it fits)."""
    steps = _whole(tl.load(y + at, mask=inside, other=0.0).to(tl.float32) * INVERSE)
    fits = tl.abs(steps) <= MOST  # not so for NaN
    return tl.where(fits, steps, 0.0).to(tl.int32).to(tl.int64), fits


@triton.jit
def _checksum(q, inside, TILE: tl.constexpr):
    numbers = tl.where(inside, q, 0).to(tl.int64)
    return tl.sum(numbers * (2 * tl.arange(0, TILE) + 1))


@triton.jit
def _move_kernel(
    a, y, more, out, value, sums, n,
    INVERSE: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr, FROM: tl.constexpr, MORE: tl.constexpr,
    VALUE: tl.constexpr, BACK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out = a ± y (± more, with MORE) in whole steps, its value (with VALUE), and checksums; with FROM 0, a is 0."""
    program = tl.program_id(0)
    at = program.to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < n
    exact, fits = _steps(y, at, inside, INVERSE, MOST)
    if MORE:  # read before anything is written
        second, fits_too = _steps(more, at, inside, INVERSE, MOST)
    if BACK:
        exact = -exact
    if FROM:
        exact += tl.load(a + at, mask=inside, other=0).to(tl.int64)
    if MORE:
        tl.store(sums + program, _checksum(exact.to(tl.int32), inside, TILE))
        sums += tl.num_programs(0)
        exact += -second if BACK else second
        fits = fits & fits_too
    q = exact.to(tl.int32)  # modulo 2^32
    tl.store(out + at, q, mask=inside)
    if VALUE:
        x = q.to(tl.float32) * STEP
        if not BACK:
            x = tl.where(fits & (q.to(tl.int64) == exact), x, float("nan"))
        tl.store(value + at, x.to(value.dtype.element_ty), mask=inside)
    tl.store(sums + program, _checksum(q, inside, TILE))


def move(
    a: Tensor | None, ys: Sequence[Tensor], step: float, tile: int, dtype: torch.dtype | None, *, back: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(The last of `move_reference`'s sums, its value, `checksums_reference` of all of them [ys, tiles]).

    a int32 or None, one or two ys in float32 or bfloat16, contiguous and of one shape; values in float32 or bfloat16.
    """
    y, more = ys[0], ys[-1]
    out, n = torch.empty_like(y, dtype=torch.int32), y.numel()
    value = torch.empty(0, device=y.device) if dtype is None else torch.empty_like(y, dtype=dtype)
    sums = torch.empty(len(ys), triton.cdiv(n, tile), dtype=torch.int64, device=y.device)
    with torch.cuda.device_of(y):
        _move_kernel[sums.shape[1:]](
            a, y, more, out, value, sums, n, 1 / step, step, MOST,
            FROM=a is not None, MORE=len(ys) == 2, VALUE=dtype is not None, BACK=back, TILE=tile, num_warps=_WARPS,
        )  # fmt: skip
    return out, value, sums
