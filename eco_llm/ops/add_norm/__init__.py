"""The residual stream's sum and the RMSNorm that reads it, in one pass. Maths and bytes: README.md beside this file."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.ops.add_norm.reference import add_rms_norm_reference, rms_norm_of_sum_reference
from eco_llm.ops.add_up import Ahead, fork
from eco_llm.ops.backend import uses_triton
from eco_llm.ops.opaque import operator
from eco_llm.ops.products import compute_dtype

__all__ = ["add_rms_norm", "forked_rms_norm", "rms_norm_of_sum"]

Backend = Literal["auto", "reference", "triton"]
MAX_TRITON_CHANNELS = 8192


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, keep_sum: bool, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """s = x + delta, and s / sqrt(mean(s²) + eps) · weight over the last axis. No host sync.

    Args:
        x: [B, T, D], the residual stream, at least float32.
        delta: [B, T, D], what a sub-layer adds to it, in any float type that x can hold; None: nothing. s is
            a copy of x then where kernels make it: so its gradients, of all that reads s, still leave one pass.
        weight: [D].
        eps: added to the mean square.
        keep_sum: what the kernels keep for backward, to no effect on results: s, or x and delta, where those are kept
            by others anyway and s is not.
        backend: `auto` takes Triton where it serves the types (CUDA, x float32, D ≤ 8192), else the reference.

    Returns:
        (s [B, T, D] in the type of x, the norm [B, T, D] in the type that products of x have now: autocast's, if on).

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or `triton` asked for what it does not serve.
    """
    added = x if delta is None else delta
    _check(x, added, weight, backend)
    if x.dtype not in (torch.float32, torch.float64) or torch.promote_types(x.dtype, added.dtype) != x.dtype:
        raise ValueError(f"need x of at least float32 and delta no wider, got {x.dtype}, {added.dtype}")
    dtype = compute_dtype(x)
    served = x.dtype == torch.float32 and _serves(x, added.dtype, dtype)
    if backend == "triton" and not served:
        raise ValueError(
            f"the Triton norm takes a float32 sum of float32 or bfloat16, results of those types and at most "
            f"{MAX_TRITON_CHANNELS} channels; got {x.dtype}, {added.dtype}, {dtype}, {x.shape[2]}"
        )
    if backend == "triton" or (backend == "auto" and served and uses_triton(x)):
        with torch.autocast(x.device.type, enabled=False):
            total, normed = _add_norm(x, delta, weight.float(), eps, dtype, keep_sum)
        return total, normed
    return add_rms_norm_reference(x, delta, weight, eps, dtype)


def rms_norm_of_sum(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, beside: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """s / sqrt(mean(s²) + eps) · weight of s = x + delta over the last axis; s itself is not given. No host sync.

    Kept for backward: x and delta. Neither need be as wide as s, which is at least float32.

    Args:
        x: [B, T, D], any float type.
        delta: [B, T, D], any float type that s can hold; None: nothing.
        weight: [D].
        eps: added to the mean square.
        beside: [B, T, D], what else delta's gradient is to get, known before: in the type of delta it is added in the
            pass that makes that gradient.
        backend: `auto` takes Triton where it serves the types (CUDA, float32 or bfloat16, D ≤ 8192), else the
            reference.

    Returns:
        [B, T, D] in the type that products of x have now: autocast's, if on.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or `triton` asked for what it does not serve.
    """
    added = x if delta is None else delta
    _check(x, added, weight, backend)
    if beside is not None:
        if delta is None or beside.shape != delta.shape:
            raise ValueError("need beside of the shape of delta, and a delta")
        beside = beside.to(delta.dtype)
    dtype = compute_dtype(x)
    served = _serves(x, added.dtype, dtype)
    if backend == "triton" and not served:
        raise ValueError(
            f"the Triton norm takes float32 or bfloat16 and at most {MAX_TRITON_CHANNELS} channels; got {x.dtype},"
            f" {added.dtype}, {dtype}, {x.shape[2]}"
        )
    if backend == "triton" or (backend == "auto" and served and uses_triton(x)):
        with torch.autocast(x.device.type, enabled=False):
            normed: Tensor = _norm_of_sum(x, delta, weight.float(), eps, dtype, beside)
        return normed
    return rms_norm_of_sum_reference(x, delta, weight, eps, dtype, beside)


def forked_rms_norm(x: Tensor, weight: Tensor, eps: float, ahead: Ahead) -> tuple[Tensor, Tensor]:
    """(x for its other reader, `rms_norm_of_sum(x, None, …)`), as of `fork(x, ahead)`: what both send back is added up
    in the pass that makes the norm's gradient. Never compiled. No host sync.

    Args:
        x: [B, T, D], any float type.
        weight: [D].
        eps: added to the mean square.
        ahead: where the sum goes.
    """
    _check(x, x, weight, "auto")
    dtype = compute_dtype(x)
    types = {ahead.stream.dtype, ahead.narrow} <= {torch.float32, torch.bfloat16}
    if types and ahead.stream.dtype == torch.float32 and _serves(x, x.dtype, dtype) and uses_triton(x):
        with torch.autocast(x.device.type, enabled=False):
            return cast(tuple[Tensor, Tensor], _Forked.apply(x, weight.float(), eps, dtype, ahead))
    one, other = fork(x, ahead)
    return one, rms_norm_of_sum(other, None, weight, eps)


def _serves(x: Tensor, added: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether kernels make the norm of x, alone or with what is added, in dtype."""
    return {x.dtype, added, dtype} <= {torch.float32, torch.bfloat16} and x.shape[2] <= MAX_TRITON_CHANNELS


def _check(x: Tensor, added: Tensor, weight: Tensor, backend: str) -> None:
    if x.ndim != 3 or added.shape != x.shape or weight.shape != x.shape[2:]:
        raise ValueError(
            f"need x and delta [B, T, D], weight [D], got {tuple(x.shape)}, {tuple(added.shape)}, {tuple(weight.shape)}"
        )
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"unknown norm backend {backend!r}; known: auto, reference, triton")


