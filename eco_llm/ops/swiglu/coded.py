"""The MLP with the residual addition and the norm before it, keeping codes of activations and nothing else of them.

What memory mode `compress` trains with. Import it only where Triton is there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.ops.products import compute_dtype
from eco_llm.ops.quantize import OPS_STREAMS, Keep
from eco_llm.ops.residual_norm.triton import NormBackward, residual_norm_to_codes
from eco_llm.ops.swiglu.triton import Codes, mlp_backward, mlp_forward_to_codes

A_STREAM, U_STREAM = OPS_STREAMS, OPS_STREAMS + 5
"""Of the random numbers with which a = gate_up · u, and the norm's result u, are quantized."""


def coded_mlp(
    x: Tensor, added: Tensor | None, pre_weight: Tensor, pre_eps: float, gate_up: Tensor, down: Tensor, *, keep: Keep
) -> tuple[Tensor, Tensor]:
    """(x + added, swiglu_mlp(norm(x + added))); backward has the norm's result, and a, as codes.

    Args:
        x: [B, T, D] float32, the stream.
        added: [B, T, D] in the type of the products, what the sub-layer before adds to it; None: nothing.
        pre_weight, pre_eps: the norm's, [D] float32.
        gate_up, down: as in `swiglu_mlp`, for types that its kernels serve, F a multiple of 64.
        keep: bits, and the counter of the random numbers.

    Returns:
        (the stream [B, T, D] float32, [B, T, D] in the type of the products). First derivatives only.
    """
    result = _CodedMLP.apply(x, added, pre_weight, gate_up, down, pre_eps, keep, compute_dtype(x))
    return cast(tuple[Tensor, Tensor], result)


class _CodedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, pre_weight: Tensor, gate_up: Tensor, down: Tensor, pre_eps: float,
        keep: Keep, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.added = None if added is None else added.dtype
        ctx.bits, ctx.dtypes = keep.bits, (gate_up.dtype, down.dtype)
        x, added = x.contiguous(), None if added is None else added.contiguous()
        with torch.autocast(x.device.type, enabled=False):
            pre = residual_norm_to_codes(x, added, pre_weight, pre_eps, dtype, keep.bits, keep.step, U_STREAM)
            out, codes, scales, *casts = mlp_forward_to_codes(pre.u, gate_up, down, keep.bits, keep.step, A_STREAM)
        used = (w if w.dtype == dtype else cast for w, cast in zip((gate_up, down), casts, strict=True))
        ctx.save_for_backward(pre.codes, pre.scales, pre.inverse, pre_weight, codes, scales, *used)
        return pre.total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_total, d_out = gradients
        *pre, codes, scales, gate_up, down = ctx.saved_tensors
        norm = NormBackward(tuple(pre), ctx.bits, d_total, ctx.added or torch.float32)
        with torch.autocast(d_out.device.type, enabled=False):  # backward may be called inside one
            _, d_gate_up, d_down = mlp_backward(d_out, norm, Codes(codes, scales, ctx.bits), gate_up, down, *ctx.dtypes)
        d_added = None if ctx.added is None else norm.d_added
        return norm.d_sum, d_added, norm.d_weight, d_gate_up, d_down, None, None, None
