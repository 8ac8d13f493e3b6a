"""The mixer with the residual addition and the norm before it, keeping codes of activations and nothing else of them.

What memory mode `compress` trains with. Import it only where Triton is there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.ops.mamba_mixer.triton import KeptCodes, mixer_backward, mixer_forward_to_codes
from eco_llm.ops.products import compute_dtype
from eco_llm.ops.quantize import OPS_STREAMS, Keep
from eco_llm.ops.residual_norm.triton import NormBackward, residual_norm_to_codes

STREAMS = (OPS_STREAMS + 1, OPS_STREAMS + 2, OPS_STREAMS + 3)
"""Of the random numbers with which y, z and xBC are quantized."""
U_STREAM = OPS_STREAMS + 4
"""Of those for the norm's result."""


def coded_mixer(
    x: Tensor, added: Tensor | None, pre_weight: Tensor, pre_eps: float,
    in_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, *, state_dim: int, eps: float, chunk_size: int, keep: Keep,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x + added, mamba_mixer(norm(x + added))); backward has the norm's result, y, z and xBC as codes.

    Args:
        x: [B, T, D] float32, the stream.
        added: [B, T, D] in the type of the products, what the sub-layer before adds to it; None: nothing.
        pre_weight, pre_eps: the norm's, [D] float32.
        in_weight, …, chunk_size: as in `mamba_mixer`, for a shape that its kernels serve.
        keep: bits, and the counter of the random numbers.

    Returns:
        (the stream [B, T, D] float32, [B, T, D] in the type of the products). First derivatives only.
    """
    result = _CodedMixer.apply(
        x, added, pre_weight, in_weight, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, out_weight,
        pre_eps, state_dim, eps, chunk_size, keep, compute_dtype(x),
    )  # fmt: skip
    return cast(tuple[Tensor, Tensor], result)


class _CodedMixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, pre_weight: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        *weights, pre_eps, state_dim, eps, chunk_size, keep, dtype = inputs
        ctx.added = None if added is None else added.dtype
        ctx.settings = settings = (state_dim, eps, chunk_size, keep.bits)
        x, added = x.contiguous(), None if added is None else added.contiguous()
        with torch.autocast(x.device.type, enabled=False):
            pre = residual_norm_to_codes(x, added, pre_weight, pre_eps, dtype, keep.bits, keep.step, U_STREAM)
            out, *kept = mixer_forward_to_codes(pre.u, *weights, *settings, keep.step, STREAMS)  # type: ignore[call-arg]
        ctx.save_for_backward(pre.codes, pre.scales, pre.inverse, pre_weight, *kept, *weights)
        return pre.total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_total, d_out = gradients
        *pre, pre_weight = ctx.saved_tensors[:4]
        kept = KeptCodes(d_out, *ctx.saved_tensors[4:14])
        norm = NormBackward((*pre, pre_weight), ctx.settings[3], d_total, ctx.added or torch.float32)
        with torch.autocast(d_out.device.type, enabled=False):  # backward may be called inside one
            found = mixer_backward(d_out, kept, norm, *ctx.saved_tensors[14:], *ctx.settings)
        dA_log, d_bias, dD = found.small.unbind()
        return (
            norm.d_sum, None if ctx.added is None else norm.d_added, norm.d_weight,
            found.in_weight, found.conv_weight, found.conv_bias, d_bias, dA_log, dD, found.norm_weight,
            found.out_weight, *[None] * 6,
        )  # fmt: skip
