"""The Mamba-2 mixer's forward and backward as sequences of kernels that share buffers.

Forward keeps the input, the in-projection's output and y for backward: (768 + 3352 + 1536) · 2 = 11.3 kB a token at the
default width of 768, and 0.2 kB of decays. What the convolution, the norm and the state passing made is made again in
backward, where it costs a few kernels that only move bytes. Where codes are kept instead (`mixer_forward_to_codes`),
the norm's kernels write and read those of y and z, and the convolution's those of its input. The products with weights
are cuBLAS's; the weights' gradients leave them in the weights' own type, and their compute-type copies are made once a
step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eco_llm.ops.causal_conv.triton import Codes as ConvCodes
from eco_llm.ops.causal_conv.triton import (
    conv_silu_backward_partials,
    conv_silu_forward,
    conv_silu_forward_to_codes,
    takes_codes,
)
from eco_llm.ops.gated_norm.triton import (
    Codes,
    gated_norm_backward_partials,
    gated_norm_forward,
    gated_norm_forward_to_codes,
)
from eco_llm.ops.partials import sum_partials
from eco_llm.ops.products import cast_weight, weight_gradient
from eco_llm.ops.quantize.triton import dequantize_triton, quantize_triton
from eco_llm.ops.ssd import triton as ssd


class _Parts(NamedTuple):
    """Views of the in-projection's output (or of its gradient)."""

    z: Tensor
    xbc: Tensor
    dt: Tensor


class _Inputs(NamedTuple):
    """Views of the convolution's output."""

    x: Tensor  # [B, T, H, P]
    B: Tensor  # [B, T, G, N]
    C: Tensor  # [B, T, G, N]


def _split(zxbcdt: Tensor, inner: int, heads: int) -> _Parts:
    return _Parts(*zxbcdt.split((inner, zxbcdt.shape[-1] - inner - heads, heads), dim=-1))


