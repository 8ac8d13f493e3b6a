"""A stream's gradient and what two readers of one value sent back, added up in one pass.

total + (one + other) in the type of the total, and the same rounded to what the next product takes: with bfloat16 parts
14 bytes a number. As PyTorch's operations, two sums and a cast, it is 26.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.ops.add_up.reference import add_up_reference
from eco_llm.ops.backend import uses_triton

__all__ = ["Ahead", "add_up", "fork"]


@dataclass(eq=False)
class Ahead:
    """What a function of x [B, T, D], run a second time, knows of its gradients before it begins."""

    result: Tensor
    """[B, T, D], which every summand of the result receives."""
    stream: Tensor
    """[B, T, D], at least float32, which the gradient of x is added to."""
    narrow: torch.dtype
    """Of x, and so of its gradient."""
    total: Tensor | None = None
    """stream with the gradient of x added, in its type, once backward has come to a `fork`; the gradient of x is this
    sum then, in `narrow`."""

    def take(self, total: Tensor, narrowed: Tensor | None) -> Tensor:
        """Note the sum; what is handed to x as its gradient, `narrowed` or the sum if there is none."""
        self.total = total
        return total.detach() if narrowed is None or narrowed is total else narrowed  # autograd copies what is shared


def fork(x: Tensor, ahead: Ahead) -> tuple[Tensor, Tensor]:
    """x for two readers, whose gradients are added to `ahead.stream` in one pass. First derivatives only."""
    return cast(tuple[Tensor, Tensor], _Fork.apply(x, ahead))


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ahead: Ahead) -> tuple[Tensor, Tensor]:
        ctx.ahead = ahead
        return x.view_as(x), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        one, other = gradients
        return ctx.ahead.take(*add_up(ctx.ahead.stream, one, other, ctx.ahead.narrow)), None


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
