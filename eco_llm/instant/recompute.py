"""`recompute`: keep a block's input, run the block again in backward (arXiv 1604.06174). Gradients are exact."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.instant.replay import Setting, Twice, back_propagate


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Twice, setting: Setting) -> Tensor:
        ctx.f, ctx.setting = f, setting
        ctx.save_for_backward(x)
        return setting.value(f.value, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        leaf, ys = ctx.setting.record(ctx.f.gradients, x)
        return back_propagate(leaf, gradients[0], *ys), None, None


def recompute(f: Twice, x: Tensor) -> Tensor:
    """f.value(x), with only x kept for backward. x and result [B, T, D]; f must be a pure function of x.

    First derivatives only. Like every mode, it needs an x that requires a gradient: where gradients of nothing before
    the stack are wanted, autograd would not come here.
    """
    return cast(Tensor, _Recompute.apply(x, f, Setting.now(x)))
