"""Where tests of the Triton kernels run, and what several of them need."""

from __future__ import annotations

import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICE = "cpu" if INTERPRETED else "cuda"


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = KERNEL_DEVICE) -> Tensor:
    """Normal numbers that depend on the seed alone, not on type or device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest error is within `tolerance` of the largest element."""
    assert actual.isfinite().all()
    error = (actual.detach().double() - expected.detach().double()).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"
