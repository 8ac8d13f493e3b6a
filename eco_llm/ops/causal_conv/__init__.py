"""Causal depthwise convolution + SiLU, the Mamba mixer's short convolution. Maths: README.md beside this file."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.causal_conv.reference import causal_conv_silu_reference
from eco_llm.ops.opaque import operator

__all__ = ["causal_conv_silu"]

Backend = Literal["auto", "reference", "triton"]


def causal_conv_silu(
    x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """y[b, t, c] = silu(Σ_w weight[c, w] · x[b, t − W + 1 + w, c] + bias[c]).

    Sums are float32 (float64 for float64 inputs), under autocast too. No host sync.

    Args:
        x: [B, T, C]; may be a slice of a wider tensor (last stride 1, others free), which is not copied.
        weight: [C, W], the last tap meets the token itself.
        bias: [C].
        past: [B, W − 1, C], the tokens before the first; zeros if None.
        backend: `auto` takes Triton where it serves x (CUDA, float32 or bfloat16, 2 ≤ W ≤ 16, no `past`), else the
            reference.

    Returns:
        [B, T, C] in the type of x.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or `triton` asked for what it does not serve.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"need x [B, T, C], weight [C, W], bias [C], got {tuple(x.shape)}, {tuple(weight.shape)}, "
            f"{tuple(bias.shape)}"
        )
    taps = weight.shape[1]
    if past is not None and past.shape != (x.shape[0], taps - 1, x.shape[2]):
        raise ValueError(f"need past [B, W − 1, C] = {(x.shape[0], taps - 1, x.shape[2])}, got {tuple(past.shape)}")
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"unknown convolution backend {backend!r}; known: auto, reference, triton")
    served = past is None and x.dtype in (torch.float32, torch.bfloat16) and 2 <= taps <= 16
    if backend == "triton" and not served:
        raise ValueError(
            f"the Triton convolution takes no past, float32 or bfloat16, 2 to 16 taps; got {x.dtype}, {taps}"
        )
    if backend == "triton" or (backend == "auto" and served and uses_triton(x)):
        y: Tensor = _convolve(x, weight.float(), bias.float())
        return y
    return causal_conv_silu_reference(x, weight, bias, past)


# Operators, so that torch.compile sees one opaque node with known shapes: it would otherwise trace into the launchers.
@operator("causal_conv_silu")
def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from eco_llm.ops.causal_conv.triton import conv_silu_forward

    return conv_silu_forward(_rows(x), weight.contiguous(), bias.contiguous())


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("causal_conv_silu_backward")
def _convolve_backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from eco_llm.ops.causal_conv.triton import conv_silu_backward

    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight, dbias = conv_silu_backward(_rows(x), weight.contiguous(), bias.contiguous(), _rows(dy), None, dx)
    return dx, dweight, dbias


@_convolve_backward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, bias))
    return dx, dweight, dbias


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _convolve_backward(x, weight, bias, dy)
    return dx, dweight, dbias


_convolve.register_autograd(_differentiate, setup_context=_save)


def _rows(x: Tensor) -> Tensor:
    """x with a last stride of 1; only a tensor that lacks it is copied."""
    return x if x.stride(-1) == 1 else x.contiguous()
