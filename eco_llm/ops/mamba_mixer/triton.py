"""The Mamba-2 mixer's forward and backward as sequences of kernels that share buffers.

Forward keeps the input, the in-projection's output and y for backward: (768 + 3352 + 1536) · 2 = 11.3 kB a token at the
default width of 768, and 0.2 kB of decays. What the convolution, the norm and the state passing made is made again in
backward, where it costs a few kernels that only move bytes. The products with weights are cuBLAS's; the weights'
gradients leave them in the weights' own type, and their compute-type copies are made once a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eco_llm.ops.causal_conv.triton import conv_silu_backward_partials, conv_silu_forward
from eco_llm.ops.gated_norm.triton import gated_norm_backward_partials, gated_norm_forward
from eco_llm.ops.partials import sum_partials
from eco_llm.ops.products import cast_weight, weight_gradient
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
    """[2, B, H, Tp] float32: dt and the sums of dt·A (ops/ssd/triton.py)."""
    in_weight: Tensor
    """Weights in the compute type; empty where they have it already."""
    out_weight: Tensor


def mixer_forward(
    u: Tensor, in_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, state_dim: int, eps: float, chunk_size: int,
) -> Kept:  # fmt: skip
    """Shapes as in `eco_llm.ops.mamba_mixer.mamba_mixer`."""
    heads, inner = dt_bias.shape[0], norm_weight.shape[0]
    in_weight, kept_in = cast_weight(in_weight, u)
    out_weight, kept_out = cast_weight(out_weight, u)
    zxbcdt = u @ in_weight.t()
    z, xbc, dt = _split(zxbcdt, inner, heads)
    x, B, C = _unpack(conv_silu_forward(xbc, conv_weight, conv_bias), inner, heads, state_dim)
    s = ssd.shape_of(x, B, chunk_size)
    decays = ssd.decays(dt, dt_bias, A, s)
    y, _ = ssd.forward(x, decays, B, C, D, s, initial=None, final=False)
    y = y.view(*u.shape[:2], inner)
    return Kept(gated_norm_forward(y, z, norm_weight, eps) @ out_weight.t(), zxbcdt, y, decays, kept_in, kept_out)


class MixerGradients(NamedTuple):
    """In the order of the inputs."""

    u: Tensor
    in_weight: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    small: Tensor
    """[3, H] float32: gradients of A, of dt's bias and of D."""
    norm_weight: Tensor
    out_weight: Tensor


def mixer_backward(
    d_out: Tensor, kept: Kept, u: Tensor, in_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor,
    A: Tensor, D: Tensor, norm_weight: Tensor, out_weight: Tensor, state_dim: int, eps: float, chunk_size: int,
) -> MixerGradients:  # fmt: skip
    """Every gradient; d_out [B, T, D]. `kept.out` is not read."""
    heads, inner = dt_bias.shape[0], norm_weight.shape[0]
    narrow_in = kept.in_weight if kept.in_weight.numel() else in_weight
    narrow_out = kept.out_weight if kept.out_weight.numel() else out_weight
    y = kept.y
    z, xbc, dt = _split(kept.zxbcdt, inner, heads)
    d_zxbcdt = torch.empty_like(kept.zxbcdt)  # filled through its three views: no concatenation
    d_z, d_xbc, d_dt = _split(d_zxbcdt, inner, heads)

    d_out = d_out.contiguous()
    d_gated = d_out @ narrow_out
    gated = torch.empty_like(y)
    norm_partials = gated_norm_backward_partials(d_gated, y, z, norm_weight, eps, d_z, d_gated, gated)
    d_y = d_gated  # overwritten in place
    d_out_weight = weight_gradient(d_out.flatten(0, 1), gated.flatten(0, 1), out_weight.dtype)
    del gated

    x, B, C = _unpack(conv_silu_forward(xbc, conv_weight, conv_bias), inner, heads, state_dim)
    s = ssd.shape_of(x, B, chunk_size)
    by_head = d_y.view(*d_y.shape[:2], heads, inner // heads)
    grads = ssd.backward(by_head, x, dt, dt_bias, A, B, C, D, s, initial=None, d_final=None, d_raw=d_dt, d=kept.decays)
    conv_partials = conv_silu_backward_partials(xbc, conv_weight, conv_bias, grads.dx.flatten(2), grads.d_bc, d_xbc)
    d_conv_weight, d_conv_bias, d_norm_weight, small = sum_partials(
        *conv_partials, norm_partials, grads.partial.flatten(1)
    )
    d_u = d_zxbcdt @ narrow_in
    d_in_weight = weight_gradient(d_zxbcdt.flatten(0, 1), u.flatten(0, 1), in_weight.dtype)
    return MixerGradients(
        d_u, d_in_weight, d_conv_weight.view_as(conv_weight), d_conv_bias, small.view(3, heads), d_norm_weight,
        d_out_weight,
    )  # fmt: skip
