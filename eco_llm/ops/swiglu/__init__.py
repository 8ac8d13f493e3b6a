"""The SwiGLU MLP with both its products, in one op. Maths, bytes and memory: README.md beside this file."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.gated_norm import MAX_TRITON_CHANNELS
from eco_llm.ops.opaque import operator
from eco_llm.ops.products import cast_weight, compute_dtype, linear, unread
from eco_llm.ops.quantize import GROUP, Keep
from eco_llm.ops.swiglu.reference import swiglu_mlp_reference, swiglu_mlp_unread_reference

__all__ = ["swiglu_mlp", "swiglu_mlp_foreseen", "swiglu_mlp_unread", "writes_codes"]

Backend = Literal["auto", "reference", "triton"]


def swiglu_mlp(x: Tensor, gate_up: Tensor, down: Tensor, *, backend: Backend = "auto") -> Tensor:
    """down · (silu(gate) · up), with gate and up the two halves of gate_up · x (arXiv 2002.05202).

    Computed in the autocast type if autocast is on, else in the type of x; silu · up is float32 inside through
    Triton. A weight's gradient has the weight's own type, and is never rounded on its way there. No host sync.

    Args:
        x: [B, T, D], free strides.
        gate_up: [2F, D]; rows 0…F−1 gate, F…2F−1 up.
        down: [D, F]. Weights are cast to the type of the products inside.
        backend: `auto` takes Triton where it serves (CUDA; products and weights in float32 or bfloat16), else the
            reference.

    Returns:
        [B, T, D] in the type of the products.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or `triton` asked for a type that it does not serve.
    """
    if x.ndim != 3 or gate_up.ndim != 2 or gate_up.shape != (2 * down.shape[-1], x.shape[-1]):
        raise ValueError(f"need x [B, T, D] and gate_up [2F, D], got {tuple(x.shape)}, {tuple(gate_up.shape)}")
    if down.shape != (x.shape[-1], gate_up.shape[0] // 2):
        raise ValueError(f"need down [D, F], got {tuple(down.shape)} beside gate_up {tuple(gate_up.shape)}")
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"unknown SwiGLU backend {backend!r}; known: auto, reference, triton")
    x = x.to(compute_dtype(x))  # out here, where a compiler fuses it into what made x
    served = _served(x.dtype, gate_up, down)
    if backend == "triton" and not served:
        raise ValueError(f"the Triton SwiGLU takes float32 or bfloat16, got {x.dtype}, {gate_up.dtype}, {down.dtype}")
    if backend == "reference" or (backend == "auto" and not (served and uses_triton(x))):
        return swiglu_mlp_reference(x, gate_up, down)
    if not torch.is_grad_enabled():
        # The same numbers with nothing kept. `linear` shares autocast's cast of a weight among the tokens generated.
        return linear(_silu_mul(linear(x, gate_up)), down)
    y: Tensor
    with torch.autocast(x.device.type, enabled=False):
        y = _mlp(x, gate_up, down)[0]
    return y


def swiglu_mlp_unread(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`swiglu_mlp` where its value is not read: NaN of the same shape and type, with the same gradients to the bit.

    Of forward's work the first product is left, which backward reads. Arguments as of `swiglu_mlp`; first derivatives
    only.
    """
    x = x.to(compute_dtype(x))
    if not (_served(x.dtype, gate_up, down) and uses_triton(x)):
        return swiglu_mlp_unread_reference(x, gate_up, down)
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _Unread.apply(x, gate_up, down))


