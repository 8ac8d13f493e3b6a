"""The Mamba-2 mixer, both projections included, in one op. Maths and memory: README.md."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.gated_norm import MAX_TRITON_CHANNELS
from eco_llm.ops.mamba_mixer.reference import mamba_mixer_reference
from eco_llm.ops.opaque import operator
from eco_llm.ops.products import compute_dtype
from eco_llm.ops.quantize import GROUP, Keep
from eco_llm.ops.ssd.operator import padded_length, unsupported_by_triton

__all__ = ["mamba_mixer", "unsupported", "writes_codes"]

Backend = Literal["auto", "reference", "triton"]


def mamba_mixer(
    u: Tensor, in_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, *, state_dim: int, eps: float, chunk_size: int, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """z, xBC, dt = split(in_weight u); out_weight · norm(ssd(conv(xBC), softplus(dt + bias)) · silu(z)).

    The training path of `model.mamba.Mamba`. Products run in the autocast type if autocast is on, else in u's.

    Args:
        u: [B, T, D].
        in_weight: [H·P + (H·P + 2·G·N) + H, D]: gate, convolution input, raw steps.
        conv_weight, conv_bias: [H·P + 2·G·N, W] and [H·P + 2·G·N], float32.
        dt_bias, A_log, D: [H] float32; the rates are A = −exp(A_log).
        norm_weight: [H·P] float32.
        out_weight: [D, H·P].
        state_dim: N.
        eps: of the norm.
        chunk_size: tokens in a chunk of the SSD.
        backend: `auto` is `triton` where `eco_llm.ops.backend` says so and the shape allows it.

    Returns:
        [B, T, D] in the type of the products.

    Raises:
        ValueError: `triton` asked for a shape or type that its kernels do not take.
    """
    heads, inner = dt_bias.shape[0], norm_weight.shape[0]
    u = u.to(compute_dtype(u))  # out here, where a compiler fuses it into what made u
    reason = unsupported(u.dtype, inner, inner // heads, state_dim)
    if backend == "triton" and reason:
        raise ValueError(f"the Triton mixer does not serve this input: {reason}")
    arguments = (u, in_weight, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, out_weight)
    with torch.autocast(u.device.type, enabled=False):
        if backend == "triton" or (backend == "auto" and reason is None and uses_triton(u)):
            out: Tensor = _mixer(*arguments, state_dim, eps, chunk_size)[0]
            return out
        return mamba_mixer_reference(*arguments, state_dim=state_dim, eps=eps, chunk_size=chunk_size)


def unsupported(dtype: torch.dtype, inner: int, width: int, state_dim: int) -> str | None:
    """Why the kernels do not take `inner` channels in heads of `width`, `state_dim` numbers each; None if they do."""
    if dtype == torch.float16:
        return "no convolution kernel for float16"
    if inner > MAX_TRITON_CHANNELS:
        return f"an inner width of {inner} is over {MAX_TRITON_CHANNELS}"
    return unsupported_by_triton(dtype, width, state_dim)


def writes_codes(x: Tensor, conv_weight: Tensor, inner: int, width: int, state_dim: int, keep: Keep) -> bool:
    """Whether `coded.coded_mixer` serves a stream x [B, T, D]: kernels, and channels in whole groups.

    Args:
        x: the stream.
        conv_weight: [channels of xBC, W].
        inner, width, state_dim: as of `unsupported`.
        keep: of `coded_mixer`.

    Raises:
        ValueError: a `keep` that no tensor on the device of x can be quantized with.
    """
    if not uses_triton(x) or x.dtype != torch.float32 or unsupported(compute_dtype(x), inner, width, state_dim):
        return False
    channels = x.shape[-1]
    whole = inner % GROUP == 0 and channels % GROUP == 0 and channels <= MAX_TRITON_CHANNELS
    return whole and keep.serves(x, x.shape[:2].numel() * max(channels, conv_weight.shape[0]))


_Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# Opaque to torch.compile, which neither needs to see inside nor could fuse across these kernels.
@operator("mamba_mixer")
def _mixer(
    u: Tensor, in_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, state_dim: int, eps: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from eco_llm.ops.mamba_mixer.triton import mixer_forward

    return mixer_forward(
        u, in_weight, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, out_weight, state_dim, eps, chunk_size
    )


@_mixer.register_fake
def _(
    u: Tensor, in_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, state_dim: int, eps: float, chunk_size: int,
) -> _Six:  # fmt: skip
    batch, time, _ = u.shape
    heads, inner = dt_bias.shape[0], norm_weight.shape[0]
    padded = padded_length(time, chunk_size, u.dtype)
    narrow_in, narrow_out = (u.new_empty((0,) if w.dtype == u.dtype else w.shape) for w in (in_weight, out_weight))
    return (
        u.new_empty(batch, time, out_weight.shape[0]), u.new_empty(batch, time, in_weight.shape[0]),
        u.new_empty(batch, time, inner), u.new_empty(2, batch, heads, padded, dtype=torch.float32),
        narrow_in, narrow_out,
    )  # fmt: skip


@operator("mamba_mixer_backward")
def _mixer_backward(
    d_out: Tensor, zxbcdt: Tensor, y: Tensor, decays: Tensor, narrow_in: Tensor, narrow_out: Tensor,
    u: Tensor, in_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, state_dim: int, eps: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from eco_llm.ops.mamba_mixer.triton import Kept, mixer_backward

    return mixer_backward(
        d_out, Kept(d_out, zxbcdt, y, decays, narrow_in, narrow_out), u, in_weight, conv_weight, conv_bias, dt_bias,
        A_log, D, norm_weight, out_weight, state_dim, eps, chunk_size,
    )  # fmt: skip


@_mixer_backward.register_fake
def _(
    d_out: Tensor, zxbcdt: Tensor, y: Tensor, decays: Tensor, narrow_in: Tensor, narrow_out: Tensor,
    u: Tensor, in_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, state_dim: int, eps: float, chunk_size: int,
) -> _Seven:  # fmt: skip
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    small = A_log.new_empty(3, A_log.shape[0], dtype=torch.float32)
    return like(u), like(in_weight), like(conv_weight), like(conv_bias), small, like(norm_weight), like(out_weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Six) -> None:
    *tensors, ctx.state_dim, ctx.eps, ctx.chunk_size = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor, *unused: None) -> tuple[Tensor | None, ...]:
    with torch.autocast(d_out.device.type, enabled=False):  # backward may be called inside one
        d_u, d_in, d_conv_weight, d_conv_bias, small, d_norm, d_out_weight = _mixer_backward(
            d_out, *ctx.saved_tensors, ctx.state_dim, ctx.eps, ctx.chunk_size
        )
    dA_log, d_bias, dD = small.unbind()
    return d_u, d_in, d_conv_weight, d_conv_bias, d_bias, dA_log, dD, d_norm, d_out_weight, None, None, None


_mixer.register_autograd(_differentiate, setup_context=_save)
