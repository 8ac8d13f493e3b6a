"""A stream's gradient and what two readers of one value sent back, added up in one pass.

total + (one + other) in the type of the total, and the same rounded to what the next product takes: with bfloat16 parts
14 bytes a number. As PyTorch's operations, two sums and a cast, it is 26.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eco_llm.ops.add_up.reference import add_up_reference
from eco_llm.ops.backend import uses_triton

__all__ = ["add_up"]


def add_up(total: Tensor, one: Tensor, other: Tensor, narrow: torch.dtype) -> tuple[Tensor, Tensor]:
    """(total + (one + other), the same in `narrow`): no part is rounded on the way. No host sync.

    Args:
        total: at least float32, any shape.
        one, other: of its shape, in float types that it can hold.
        narrow: of the second result, which is the first where that has this type.
    """
    known = {one.dtype, other.dtype, narrow} <= {torch.float32, torch.bfloat16} and total.dtype == torch.float32
    alike = all(t.is_contiguous() and t.shape == total.shape for t in (total, one, other))
    if known and alike and uses_triton(total):
        from eco_llm.ops.add_up.triton import add_up_kernels

        return add_up_kernels(total, one, other, narrow)
    return add_up_reference(total, one, other, narrow)