def _unpack(xbc: Tensor, inner: int, heads: int, state_dim: int) -> _Inputs:
    bc = (xbc.shape[-1] - inner) // 2
    x, B, C = xbc.split((inner, bc, bc), dim=-1)
    by_group = (bc // state_dim, state_dim)
    return _Inputs(x.unflatten(-1, (heads, inner // heads)), B.unflatten(-1, by_group), C.unflatten(-1, by_group))


class Kept(NamedTuple):
    """What forward returns: the result and what backward needs."""

    out: Tensor
    """[B, T, D]."""
    zxbcdt: Tensor
    """[B, T, 2·H·P + 2·G·N + H], the in-projection's output."""
    y: Tensor
    """[B, T, H·P], before the gate."""
    decays: Tensor
    """[2, B, H, Tp] float32: dt and the sums of its log-decays (ops/ssd/triton.py)."""
    in_weight: Tensor
    """Weights in the compute type; empty where they have it already."""
    out_weight: Tensor


def mixer_forward(
    u: Tensor, in_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, state_dim: int, eps: float, chunk_size: int,
) -> Kept:  # fmt: skip
    """Shapes as in `eco_llm.ops.mamba_mixer.mamba_mixer`."""
    heads, inner = dt_bias.shape[0], norm_weight.shape[0]
    in_weight, kept_in = cast_weight(in_weight, u)
    out_weight, kept_out = cast_weight(out_weight, u)
    zxbcdt = u @ in_weight.t()
    z, xbc, dt = _split(zxbcdt, inner, heads)
    y, decays = _scan(
        conv_silu_forward(xbc, conv_weight, conv_bias), dt, dt_bias, A_log, D, inner, state_dim, chunk_size
    )
    return Kept(gated_norm_forward(y, z, norm_weight, eps) @ out_weight.t(), zxbcdt, y, decays, kept_in, kept_out)


def _scan(
    convolved: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    inner: int, state_dim: int, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [B, T, H·P], decays)."""
    x, B, C = _unpack(convolved, inner, dt_bias.shape[0], state_dim)
    s = ssd.shape_of(x, B, chunk_size)
    decays = ssd.decays(dt, dt_bias, A_log, s, of_logs=True)
    y, _ = ssd.forward(x, decays, B, C, D, s, initial=None, final=False)
    return y.view(*convolved.shape[:2], inner), decays


class KeptCodes(NamedTuple):
    """What `mixer_forward_to_codes` returns: `Kept` with codes and scales of y, z and xBC (ops/quantize)."""

    out: Tensor
    """[B, T, D]."""
    y: Tensor
    y_scales: Tensor
    z: Tensor
    z_scales: Tensor
    xbc: Tensor
    xbc_scales: Tensor
    dt: Tensor
    """[B·T·H], the raw steps, whole: a hundredth of the rest."""
    decays: Tensor
    in_weight: Tensor
    out_weight: Tensor


def mixer_forward_to_codes(
    u: Tensor, in_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, state_dim: int, eps: float, chunk_size: int, bits: int, step: Tensor,
    streams: tuple[int, int, int],
) -> KeptCodes:  # fmt: skip
    """`mixer_forward`; `streams` of the random numbers for y, z and xBC."""
    heads, inner = dt_bias.shape[0], norm_weight.shape[0]
    in_weight, kept_in = cast_weight(in_weight, u)
    out_weight, kept_out = cast_weight(out_weight, u)
    zxbcdt = u @ in_weight.t()
    z, xbc, dt = _split(zxbcdt, inner, heads)
    convolved, conv = _convolve_to_codes(xbc, conv_weight, conv_bias, bits, step, streams[2])
    y, decays = _scan(convolved, dt, dt_bias, A_log, D, inner, state_dim, chunk_size)
    del convolved
    gated, codes = gated_norm_forward_to_codes(y, z, norm_weight, eps, bits, step, streams[0], streams[1])
    dt = dt.clone(memory_format=torch.contiguous_format).view(-1)  # of its own, else all of zxbcdt would live on
    del y, z, xbc, zxbcdt
    return KeptCodes(
        gated @ out_weight.t(), codes.y, codes.y_scales, codes.z, codes.z_scales, conv.codes, conv.scales, dt, decays,
        kept_in, kept_out,
    )  # fmt: skip


def _convolve_to_codes(
    xbc: Tensor, conv_weight: Tensor, conv_bias: Tensor, bits: int, step: Tensor, stream: int
) -> tuple[Tensor, ConvCodes]:
    """The convolution, and codes of its input; by a pass of their own where its kernels have no whole groups."""
    if takes_codes(*conv_weight.shape):
        return conv_silu_forward_to_codes(xbc, conv_weight, conv_bias, bits, step, stream)
    codes = ConvCodes(*quantize_triton(xbc, bits, step, stream), bits)
    return conv_silu_forward(xbc, conv_weight, conv_bias), codes


class MixerGradients(NamedTuple):
    """In the order of the inputs."""

    u: Tensor
    in_weight: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    small: Tensor
    """[3, H] float32: gradients of A_log, of dt's bias and of D."""
    norm_weight: Tensor
    out_weight: Tensor


def mixer_backward(
    d_out: Tensor, kept: Kept | KeptCodes, u: Tensor | Callable[[Tensor], Tensor], in_weight: Tensor,
    conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, norm_weight: Tensor,
    out_weight: Tensor, state_dim: int, eps: float, chunk_size: int, bits: int = 0,
) -> MixerGradients:  # fmt: skip
    """Every gradient; d_out [B, T, D]. `kept.out` is not read; `bits` are of codes, where those were kept.

    A function in the place of u is given its gradient and returns u, perhaps in the same place; the gradient is its.
    """
    heads, inner = dt_bias.shape[0], norm_weight.shape[0]
    narrow_in = kept.in_weight if kept.in_weight.numel() else in_weight
    narrow_out = kept.out_weight if kept.out_weight.numel() else out_weight
    d_zxbcdt = d_out.new_empty(*d_out.shape[:2], in_weight.shape[0])  # filled through its three views: no concatenation
    d_z, d_xbc, d_dt = _split(d_zxbcdt, inner, heads)

    d_out = d_out.contiguous()
    d_gated = d_out @ narrow_out
    gated = torch.empty_like(d_gated)
    if isinstance(kept, KeptCodes):
        codes = Codes(kept.y, kept.y_scales, kept.z, kept.z_scales, bits)
        norm_partials = gated_norm_backward_partials(
            d_gated, d_gated, d_z, norm_weight, eps, d_z, d_gated, gated, codes=codes
        )
    else:
        z, xbc, dt = _split(kept.zxbcdt, inner, heads)
        norm_partials = gated_norm_backward_partials(d_gated, kept.y, z, norm_weight, eps, d_z, d_gated, gated)
    d_y = d_gated  # overwritten in place
    d_out_weight = weight_gradient(d_out.flatten(0, 1), gated.flatten(0, 1), out_weight.dtype)
    del gated

    conv_codes = None
    if isinstance(kept, KeptCodes):
        xbc, dt = d_xbc, kept.dt.view(d_dt.shape)
        if takes_codes(*conv_weight.shape):
            conv_codes = ConvCodes(kept.xbc, kept.xbc_scales, bits)  # d_xbc is a stand-in, of shape and type
        else:
            xbc = dequantize_triton(kept.xbc, kept.xbc_scales, d_xbc.shape, d_out.dtype, bits)
    x, B, C = _unpack(conv_silu_forward(xbc, conv_weight, conv_bias, conv_codes), inner, heads, state_dim)
    s = ssd.shape_of(x, B, chunk_size)
    by_head = d_y.view(*d_y.shape[:2], heads, inner // heads)
    grads = ssd.backward(
        by_head, x, dt, dt_bias, A_log, B, C, D, s,
        initial=None, d_final=None, d_raw=d_dt, d=kept.decays, of_logs=True,
    )  # fmt: skip
    conv_partials = conv_silu_backward_partials(
        xbc, conv_weight, conv_bias, grads.dx.flatten(2), grads.d_bc, d_xbc, conv_codes
    )
    d_conv_weight, d_conv_bias, d_norm_weight, small = sum_partials(
        *conv_partials, norm_partials, grads.partial.flatten(1)
    )
    d_u = d_zxbcdt @ narrow_in
    if not isinstance(u, Tensor):
        u = u(d_u)
    d_in_weight = weight_gradient(d_zxbcdt.flatten(0, 1), u.flatten(0, 1), in_weight.dtype)
    return MixerGradients(
        d_u, d_in_weight, d_conv_weight.view_as(conv_weight), d_conv_bias, small.view(3, heads), d_norm_weight,
        d_out_weight,
    )  # fmt: skip
