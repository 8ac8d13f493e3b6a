"""Sums on a grid: additions that can be undone to the last bit.

Floating-point addition rounds, so (a + y) − y is not a in general. On multiples of one power of two it is, as long as
nothing leaves the range in which the type holds every multiple: float32 has 24 bits, so |x| < 2^24 · STEP. Numbers
beyond lose bits in silence here; who needs the guarantee compares checksums (`eco_llm.instant`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.grid.reference import checksum_reference, snap_reference

__all__ = ["RANGE", "STEP", "advance", "checksum", "retreat", "snap"]

STEP = 2.0**-14
"""Distance of neighbouring values of a stream."""
RANGE = STEP * 2**24
"""1024: streams of float32 are exact while all values stay below it in magnitude."""


def snap(x: Tensor) -> Tensor:
    """x, floating point of any shape, on the grid: at least float32, nearest multiple of STEP, ties to even."""
    return snap_reference(x.to(torch.promote_types(x.dtype, torch.float32)), STEP)


def advance(a: Tensor, y: Tensor) -> Tensor:
    """a + snap(y): `a` a stream, contiguous, float32 or float64; y of its shape, any floating type. In a's type."""
    return _move(a, y, back=False)


def retreat(c: Tensor, y: Tensor) -> Tensor:
    """c − snap(y), the inverse of `advance`: retreat(advance(a, y), y) is a, bit for bit, within RANGE."""
    return _move(c, y, back=True)


def checksum(a: Tensor, b: Tensor) -> Tensor:
    """0-dim int64 that differs, but for one chance in 2^32 or so, if any bit of either stream does.

    The bit patterns, weighted by odd numbers, summed modulo 2^64: integer sums do not depend on their order.
    """
    if _served(a) and _served(b) and a.shape == b.shape:
        from eco_llm.ops.grid.triton import checksum as in_one_pass

        return in_one_pass(a, b)
    return checksum_reference(a, b)


def _served(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous() and uses_triton(x)


def _move(a: Tensor, y: Tensor, *, back: bool) -> Tensor:
    if _served(a) and y.dtype in (torch.float32, torch.bfloat16) and y.is_contiguous() and y.shape == a.shape:
        from eco_llm.ops.grid.triton import move

        return move(a, y, STEP, back=back)
    change = snap_reference(y.to(a.dtype), STEP)
    return a - change if back else a + change
