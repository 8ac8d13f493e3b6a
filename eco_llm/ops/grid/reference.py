"""Sums on a grid by PyTorch's calls, one idea a line."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

MOST = 2.0**31 - 128
"""The largest change, in steps: the largest float32 that an int32 holds."""


def move_reference(
    a: Tensor | None, ys: Sequence[Tensor], step: float, dtype: torch.dtype, *, back: bool, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(a + y in whole steps, or a − y with `back`, modulo 2^32; the value of it in `dtype`, plus that of `beside`).
    Without `a`, of 0. y is the sum of ys, in order, in at least float32.

    Steps to nearest, ties to even. A y that is not finite or over MOST steps changes nothing; the value is NaN there,
    and where the sum did not fit in an int32. `back` gives no NaN.
    """
    y = functools.reduce(torch.add, (y.to(torch.promote_types(y.dtype, torch.float32)) for y in ys))
    steps = torch.round(y * (1 / step))
    fits = steps.abs() <= MOST  # not so for NaN
    # Chosen before the conversion, which is not defined for what int32 does not hold, and differs between devices.
    change = torch.where(fits, steps, 0.0).to(torch.int64)
    exact = change if a is None else a - change if back else a + change  # int64
    q = exact.to(torch.int32)  # modulo 2^32
    x = values_reference(q, step, dtype)
    if beside is not None:
        x = x + values_reference(beside, step, dtype)
    return q, x if back else torch.where(fits & (q == exact), x, float("nan"))


def values_reference(q: Tensor, step: float, dtype: torch.dtype) -> Tensor:
    """q · step in `dtype`; by way of float32 where that is narrower."""
    return q.to(torch.promote_types(dtype, torch.float32)).mul_(step).to(dtype)


def checksums_reference(q: Tensor, tile: int) -> Tensor:
    """Σ q(i)·(2i + 1) modulo 2^64 over every `tile` elements, the last padded with zeros: int64 [tiles]."""
    numbers = q.flatten().to(torch.int64)
    tiles = pad(numbers, (0, -numbers.numel() % tile)).view(-1, tile)
    return (tiles * (2 * torch.arange(tile, device=q.device) + 1)).sum(1)


def compare_reference(seen: Tensor, sums: Tensor, flags: Sequence[Tensor]) -> None:
    """Make every flag (0-dim float32, 0 or 1) 1 unless all checksums are equal."""
    wrong = (seen != sums).any().to(torch.float32)
    for flag in flags:
        torch.maximum(flag, wrong, out=flag)
