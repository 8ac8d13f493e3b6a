"""What attention of an MLA mixer reads, from its two projections, in one op. Maths and bytes: README.md beside it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.mla_heads.reference import mla_heads_reference
from eco_llm.ops.opaque import operator

__all__ = ["MAX_LATENT", "mla_heads"]

Backend = Literal["auto", "reference", "triton"]
MAX_LATENT = 8192
"""Widest latent of the kernels, which hold a row in registers."""


def mla_heads(
    q: Tensor, latent: Tensor, norm_weight: Tensor, up: Tensor, table: tuple[Tensor, Tensor], *, heads: int, eps: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries and keys with their rotary parts turned, and values, expanded from the latent.

        c, k_R = split(latent);  k_n, v = split(up · norm(c)) of each head
        queries = [q_n ; rope(q_R)],  keys = [k_n ; rope(k_R)]

    Args:
        q: [B, T, h·d], in the type of products: head 0's n = d − R plain channels and its R rotary ones, head 1's, …
        latent: [B, T, L + R], the same type: what keys and values are expanded from, and the rotary key of all heads.
        norm_weight: [L] of the latent's RMSNorm.
        up: [h·(n + v), L]; rows: head 0's key n and value v, head 1's, …
        table: (cos, sin), each [T, R / 2] float32, R > 0 even; channel i of R/2 is paired with channel i + R/2.
        heads: h.
        eps: of the norm.
        backend: `auto` takes Triton where it serves (CUDA; float32 or bfloat16, L ≤ 8192), else the reference.

    Returns:
        (queries [B, h, T, d], keys [B, h, T, d], values [B, h, T, v]) in the type of q, of any strides but the last.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or `triton` asked for what it does not serve.
    """
    half = table[0].shape[-1]
    rank, rope = norm_weight.shape[0], 2 * half
    nope = q.shape[-1] // heads - rope
    if q.ndim != 3 or q.shape[-1] % heads or nope < 1 or latent.shape != (*q.shape[:2], rank + rope):
        raise ValueError(
            f"need q [B, T, h·d] with d > R and latent [B, T, L + R]; got {tuple(q.shape)} of {heads} heads and "
            f"{tuple(latent.shape)} with L {rank}, R {rope}"
        )
    if up.shape[-1] != rank or up.shape[0] % heads or up.shape[0] // heads <= nope:
        raise ValueError(f"need up [h·(n + v), L], got {tuple(up.shape)} of {heads} heads, n {nope}, L {rank}")
    if any(t.shape != (q.shape[1], half) for t in table):
        raise ValueError(f"need cos and sin [T, R / 2] = [{q.shape[1]}, {half}], got {tuple(table[0].shape)}")
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"unknown backend of MLA's heads {backend!r}; known: auto, reference, triton")
    kernels_know = (torch.float32, torch.bfloat16)
    served = q.dtype == latent.dtype and {q.dtype, up.dtype} <= {*kernels_know} and rank <= MAX_LATENT
    if backend == "triton" and not served:
        raise ValueError(
            f"the Triton kernels of MLA's heads take float32 or bfloat16 and a latent of at most {MAX_LATENT}; got "
            f"{q.dtype}, {latent.dtype}, {up.dtype}, {rank}"
        )
    if backend == "reference" or (backend == "auto" and not (served and uses_triton(q))):
        return mla_heads_reference(q, latent, norm_weight, up, table, heads, eps)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values, _ = _heads(q, latent, norm_weight.float(), up, *table, heads, eps)
    return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


# Operators, so that torch.compile sees one opaque node with known shapes: it would otherwise trace into the launchers.
@operator("mla_heads")
def _heads(
    q: Tensor, latent: Tensor, norm_weight: Tensor, up: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from eco_llm.ops.mla_heads.triton import heads_forward

    return heads_forward(q, latent, norm_weight, up, cos, sin, heads, eps)


@_heads.register_fake
def _(
    q: Tensor, latent: Tensor, norm_weight: Tensor, up: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, time, width = q.shape
    head = width // heads
    of_values = up.shape[0] // heads - (head - 2 * cos.shape[1])
    shape = (batch, time, heads, head)
    narrow_up = q.new_empty((0,) if up.dtype == q.dtype else up.shape)
    return q.new_empty(shape), q.new_empty(shape), q.new_empty(*shape[:3], of_values), narrow_up


@operator("mla_heads_backward")
def _heads_backward(
    d_queries: Tensor, d_keys: Tensor, d_values: Tensor, latent: Tensor, norm_weight: Tensor, up: Tensor, cos: Tensor,
    sin: Tensor, eps: float, up_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from eco_llm.ops.mla_heads.triton import heads_backward

    return heads_backward(d_queries, d_keys, d_values, latent, norm_weight, up, cos, sin, eps, up_dtype)


@_heads_backward.register_fake
def _(
    d_queries: Tensor, d_keys: Tensor, d_values: Tensor, latent: Tensor, norm_weight: Tensor, up: Tensor, cos: Tensor,
    sin: Tensor, eps: float, up_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, time, heads, head = d_queries.shape
    return (
        latent.new_empty(batch, time, heads * head), latent.new_empty(latent.shape),
        norm_weight.new_empty(norm_weight.shape), up.new_empty(up.shape, dtype=up_dtype),
    )  # fmt: skip


_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float]


def _save(ctx: Any, inputs: _Inputs, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, latent, norm_weight, up, cos, sin, _, ctx.eps = inputs
    ctx.up_dtype, ctx.shapes = up.dtype, [o.shape for o in output[:3]]
    ctx.save_for_backward(latent, norm_weight, up if up.dtype == latent.dtype else output[3], cos, sin)
    ctx.set_materialize_grads(False)  # of the cast there is none


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    latent = ctx.saved_tensors[0]
    given = zip(gradients[:3], ctx.shapes, strict=True)
    of_attention = [latent.new_zeros(shape) if d is None else d for d, shape in given]
    with torch.autocast(latent.device.type, enabled=False):  # backward may be called inside one
        d_q, d_latent, d_norm, d_up = _heads_backward(*of_attention, *ctx.saved_tensors, ctx.eps, ctx.up_dtype)
    return d_q, d_latent, d_norm, d_up, None, None, None, None


_heads.register_autograd(_differentiate, setup_context=_save)
