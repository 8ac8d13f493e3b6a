"""Sums on a grid: additions that can be undone to the last bit, always.

Floating-point addition rounds, so (a + y) − y is not a in general. A stream here is an int32 tensor q that stands for
q · STEP; y is rounded to whole steps before it is added. int32 addition wraps around, so it has an inverse for every q
and every y, NaN and infinity included: `retreat` undoes `advance` whatever the numbers are.

What does not belong in a stream is not silent: where y is not finite, is 2^31 steps or more, or the sum leaves int32,
the value that `advance` gives beside q is NaN (q itself takes no change from such a y, and wraps in such a sum). So NaN
reaches whatever reads the value, as it would have in floating point, while every q can still be traced back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.grid.reference import checksums_reference, compare_reference, move_reference, values_reference

__all__ = ["RANGE", "STEP", "TILE", "advance", "checksums", "retreat", "snap", "values"]

STEP = 2.0**-14
"""Distance of neighbouring values of a stream."""
RANGE = STEP * 2**31
"""131072: values at or beyond it, in magnitude, are NaN. Trained streams have outliers: those of the default profile
reached 1024 after 337 steps and 8192 after 909 (docs/LOG.md)."""
TILE = 4096
"""Elements that a checksum is over."""


def snap(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x, floating point of any shape, as a stream: (q, its value, its `checksums`).

    The nearest whole step, ties to even; where x is not finite or out of RANGE, q is 0 and the value NaN.

    Args:
        x: the numbers.
        dtype: of the value, as for `advance`; default: that of x, at least float32.
    """
    return _move(None, (x.contiguous(),), dtype or torch.promote_types(x.dtype, torch.float32), back=False)


def advance(
    a: Tensor, *ys: Tensor, dtype: torch.dtype = torch.float32, checked: bool = True, beside: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """a plus the sum y of one or more tensors, in whole steps: (c, its value, its `checksums`).

    Args:
        a: stream, int32, contiguous.
        ys: of its shape, any floating-point types; added up, in order, in at least float32.
        dtype: of the value, bfloat16, float32 or float64. float64 holds every q · STEP; float32 rounds those from 1024
            on (2^24 steps) to 24 bits, to nearest even, the same everywhere; bfloat16 rounds what float32 gives.
        checked: without it the checksums may be left out (empty), which saves time where a kernel does not make them.
        beside: a stream whose value is added to the value given, which has at least float32 then.

    Raises:
        ValueError: shapes differ; nothing is broadcast.
    """
    if beside is not None and dtype.itemsize < 4:
        raise ValueError(f"the sum of two values needs at least float32, not {dtype}")
    return _move(a, ys, dtype, back=False, checked=checked, beside=beside)


def retreat(
    c: Tensor, *ys: Tensor, dtype: torch.dtype = torch.float32, seen: Tensor | None = None, flags: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """c minus the sum of ys in whole steps, the inverse of `advance`: from advance(a, *ys)[0] back to a, bit for bit.

    The value is that of a's number, never NaN: whether a belonged in a stream was told when it was made.

    Args:
        c, ys, dtype: as for `advance`.
        seen: checksums that a should have; else every one of the flags becomes 1.
        flags: one or two, 0-dim float32, each 0 or 1; left alone where nothing is wrong, or nothing was seen.

    Raises:
        ValueError: shapes differ; seen or flags are not as `checksums` gives and as said here.
    """
    return _move(c, ys, dtype, back=True, seen=seen, flags=flags)


def values(q: Tensor, dtype: torch.dtype) -> Tensor:
    """q · STEP in `dtype`, rounded as `advance` says."""
    if dtype in (torch.float32, torch.bfloat16) and q.is_contiguous() and uses_triton(q):
        from eco_llm.ops.grid.triton import move_values

        return move_values(q, STEP, dtype)
    return values_reference(q, STEP, dtype)


def checksums(q: Tensor) -> Tensor:
    """int64 [⌈n / TILE⌉] of a stream, one for every TILE elements in order; it differs if one bit of them does.

    The numbers, weighted by odd numbers, summed modulo 2^64: integer sums do not depend on their order. Several
    wrong bits could make up for each other, with a chance of 2^-32 or so.
    """
    return checksums_reference(q, TILE)


def _move(
    a: Tensor | None, ys: Sequence[Tensor], dtype: torch.dtype, *, back: bool, checked: bool = True,
    beside: Tensor | None = None, seen: Tensor | None = None, flags: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = [t for t in (a, *ys, beside) if t is not None]
    if any(t.shape != given[0].shape for t in given):
        raise ValueError(f"summands of one shape are needed, not of {', '.join(str(tuple(t.shape)) for t in given)}")
    if seen is not None:
        _check_seen(seen, flags, -(-given[0].numel() // TILE))
    known = {dtype, *(y.dtype for y in ys)} <= {torch.float32, torch.bfloat16} and len(ys) <= 2
    if known and all(t.is_contiguous() for t in given) and uses_triton(ys[0]):
        from eco_llm.ops.grid.triton import move

        return move(a, ys, STEP, TILE, dtype, back=back, beside=beside, seen=seen, flags=flags)
    q, x = move_reference(a, ys, STEP, dtype, back=back, beside=beside)
    sums = checksums_reference(q if checked else q.new_empty(0), TILE)
    if seen is not None:
        compare_reference(seen, sums, flags)
    return q, x, sums


def _check_seen(seen: Tensor, flags: Sequence[Tensor], tiles: int) -> None:
    """Kernels read and write what they are given; the reference would broadcast it."""
    if seen.shape != (tiles,) or seen.dtype != torch.int64 or not seen.is_contiguous():
        raise ValueError(f"need checksums [{tiles}] in int64, contiguous, got {seen.dtype} {tuple(seen.shape)}")
    if not 1 <= len(flags) <= 2 or any(flag.dim() or flag.dtype != torch.float32 for flag in flags):
        what = ", ".join(f"{flag.dtype} {tuple(flag.shape)}" for flag in flags) or "none"
        raise ValueError(f"need one or two 0-dim flags in float32, got {what}")
