# Kernels build tuples of tiles by `+`, for they know no unpacking, and rebind a name with another number of them.
# ruff: noqa: RUF005
# mypy: allow-untyped-defs
# mypy: disable-error-code="assignment, var-annotated"
"""Sums on a grid, with values and checksums, in one pass. Import it only where Triton is installed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eco_llm.ops.grid.reference import MOST

_WARPS = 8
_CHUNK = 4 * 32 * _WARPS
_VALUES = 2 * _CHUNK


@triton.jit
def _whole(v):
    """v to the nearest whole number, ties to even. From 2^23 on every float32 is one; below, adding 2^23 rounds."""
    size = tl.abs(v)
    whole = (size + 8388608.0) - 8388608.0
    return tl.where(size < 8388608.0, tl.where(v < 0, -whole, whole), v)


@triton.jit(do_not_specialize_on_alignment=["flag", "other_flag"])  # places in vectors, at any multiple of 4 bytes
def _move_kernel(
    a, y, more, beside, out, value, sums, seen, flag, other_flag, n,
    INVERSE: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr, FROM: tl.constexpr, MORE: tl.constexpr,
    BESIDE: tl.constexpr, BACK: tl.constexpr, CHECK: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = a ± (y + more) in whole steps, its value plus that of beside, and its checksums; without FROM a is 0,
    without MORE more is, without BESIDE beside is. CHECK: the flags become 1 where a checksum is not the one seen.

    A tile is read as chunks of four numbers a thread, whatever their type: then nothing changes threads on the way, and
    every read is ahead of the first use.
    """
    first = tl.program_id(0).to(tl.int64) * TILE
    a += first
    y += first
    more += first
    beside += first
    out += first
    value += first
    left = tl.minimum(n - first, TILE).to(tl.int32)
    lanes = tl.arange(0, CHUNK)
    before = ()
    changes = ()
    further = ()
    others = ()
    for k in tl.static_range(TILE // CHUNK):
        at = k * CHUNK + lanes
        if FROM:
            before = before + (tl.load(a + at, mask=at < left, other=0),)
        changes = changes + (tl.load(y + at, mask=at < left, other=0.0),)
        if MORE:
            further = further + (tl.load(more + at, mask=at < left, other=0.0),)
        if BESIDE:
            others = others + (tl.load(beside + at, mask=at < left, other=0),)
    weighted = tl.zeros((CHUNK,), tl.int64)
    for k in tl.static_range(TILE // CHUNK):
        at = k * CHUNK + lanes
        change = changes[k].to(tl.float32)
        if MORE:
            change += further[k].to(tl.float32)
        steps = _whole(change * INVERSE)
        fits = tl.abs(steps) <= MOST  # not so for NaN
        moved = tl.where(fits, steps, 0.0).to(tl.int32)
        q = moved
        if FROM:  # modulo 2^32
            q = before[k] - moved if BACK else before[k] + moved
            if not BACK:  # a sum that leaves int32 has the sign of neither summand
                fits = fits & (((before[k] ^ q) & (moved ^ q)) >= 0)
        x = q.to(tl.float32) * STEP
        if BESIDE:
            x += others[k].to(tl.float32) * STEP
        if not BACK:
            x = tl.where(fits, x, float("nan"))
        tl.store(out + at, q, mask=at < left)
        tl.store(value + at, x.to(value.dtype.element_ty), mask=at < left)
        weighted += q.to(tl.int64) * (2 * at + 1)  # q is 0 beyond n
    found = tl.sum(weighted)
    tl.store(sums + tl.program_id(0), found)
    if CHECK:
        wrong = found != tl.load(seen + tl.program_id(0))
        tl.store(flag, 1.0, mask=wrong)
        tl.store(other_flag, 1.0, mask=wrong)


@triton.jit
def _values_kernel(q, value, n, STEP: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.load(q + at, mask=at < n, other=0).to(tl.float32) * STEP
    tl.store(value + at, x.to(value.dtype.element_ty), mask=at < n)


def move(
    a: Tensor | None, ys: Sequence[Tensor], step: float, tile: int, dtype: torch.dtype, *, back: bool,
    beside: Tensor | None = None, seen: Tensor | None = None, flags: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`move_reference` and `checksums_reference` of the result, and `compare_reference` of these if any were `seen`.

    a and beside int32 or None, one or two ys in float32 or bfloat16, contiguous and of one shape; values in float32 or
    bfloat16; one or two flags, float32.
    """
    y, more = ys[0], ys[-1]
    out, n = torch.empty_like(y, dtype=torch.int32), y.numel()
    value = torch.empty_like(y, dtype=dtype)
    sums = torch.empty(triton.cdiv(n, tile), dtype=torch.int64, device=y.device)
    flag, other_flag = (flags[0], flags[-1]) if seen is not None else (value, value)
    if n:
        with torch.cuda.device_of(y):
            _move_kernel[sums.shape](
                out if a is None else a, y, more, out if beside is None else beside, out, value, sums,
                sums if seen is None else seen, flag, other_flag, n, INVERSE=1 / step, STEP=step, MOST=MOST,
                FROM=a is not None, MORE=len(ys) == 2, BESIDE=beside is not None, BACK=back, CHECK=seen is not None,
                TILE=tile, CHUNK=_CHUNK, num_warps=_WARPS,
            )  # fmt: skip
    return out, value, sums


def move_values(q: Tensor, step: float, dtype: torch.dtype) -> Tensor:
    """`values_reference` of an int32 q, contiguous, in float32 or bfloat16."""
    value, n = torch.empty_like(q, dtype=dtype), q.numel()
    if n:
        with torch.cuda.device_of(q):
            _values_kernel[(triton.cdiv(n, _VALUES),)](q, value, n, step, _VALUES, num_warps=_WARPS)
    return value
