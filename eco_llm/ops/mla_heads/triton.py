# mypy: allow-untyped-defs
"""Queries, keys and values of MLA as Triton kernels around one product of cuBLAS, forward and backward.

A program has one token and goes through its heads, some at a time. In backward it so meets all heads' gradients of the
rotary key they share, and leaves their sum. Nothing is added in an order that could change from run to run.

Shape legend: M = B·T tokens, H heads, NOPE + ROPE channels of queries and keys, VALUE of values, L latent width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eco_llm.ops.partials import sum_partials
from eco_llm.ops.products import cast_weight, weight_gradient
from eco_llm.ops.rows import programs_for

_NUMBERS = 2048  # of a tensor that a program has at a time, if a head or a row of the latent is not wider
_RESIDENT_WARPS = 16  # of the norm's backward on a multiprocessor: more would leave more partial sums


@triton.jit
def _copy(source, target, inside):
    tl.store(target, tl.load(source, mask=inside, other=0.0), mask=inside)


@triton.jit
def heads_forward_kernel(
    q, kv, latent, cos, sin, queries, keys, values, T, H,
    L: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr, VALUE: tl.constexpr,
    HEADS: tl.constexpr, NOPE_2: tl.constexpr, HALF_2: tl.constexpr, VALUE_2: tl.constexpr,
):  # fmt: skip
    """…_2: the same, rounded up to powers of two; HALF of ROPE. All [M, …] contiguous. Grid: M."""
    WIDTH: tl.constexpr = NOPE + 2 * HALF
    token = tl.program_id(0)
    row = token.to(tl.int64)
    half, nope, value = tl.arange(0, HALF_2), tl.arange(0, NOPE_2), tl.arange(0, VALUE_2)
    turning = half < HALF
    turn = (token % T) * HALF + half
    c, s = tl.load(cos + turn, mask=turning, other=0.0), tl.load(sin + turn, mask=turning, other=0.0)
    rope = latent + row * (L + 2 * HALF) + L + half
    first = tl.load(rope, mask=turning, other=0.0).to(tl.float32)
    second = tl.load(rope + HALF, mask=turning, other=0.0).to(tl.float32)
    key_first = (first * c - second * s).to(keys.dtype.element_ty)[None, :]
    key_second = (first * s + second * c).to(keys.dtype.element_ty)[None, :]
    c, s = c[None, :], s[None, :]
    q += row * H * WIDTH
    queries += row * H * WIDTH
    keys += row * H * WIDTH
    kv += row * H * (NOPE + VALUE)
    values += row * H * VALUE
    for start in range(0, H, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        real = head < H
        plain = real & (nope < NOPE)[None, :]
        at = head * WIDTH + nope[None, :]
        _copy(q + at, queries + at, plain)
        _copy(kv + head * (NOPE + VALUE) + nope[None, :], keys + at, plain)
        inside = real & (value < VALUE)[None, :]
        _copy(kv + head * (NOPE + VALUE) + NOPE + value[None, :], values + head * VALUE + value[None, :], inside)
        rotary = real & turning[None, :]
        at = head * WIDTH + NOPE + half[None, :]
        x = tl.load(q + at, mask=rotary, other=0.0).to(tl.float32)
        y = tl.load(q + at + HALF, mask=rotary, other=0.0).to(tl.float32)
        tl.store(queries + at, (x * c - y * s).to(queries.dtype.element_ty), mask=rotary)
        tl.store(queries + at + HALF, (x * s + y * c).to(queries.dtype.element_ty), mask=rotary)
        every = tl.zeros((HEADS, HALF_2), keys.dtype.element_ty)
        tl.store(keys + at, every + key_first, mask=rotary)
        tl.store(keys + at + HALF, every + key_second, mask=rotary)


@triton.jit
def heads_backward_kernel(
    d_queries, d_keys, d_values, cos, sin, d_q, d_kv, d_latent, T, H,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    L: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr, VALUE: tl.constexpr,
    HEADS: tl.constexpr, NOPE_2: tl.constexpr, HALF_2: tl.constexpr, VALUE_2: tl.constexpr,
):  # fmt: skip
    """Of the latent only the rotary part's gradient. Gradients come with strides, of elements; what is written is
    contiguous. Grid: M.
    """
    WIDTH: tl.constexpr = NOPE + 2 * HALF
    token = tl.program_id(0)
    row, batch, t = token.to(tl.int64), (token // T).to(tl.int64), (token % T).to(tl.int64)
    half, nope, value = tl.arange(0, HALF_2), tl.arange(0, NOPE_2), tl.arange(0, VALUE_2)
    turning = half < HALF
    turn = (token % T) * HALF + half
    c, s = tl.load(cos + turn, mask=turning, other=0.0), tl.load(sin + turn, mask=turning, other=0.0)
    d_queries += batch * q_batch + t * q_token
    d_keys += batch * k_batch + t * k_token
    d_values += batch * v_batch + t * v_token
    d_q += row * H * WIDTH
    d_kv += row * H * (NOPE + VALUE)
    d_first, d_second = tl.zeros((HALF_2,), tl.float32), tl.zeros((HALF_2,), tl.float32)
    for start in range(0, H, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        far = head.to(tl.int64)
        real = head < H
        plain = real & (nope < NOPE)[None, :]
        _copy(d_queries + far * q_head + nope[None, :], d_q + head * WIDTH + nope[None, :], plain)
        _copy(d_keys + far * k_head + nope[None, :], d_kv + head * (NOPE + VALUE) + nope[None, :], plain)
        inside = real & (value < VALUE)[None, :]
        _copy(d_values + far * v_head + value[None, :], d_kv + head * (NOPE + VALUE) + NOPE + value[None, :], inside)
        rotary = real & turning[None, :]
        here = d_queries + far * q_head + NOPE + half[None, :]
        x = tl.load(here, mask=rotary, other=0.0).to(tl.float32)
        y = tl.load(here + HALF, mask=rotary, other=0.0).to(tl.float32)
        to = d_q + head * WIDTH + NOPE + half[None, :]
        tl.store(to, (x * c[None, :] + y * s[None, :]).to(d_q.dtype.element_ty), mask=rotary)
        tl.store(to + HALF, (y * c[None, :] - x * s[None, :]).to(d_q.dtype.element_ty), mask=rotary)
        here = d_keys + far * k_head + NOPE + half[None, :]
        d_first += tl.sum(tl.load(here, mask=rotary, other=0.0).to(tl.float32), 0)
        d_second += tl.sum(tl.load(here + HALF, mask=rotary, other=0.0).to(tl.float32), 0)
    to = d_latent + row * (L + 2 * HALF) + L + half
    tl.store(to, (d_first * c + d_second * s).to(d_latent.dtype.element_ty), mask=turning)
    tl.store(to + HALF, (d_second * c - d_first * s).to(d_latent.dtype.element_ty), mask=turning)


@triton.jit(do_not_specialize=["rows"])
def latent_norm_kernel(
    latent, weight, out, eps, rows, row_length, L: tl.constexpr, L_2: tl.constexpr, ROWS: tl.constexpr
):
    """RMSNorm of the first L numbers of each row. A program takes ROWS rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, L_2)[None, :]
    inside = (row < rows) & (column < L)
    x = tl.load(latent + row * row_length + column, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / L + eps)[:, None]
    y = x * inverse * tl.load(weight + column, mask=column < L, other=0.0)
    tl.store(out + row * L + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def latent_norm_backward_kernel(
    latent, weight, d_out, out, d_latent, partials, eps, rows, row_length,
    L: tl.constexpr, L_2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Also the norm itself again, into `out`. A program takes ROWS rows at a time and leaves one row of summands of the
    weight's gradient.
    """
    program = tl.program_id(0)
    column = tl.arange(0, L_2)[None, :]
    w = tl.load(weight + column, mask=column < L, other=0.0)
    d_weight = tl.zeros((ROWS, L_2), tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < L)
        x = tl.load(latent + row * row_length + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_out + row * L + column, mask=inside, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / L + eps)[:, None]
        normal = x * inverse
        tl.store(out + row * L + column, (normal * w).to(out.dtype.element_ty), mask=inside)
        dx = inverse * (w * d - normal * (tl.sum(w * d * normal, 1) / L)[:, None])
        tl.store(d_latent + row * row_length + column, dx.to(d_latent.dtype.element_ty), mask=inside)
        d_weight += d * normal
    summands = tl.sum(d_weight, 0)[None, :]
    tl.store(partials + tl.cast(program, tl.int64) * L + column, summands, mask=column < L)


def _heads_shape(heads: int, rank: int, nope: int, half: int, value: int) -> dict[str, int]:
    """How the kernels take a token's heads: as many at a time as are `_NUMBERS` numbers, one at least."""
    widest = triton.next_power_of_2(max(nope, half, value))
    at_a_time = max(1, min(triton.next_power_of_2(heads), _NUMBERS // widest))
    return {
        "L": rank, "NOPE": nope, "HALF": half, "VALUE": value, "HEADS": at_a_time,
        "NOPE_2": triton.next_power_of_2(nope), "HALF_2": triton.next_power_of_2(half),
        "VALUE_2": triton.next_power_of_2(value), "num_warps": max(1, min(4, at_a_time * widest // 256)),
    }  # fmt: skip


def _norm_shape(rank: int) -> dict[str, int]:
    """How the norm's kernels take rows: as many at a time as are `_NUMBERS` numbers, one at least."""
    padded = triton.next_power_of_2(rank)
    rows = max(1, _NUMBERS // padded)
    return {"L": rank, "L_2": padded, "ROWS": rows, "num_warps": max(4, min(16, padded // 512))}


def heads_forward(
    q: Tensor, latent: Tensor, norm_weight: Tensor, up: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(queries, keys [B, T, h, d], values [B, T, h, v], `up` in the type of q, empty where it had it already).

    Shapes else as in `eco_llm.ops.mla_heads.mla_heads`; norm_weight float32.
    """
    q, latent, norm_weight = q.contiguous(), latent.contiguous(), norm_weight.contiguous()
    up, kept_up = cast_weight(up, q)
    (batch, time, width), rank, half = q.shape, norm_weight.shape[0], cos.shape[1]
    head = width // heads
    nope = head - 2 * half
    value = up.shape[0] // heads - nope
    c = q.new_empty(batch * time, rank)
    if c.numel():
        shape = _norm_shape(rank)
        latent_norm_kernel[(triton.cdiv(batch * time, shape["ROWS"]),)](
            latent, norm_weight, c, eps, batch * time, latent.shape[-1], **shape
        )
    kv = c @ up.t()
    del c
    queries, keys = (q.new_empty(batch, time, heads, head) for _ in range(2))
    values = q.new_empty(batch, time, heads, value)
    if q.numel():
        heads_forward_kernel[(batch * time,)](
            q, kv, latent, cos.contiguous(), sin.contiguous(), queries, keys, values, time, heads,
            **_heads_shape(heads, rank, nope, half, value),
        )  # fmt: skip
    return queries, keys, values, kept_up


def heads_backward(
    d_queries: Tensor, d_keys: Tensor, d_values: Tensor, latent: Tensor, norm_weight: Tensor, up: Tensor, cos: Tensor,
    sin: Tensor, eps: float, up_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, of the latent, of the norm's weight (float32) and of `up`, which is given in the type of q.

    d_queries, d_keys [B, T, h, d] and d_values [B, T, h, v] may have any strides but the last. Deterministic.
    """
    latent, norm_weight = latent.contiguous(), norm_weight.contiguous()
    d_queries, d_keys, d_values = (d if d.stride(-1) == 1 else d.contiguous() for d in (d_queries, d_keys, d_values))
    (batch, time, heads, head), rank, half = d_queries.shape, norm_weight.shape[0], cos.shape[1]
    rows, nope, value = batch * time, head - 2 * half, d_values.shape[-1]
    d_q, d_latent = latent.new_empty(batch, time, heads * head), torch.empty_like(latent)
    d_kv, c = latent.new_empty(rows, heads * (nope + value)), latent.new_empty(rows, rank)
    if rows == 0:
        return d_q, d_latent, torch.zeros_like(norm_weight), torch.zeros_like(up, dtype=up_dtype)
    heads_backward_kernel[(rows,)](
        d_queries, d_keys, d_values, cos.contiguous(), sin.contiguous(), d_q, d_kv, d_latent, time, heads,
        *d_queries.stride()[:3], *d_keys.stride()[:3], *d_values.stride()[:3],
        **_heads_shape(heads, rank, nope, half, value),
    )  # fmt: skip
    d_c = d_kv @ up
    shape = _norm_shape(rank)
    programs = programs_for(triton.cdiv(rows, shape["ROWS"]), shape["num_warps"], _RESIDENT_WARPS, latent.device)
    partials = torch.empty(programs, rank, dtype=torch.float32, device=latent.device)
    latent_norm_backward_kernel[(programs,)](
        latent, norm_weight, d_c, c, d_latent, partials, eps, rows, latent.shape[-1], **shape
    )
    del d_c
    d_up = weight_gradient(d_kv, c, up_dtype)
    return d_q, d_latent, sum_partials(partials)[0], d_up
