"""Sums on a grid by PyTorch's calls, one idea a line."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

MOST = 2.0**31 - 128
"""The largest change, in steps: the largest float32 that an int32 holds."""


def move_reference(
    a: Tensor | None, y: Tensor, step: float, dtype: torch.dtype, *, back: bool
) -> tuple[Tensor, Tensor]:
    """(a + y in whole steps, or a − y with `back`, modulo 2^32; the value of it in `dtype`). Without `a`, of 0.

    Steps to nearest, ties to even. A y that is not finite or over MOST steps changes nothing; the value is NaN there,
    and where the sum did not fit in an int32. `back` gives no NaN.
    """
    steps = torch.round(y.to(torch.promote_types(y.dtype, torch.float32)) * (1 / step))
    fits = steps.abs() <= MOST  # not so for NaN
    # Chosen before the conversion, which is not defined for what int32 does not hold, and differs between devices.
    change = torch.where(fits, steps, 0.0).to(torch.int64)
    exact = change if a is None else a - change if back else a + change  # int64
    q = exact.to(torch.int32)  # modulo 2^32
    x = q.to(dtype) * step
    return q, x if back else torch.where(fits & (q == exact), x, float("nan"))


def checksums_reference(q: Tensor, tile: int) -> Tensor:
    """Σ q(i)·(2i + 1) modulo 2^64 over every `tile` elements, the last padded with zeros: int64 [tiles]."""
    numbers = q.flatten().to(torch.int64)
    tiles = pad(numbers, (0, -numbers.numel() % tile)).view(-1, tile)
    return (tiles * (2 * torch.arange(tile, device=q.device) + 1)).sum(1)