def swiglu_mlp_foreseen(x: Tensor, gate_up: Tensor, down: Tensor, dy: Tensor) -> Tensor:
    """`swiglu_mlp` of which it is known that its result will receive the gradient dy: the same bits, of the result and
    of every gradient, whatever gradient is then sent back.

    With dy at hand, one pass over the hidden channels serves both ways: it makes their gradient and the activation.
    Arguments as of `swiglu_mlp`, dy [B, T, D], of which the result's type is taken; first derivatives only.
    """
    x = x.to(compute_dtype(x))
    if not (_served(x.dtype, gate_up, down) and uses_triton(x)):
        return swiglu_mlp(x, gate_up, down)  # autograd asks for dy
    if dy.shape != x.shape:
        raise ValueError(f"need dy {tuple(x.shape)}, got {tuple(dy.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _Foreseen.apply(x, gate_up, down, dy.to(x.dtype)))


def writes_codes(x: Tensor, gate_up: Tensor, down: Tensor, keep: Keep) -> bool:
    """Whether `coded.coded_mlp` serves a stream x [B, T, D]: kernels, and channels in whole groups.

    Raises:
        ValueError: a `keep` that no tensor on the device of x can be quantized with.
    """
    if not uses_triton(x) or x.dtype != torch.float32 or not _served(compute_dtype(x), gate_up, down):
        return False
    channels = x.shape[-1]
    whole = down.shape[1] % GROUP == 0 and channels % GROUP == 0 and channels <= MAX_TRITON_CHANNELS
    return whole and keep.serves(x, x.shape[:2].numel() * max(channels, gate_up.shape[0]))


def _served(dtype: torch.dtype, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the kernels take products in this type, of these weights."""
    return all(d in (torch.float32, torch.bfloat16) for d in (dtype, gate_up.dtype, down.dtype))


# Operators, so that torch.compile sees opaque nodes with known shapes: it would otherwise trace into the launchers.
@operator("silu_mul")
def _silu_mul(a: Tensor) -> Tensor:
    from eco_llm.ops.swiglu.triton import silu_mul_forward

    return silu_mul_forward(a)


@_silu_mul.register_fake
def _(a: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], a.shape[-1] // 2)


@operator("swiglu_mlp")
def _mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from eco_llm.ops.swiglu.triton import mlp_forward

    return mlp_forward(x, gate_up, down)


@_mlp.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = x.shape[0] * x.shape[1]
    w_gate_up, w_down = (x.new_empty(0 if w.dtype == x.dtype else w.shape) for w in (gate_up, down))
    return x.new_empty(x.shape), x.new_empty(tokens, gate_up.shape[0]), w_gate_up, w_down


@operator("swiglu_mlp_backward")
def _mlp_backward(
    dy: Tensor, x: Tensor, a: Tensor, gate_up: Tensor, down: Tensor, gate_up_dtype: torch.dtype, down_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from eco_llm.ops.swiglu.triton import mlp_backward

    return mlp_backward(dy, x, a, gate_up, down, gate_up_dtype, down_dtype)


@_mlp_backward.register_fake
def _(
    dy: Tensor, x: Tensor, a: Tensor, gate_up: Tensor, down: Tensor, gate_up_dtype: torch.dtype, down_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    d_gate_up, d_down = (
        gate_up.new_empty(gate_up.shape, dtype=gate_up_dtype),
        down.new_empty(down.shape, dtype=down_dtype),
    )
    return x.new_empty(x.shape), d_gate_up, d_down


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, *weights = inputs
    _, a, *casts = output
    used = (w if w.dtype == x.dtype else cast for w, cast in zip(weights, casts, strict=True))
    ctx.save_for_backward(x, a, *used)
    ctx.dtypes = tuple(w.dtype for w in weights)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(dy.device.type, enabled=False):  # backward() may be called inside one
        d_x, d_gate_up, d_down = _mlp_backward(dy, *ctx.saved_tensors, *ctx.dtypes)
    return d_x, d_gate_up, d_down


_mlp.register_autograd(_differentiate, setup_context=_save)


class _Foreseen(torch.autograd.Function):
    """`_mlp` and half of its backward at once. Run uncompiled, as `_Unread`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, dy: Tensor) -> Tensor:
        from eco_llm.ops.swiglu.triton import mlp_forward_foreseen

        y, *kept = mlp_forward_foreseen(x, gate_up, down, dy)
        ctx.save_for_backward(x, dy, *kept)
        ctx.dtypes = gate_up.dtype, down.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        from eco_llm.ops.swiglu.triton import mlp_gradients

        x, dy, da, h, w_gate_up = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return *mlp_gradients(dy, x, da, h, w_gate_up, *ctx.dtypes), None


class _Unread(torch.autograd.Function):
    """What `_mlp` keeps, and its backward, without its value. Run uncompiled: there is nothing to fuse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        used = [cast_weight(w, x)[0] for w in (gate_up, down)]
        ctx.save_for_backward(x, x.flatten(0, 1) @ used[0].t(), *used)
        ctx.dtypes = gate_up.dtype, down.dtype
        return unread(x, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _differentiate(ctx, gradients[0])
