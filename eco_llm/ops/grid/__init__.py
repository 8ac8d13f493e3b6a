"""Sums on a grid: additions that can be undone to the last bit, always.

Floating-point addition rounds, so (a + y) − y is not a in general. A stream here is an int32 tensor q that stands for
q · STEP; y is rounded to whole steps before it is added. int32 addition wraps around, so it has an inverse for every q
and every y, NaN and infinity included: `retreat` undoes `advance` whatever the numbers are.

What does not belong in a stream is not silent: where y is not finite, is 2^31 steps or more, or the sum leaves int32,
the value that `advance` gives beside q is NaN (q itself takes no change from such a y, and wraps in such a sum). So NaN
reaches whatever reads the value, as it would have in floating point, while every q can still be traced back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.grid.reference import checksums_reference, move_reference

__all__ = ["RANGE", "STEP", "TILE", "advance", "checksums", "retreat", "snap", "values"]

STEP = 2.0**-14
"""Distance of neighbouring values of a stream."""
RANGE = STEP * 2**31
"""131072: values at or beyond it, in magnitude, are NaN. Trained streams have outliers: those of the default profile
reached 1024 after 337 steps and 8192 after 909 (docs/LOG.md)."""
TILE = 4096
"""Elements that a checksum is over."""


def snap(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, floating point of any shape, as a stream: (q, its value in at least float32, its `checksums`).

    The nearest whole step, ties to even; where x is not finite or out of RANGE, q is 0 and the value NaN.
    """
    return _move(None, x.contiguous(), torch.promote_types(x.dtype, torch.float32), back=False)


def advance(a: Tensor, y: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """a plus y in whole steps: (c, its value, its `checksums`).

    Args:
        a: stream, int32, contiguous.
        y: of its shape, any floating-point type.
        dtype: of the value, float32 or float64. float64 holds every q · STEP; float32 rounds those from 1024 on (2^24
            steps) to 24 bits, to nearest even, the same everywhere.
    """
    return _move(a, y, dtype, back=False)


def retreat(c: Tensor, y: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """c minus y in whole steps, the inverse of `advance`: from advance(a, y)[0] back to a, bit for bit.

    The value is that of a's number, never NaN: whether a belonged in a stream was told when it was made.
    """
    return _move(c, y, dtype, back=True)


def values(q: Tensor, dtype: torch.dtype) -> Tensor:
    """q · STEP in `dtype`, rounded as `advance` says."""
    return q.to(dtype).mul_(STEP)


def checksums(q: Tensor) -> Tensor:
    """int64 [⌈n / TILE⌉] of a stream, one for every TILE elements in order; it differs if one bit of them does.

    The numbers, weighted by odd numbers, summed modulo 2^64: integer sums do not depend on their order. Several
    wrong bits could make up for each other, with a chance of 2^-32 or so.
    """
    return checksums_reference(q, TILE)


def _move(a: Tensor | None, y: Tensor, dtype: torch.dtype, *, back: bool) -> tuple[Tensor, Tensor, Tensor]:
    known = y.dtype in (torch.float32, torch.bfloat16) and dtype == torch.float32
    if known and y.is_contiguous() and (a is None or (a.is_contiguous() and a.shape == y.shape)) and uses_triton(y):
        from eco_llm.ops.grid.triton import move

        return move(a, y, STEP, TILE, back=back)
    q, x = move_reference(a, y, STEP, dtype, back=back)
    return q, x, checksums_reference(q, TILE)
