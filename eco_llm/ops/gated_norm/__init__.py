"""RMSNorm of a gated tensor, the Mamba mixer's output norm. Maths: README.md beside this file."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.gated_norm.reference import gated_rms_norm_reference
from eco_llm.ops.opaque import operator

__all__ = ["gated_rms_norm"]

Backend = Literal["auto", "reference", "triton"]
MAX_TRITON_CHANNELS = 8192


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, *, backend: Backend = "auto") -> Tensor:
    """h / sqrt(mean(h²) + eps) · weight with h = y · silu(z), over the last axis.

    float32 inside (float64 for float64 inputs), under autocast too. No host sync.

    Args:
        y, z: [B, T, C]; may be slices of wider tensors (last stride 1, others free), which are not copied.
        weight: [C].
        eps: added to the mean square.
        backend: `auto` takes Triton where it serves y (CUDA, float32 or bfloat16, C ≤ 8192), else the reference.

    Returns:
        [B, T, C] in the type of y.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or `triton` asked for what it does not serve.
    """
    if y.ndim != 3 or z.shape != y.shape or weight.shape != y.shape[2:]:
        raise ValueError(
            f"need y and z [B, T, C], weight [C], got {tuple(y.shape)}, {tuple(z.shape)}, {tuple(weight.shape)}"
        )
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"unknown gated norm backend {backend!r}; known: auto, reference, triton")
    half_or_single = (torch.float32, torch.bfloat16)
    served = y.dtype in half_or_single and z.dtype in half_or_single and y.shape[2] <= MAX_TRITON_CHANNELS
    if backend == "triton" and not served:
        raise ValueError(
            f"the Triton gated norm takes float32 or bfloat16 and at most {MAX_TRITON_CHANNELS} channels; "
            f"got {y.dtype}, {z.dtype}, {y.shape[2]}"
        )
    if backend == "triton" or (backend == "auto" and served and uses_triton(y)):
        g: Tensor = _norm(y, z, weight.float(), eps)
        return g
    return gated_rms_norm_reference(y, z, weight, eps)


# Operators, so that torch.compile sees one opaque node with known shapes: it would otherwise trace into the launchers.
@operator("gated_rms_norm")
def _norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    from eco_llm.ops.gated_norm.triton import gated_norm_forward

    return gated_norm_forward(_rows(y), _rows(z), weight.contiguous(), eps)


@_norm.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@operator("gated_rms_norm_backward")
def _norm_backward(dg: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from eco_llm.ops.gated_norm.triton import gated_norm_backward

    dy, dz = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (y, z))
    return dy, dz, gated_norm_backward(_rows(dg), _rows(y), _rows(z), weight.contiguous(), eps, dz, dy)


@_norm_backward.register_fake
def _(dg: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dy, dz, dweight = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (y, z, weight))
    return dy, dz, dweight


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dg: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dy, dz, dweight = _norm_backward(dg, *ctx.saved_tensors, ctx.eps)
    return dy, dz, dweight, None


_norm.register_autograd(_differentiate, setup_context=_save)


def _rows(x: Tensor) -> Tensor:
    """x with a last stride of 1; only a tensor that lacks it is copied."""
    return x if x.stride(-1) == 1 else x.contiguous()
