"""The sum by PyTorch's calls."""

from __future__ import annotations

import torch
from torch import Tensor


def add_up_reference(total: Tensor, one: Tensor, other: Tensor, narrow: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `eco_llm.ops.add_up.add_up`."""
    total = total + (one.to(total.dtype) + other.to(total.dtype))
    return total, total.to(narrow)
