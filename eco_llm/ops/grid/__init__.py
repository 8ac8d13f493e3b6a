"""Sums on a grid: additions that can be undone to the last bit.

Floating-point addition rounds, so (a + y) − y is not a in general. On multiples of one power of two it is, as long as
nothing leaves the range in which the type holds every multiple: float32 has 24 bits, so |x| < 2^24 · STEP. Numbers
beyond lose bits in silence here; who needs the guarantee compares checksums (`eco_llm.instant`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.grid.reference import checksums_reference, snap_reference

__all__ = ["RANGE", "STEP", "TILE", "advance", "checksums", "retreat", "snap"]

STEP = 2.0**-9
"""Distance of neighbouring values of a stream."""
RANGE = STEP * 2**24
"""32768: streams of float32 are exact while all values stay below it in magnitude. Trained streams have outliers: those
of the default profile left a range of 1024 after 337 steps and one of 8192 after 909 (docs/LOG.md)."""
TILE = 4096
"""Elements that a checksum is over."""


def snap(x: Tensor) -> Tensor:
    """x, floating point of any shape, on the grid: at least float32, nearest multiple of STEP, ties to even."""
    return snap_reference(x.to(torch.promote_types(x.dtype, torch.float32)), STEP)


def advance(a: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(a + snap(y), its `checksums`). `a` is a stream, contiguous, float32 or float64; y of its shape, any type."""
    return _move(a, y, back=False)


def retreat(c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(c − snap(y), its `checksums`), the inverse of `advance`: from advance(a, y) back to a, bit for bit."""
    return _move(c, y, back=True)


def checksums(x: Tensor) -> Tensor:
    """int64 [⌈n / TILE⌉], one for every TILE elements in order; it differs if one bit of them does.

    The bit patterns, weighted by odd numbers, summed modulo 2^64: integer sums do not depend on their order. Several
    wrong bits could make up for each other, with a chance of 2^-32 or so.
    """
    if _served(x):
        from eco_llm.ops.grid.triton import checksums as in_one_pass

        return in_one_pass(x, TILE)
    return checksums_reference(x, TILE)


def _served(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous() and uses_triton(x)


def _move(a: Tensor, y: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    if _served(a) and y.dtype in (torch.float32, torch.bfloat16) and y.is_contiguous() and y.shape == a.shape:
        from eco_llm.ops.grid.triton import move

        return move(a, y, STEP, TILE, back=back)
    change = snap_reference(y.to(a.dtype), STEP)
    moved = a - change if back else a + change
    return moved, checksums_reference(moved, TILE)
