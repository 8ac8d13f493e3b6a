"""`compress` for a mixer that runs again in backward, where kernels serve: of all that it reads and makes, codes of its
norm's result are kept, which the norm's kernel writes (`ops/residual_norm`).

Import it only where Triton is there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from eco_llm.instant.replay import Setting, Twice, back_propagate
from eco_llm.ops.products import compute_dtype
from eco_llm.ops.quantize import OPS_STREAMS, Keep, Quantized, dequantize
from eco_llm.ops.residual_norm.triton import NormBackward, residual_norm_to_codes

U_STREAM = OPS_STREAMS + 6
"""Of the random numbers with which the norm's result is quantized."""


def recompute_from_codes(
    f: Twice, x: Tensor, added: Tensor | None, weight: Tensor, eps: float, *, keep: Keep
) -> tuple[Tensor, Tensor]:
    """(x + added, f.value(norm(x + added))), with codes of the norm's result kept and f run again on what they give.

    Args:
        f: [B, T, D] in the type of products -> [B, T, D], a pure function.
        x: [B, T, D] float32, the stream; D a multiple of 64, at most 8192.
        added: [B, T, D] in the type of products, what the sub-layer before adds to it; None: nothing.
        weight, eps: the norm's, [D] float32.
        keep: bits, and the counter of the random numbers.

    Returns:
        (the stream [B, T, D] float32, the result of f). First derivatives only.
    """
    result = _RecomputeFromCodes.apply(x, added, weight, f, eps, keep, Setting.now(x), compute_dtype(x))
    return cast(tuple[Tensor, Tensor], result)


class _RecomputeFromCodes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, f: Twice, eps: float, keep: Keep, setting: Setting,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.added = None if added is None else added.dtype
        ctx.f, ctx.setting, ctx.bits, ctx.dtype = f, setting, keep.bits, dtype
        x, added = x.contiguous(), None if added is None else added.contiguous()
        pre = residual_norm_to_codes(x, added, weight, eps, dtype, keep.bits, keep.step, U_STREAM)
        with saved_tensors_hooks(Tensor.detach, _unchanged):  # what f keeps now is dropped: hooks must not pack it
            out = setting.value(f.value, pre.u)
        ctx.save_for_backward(pre.codes, pre.scales, pre.inverse, weight)
        return pre.total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_total, d_out = gradients
        codes, scales, inverse, weight = ctx.saved_tensors
        u = dequantize(Quantized(codes, scales, tuple(d_total.shape), ctx.dtype, ctx.bits))
        leaf, ys = ctx.setting.record(ctx.f.gradients, u)
        d_u = back_propagate(leaf, d_out, *ys)
        norm = NormBackward((codes, scales, inverse, weight), ctx.bits, d_total, ctx.added or torch.float32)
        norm(d_u.contiguous())  # what it returns, u, f has had
        d_added = None if ctx.added is None else norm.d_added
        return norm.d_sum, d_added, norm.d_weight, *[None] * 5


def _unchanged(x: Tensor) -> Tensor:
    return x