# Operators, so that torch.compile sees one opaque node with known shapes: it would otherwise trace into the launchers.
@operator("add_rms_norm")
def _add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    from eco_llm.ops.add_norm.triton import add_norm_forward

    delta = None if delta is None else delta.contiguous()
    return add_norm_forward(x.contiguous(), delta, weight.contiguous(), eps, dtype)


@_add_norm.register_fake
def _(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, keep_sum: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


@operator("add_rms_norm_backward")
def _add_norm_backward(
    d_total: Tensor | None, d_normed: Tensor, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float,
    narrow: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from eco_llm.ops.add_norm.triton import add_norm_backward

    x, d_normed, weight = x.contiguous(), d_normed.contiguous(), weight.contiguous()
    d_total, delta = (None if t is None else t.contiguous() for t in (d_total, delta))
    dx, narrowed, d_weight = add_norm_backward(d_total, d_normed, x, delta, weight, eps, narrow)
    return dx, dx.new_empty(0) if narrowed is None else narrowed, d_weight


@_add_norm_backward.register_fake
def _(
    d_total: Tensor | None, d_normed: Tensor, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float,
    narrow: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    narrowed = x.new_empty(0) if narrow == x.dtype else x.new_empty(x.shape, dtype=narrow)
    return x.new_empty(x.shape), narrowed, weight.new_empty(weight.shape)


def _save(
    ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor, float, torch.dtype, bool], output: tuple[Tensor, Tensor]
) -> None:
    x, delta, weight, ctx.eps, _, keep_sum = inputs
    ctx.narrow = None if delta is None else delta.dtype
    ctx.save_for_backward(weight, *((output[0], None) if keep_sum else (x, delta)))
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
    weight, x, delta = ctx.saved_tensors
    narrow = ctx.narrow or x.dtype
    d_weight = None
    if d_normed is None:  # nobody read the norm
        dx = d_total
        narrowed = None if dx is None else dx.to(narrow)
    else:
        dx, narrowed, d_weight = _add_norm_backward(d_total, d_normed, x, delta, weight, ctx.eps, narrow)
        if narrow == x.dtype:
            narrowed = dx
    # x and delta have the same gradient; that of delta is rounded to its type in the same pass.
    return dx, None if ctx.narrow is None else narrowed, d_weight, None, None, None


_add_norm.register_autograd(_differentiate, setup_context=_save)


@operator("rms_norm_of_sum")
def _norm_of_sum(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, beside: Tensor | None
) -> Tensor:
    from eco_llm.ops.add_norm.triton import norm_forward

    delta = None if delta is None else delta.contiguous()
    return norm_forward(x.contiguous(), delta, weight.contiguous(), eps, dtype)


@_norm_of_sum.register_fake
def _(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, beside: Tensor | None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@operator("rms_norm_of_sum_backward_beside")
def _norm_backward_beside(
    d_normed: Tensor, x: Tensor, delta: Tensor, weight: Tensor, eps: float, beside: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from eco_llm.ops.add_norm.triton import norm_backward_beside

    d_normed, x, delta, beside = (t.contiguous() for t in (d_normed, x, delta, beside))
    return norm_backward_beside(d_normed, x, delta, weight.contiguous(), eps, beside)


@_norm_backward_beside.register_fake
def _(
    d_normed: Tensor, x: Tensor, delta: Tensor, weight: Tensor, eps: float, beside: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), delta.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_norm(
    ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor, float, torch.dtype, Tensor | None], output: Tensor
) -> None:
    x, delta, weight, ctx.eps, _, beside = inputs
    ctx.narrow = x.dtype if delta is None else delta.dtype
    ctx.has_delta = delta is not None
    ctx.save_for_backward(x, delta, weight, beside)


def _differentiate_norm(ctx: Any, d_normed: Tensor) -> tuple[Tensor | None, ...]:
    x, delta, weight, beside = ctx.saved_tensors
    if beside is not None:
        return *_norm_backward_beside(d_normed, x, delta, weight, ctx.eps, beside), None, None, None
    dx, narrowed, d_weight = _add_norm_backward(None, d_normed, x, delta, weight, ctx.eps, ctx.narrow)
    d_delta = dx if ctx.narrow == x.dtype else narrowed
    return dx, d_delta if ctx.has_delta else None, d_weight, None, None, None


_norm_of_sum.register_autograd(_differentiate_norm, setup_context=_save_norm)


class _Forked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, ahead: Ahead
    ) -> tuple[Tensor, Tensor]:
        from eco_llm.ops.add_norm.triton import norm_forward

        ctx.eps, ctx.ahead = eps, ahead
        ctx.save_for_backward(x, weight)
        return x, norm_forward(x.contiguous(), None, weight.contiguous(), eps, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from eco_llm.ops.add_norm.triton import norm_backward_added

        (x, weight), ahead = ctx.saved_tensors, ctx.ahead
        other, d_normed = (t.contiguous() for t in gradients)
        added, narrowed, d_weight = norm_backward_added(
            d_normed, x.contiguous(), weight.contiguous(), ctx.eps, ahead.stream.contiguous(), other, ahead.narrow
        )
        return ahead.take(added, narrowed), d_weight, None, None, None
