# Kernels build tuples of tiles by `+`, for they know no unpacking, and rebind a name with another number of them.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""Gated RMSNorm as Triton kernels. Maths: README.md beside this file.

A program owns a row (a token) at a time, in up to three chunks of `CHUNK` channels that stay in registers between the
statistics and their use, so that everything is read once. Backward is a persistent grid: a program keeps its share of
dWeight in registers over all its rows.

Row strides reach the kernels divided by their common power of two, `UNIT`, and are multiplied by it there: that tells
the compiler the alignment, and so the safe vector width, also where strides are no multiples of 16 (the only hint
Triton has itself).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eco_llm.ops.gated_norm import MAX_TRITON_CHANNELS
from eco_llm.ops.partials import sum_partials
from eco_llm.ops.quantize import reference as numbers
from eco_llm.ops.quantize.triton import signed_keys, step_keys
from eco_llm.ops.rows import load_row, load_row_of_codes, programs_for, row_shape, store_chunk, store_codes
from eco_llm.ops.sigmoid import sigmoid


class _Tuning(NamedTuple):
    """How backward occupies a multiprocessor."""

    channels: int  # a thread and chunk, at most
    warps: int  # on a multiprocessor at a time; each program leaves one partial dWeight
    prefetch: bool  # load the next row before working on this one: more bytes in flight a program, fewer programs
    registers: int | None  # a thread, at most; None leaves it to the compiler


# 1536 channels are 4 warps of 128 registers, by ptxas for compute capability 9.0: 4 programs, 37 kB being loaded.
_BACKWARD = _Tuning(channels=4, warps=16, prefetch=False, registers=None)


@triton.jit
def _row_offset(batch, token, batch_stride, row_stride, UNIT: tl.constexpr):
    """Elements before a token, for a tensor of these strides (in units)."""
    return (tl.cast(batch, tl.int64) * batch_stride + tl.cast(token, tl.int64) * row_stride) * UNIT


@triton.jit
def _split_row(row, T, FLAT: tl.constexpr):
    """Batch and token of row `row` of B·T. FLAT: all rows lie at equal distances, and count as one batch."""
    if FLAT:
        return row * 0, row
    batch = row // T
    return batch, row - batch * T


@triton.jit(do_not_specialize=["T", "y_batch", "y_row", "z_batch", "z_row", "y_key0", "y_key1", "z_key0", "z_key1"])
def gated_norm_forward_kernel(
    y, z, weight, g, eps, T, y_batch, y_row, z_batch, z_row,
    y_codes, y_scales, z_codes, z_scales, step, y_key0, y_key1, z_key0, z_key1,
    C: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr,
    BITS: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """BITS: 0, and the third line of arguments is not read; or what y and z are written in too, by `quantize`."""
    row = tl.program_id(0)
    batch, token = _split_row(row, T, FLAT)
    y_now = load_row(y + _row_offset(batch, token, y_batch, y_row, UNIT), C, CHUNK, N)
    z_now = load_row(z + _row_offset(batch, token, z_batch, z_row, UNIT), C, CHUNK, N)
    scale = load_row(weight, C, CHUNK, N)
    gated = ()
    squares = tl.zeros((CHUNK,), tl.float32)
    for k in tl.static_range(N):
        gate = z_now[k].to(tl.float32)
        h = y_now[k].to(tl.float32) * (gate * sigmoid(gate))
        squares += h * h
        gated = gated + (h,)
    inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / C + eps)
    out = g + row.to(tl.int64) * C
    for k in tl.static_range(N):
        store_chunk(out, gated[k] * inverse * scale[k], k, C, CHUNK)
    if BITS:
        y_key0, y_key1 = step_keys(step, y_key0, y_key1)
        z_key0, z_key1 = step_keys(step, z_key0, z_key1)
        for k in tl.static_range(N):
            store_codes(y_codes, y_scales, y_now[k], row, k, y_key0, y_key1, C, CHUNK, BITS, SLOPE)
            store_codes(z_codes, z_scales, z_now[k], row, k, z_key0, z_key1, C, CHUNK, BITS, SLOPE)


@triton.jit(
    do_not_specialize=[
        "rows", "T", "dg_batch", "dg_row", "y_batch", "y_row", "z_batch", "z_row",
        "dy_batch", "dy_row", "dz_batch", "dz_row", "g_batch", "g_row",
    ]
)  # fmt: skip
def gated_norm_backward_kernel(
    dg, y, z, y_scales, z_scales, weight, dy, dz, g, partials, eps, rows, T,
    dg_batch, dg_row, y_batch, y_row, z_batch, z_row, dy_batch, dy_row, dz_batch, dz_row, g_batch, g_row,
    C: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr,
    STORE_G: tl.constexpr, PREFETCH: tl.constexpr, BITS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """dy may lie where dg lies: a row is wholly read, by the sums over it, before its first write.

    BITS: 0, or what y and z, of the type of dy, are given in: y and z are their codes then, and scales are read.
    """
    first = tl.program_id(0)
    scale = load_row(weight, C, CHUNK, N)
    d_scale = ()
    for _ in tl.static_range(N):
        d_scale = d_scale + (tl.zeros((CHUNK,), tl.float32),)
    tl.static_assert(BITS == 0 or not PREFETCH)
    if PREFETCH:
        batch, token = _split_row(first, T, FLAT)
        dg_ahead = load_row(dg + _row_offset(batch, token, dg_batch, dg_row, UNIT), C, CHUNK, N)
        y_ahead = load_row(y + _row_offset(batch, token, y_batch, y_row, UNIT), C, CHUNK, N)
        z_ahead = load_row(z + _row_offset(batch, token, z_batch, z_row, UNIT), C, CHUNK, N)
    for row in range(first, rows, tl.num_programs(0)):
        batch, token = _split_row(row, T, FLAT)
        if PREFETCH:
            dg_now, y_now, z_now = dg_ahead, y_ahead, z_ahead
            # The last turn loads its own row again rather than beyond the end; nobody uses it.
            following = row + tl.num_programs(0)
            following = tl.where(following < rows, following, row)
            next_batch, next_token = _split_row(following, T, FLAT)
            dg_ahead = load_row(dg + _row_offset(next_batch, next_token, dg_batch, dg_row, UNIT), C, CHUNK, N)
            y_ahead = load_row(y + _row_offset(next_batch, next_token, y_batch, y_row, UNIT), C, CHUNK, N)
            z_ahead = load_row(z + _row_offset(next_batch, next_token, z_batch, z_row, UNIT), C, CHUNK, N)
        else:
            dg_now = load_row(dg + _row_offset(batch, token, dg_batch, dg_row, UNIT), C, CHUNK, N)
            if BITS:
                y_now = load_row_of_codes(y, y_scales, row, C, CHUNK, N, BITS, dy.dtype.element_ty, LARGEST)
                z_now = load_row_of_codes(z, z_scales, row, C, CHUNK, N, BITS, dy.dtype.element_ty, LARGEST)
            else:
                y_now = load_row(y + _row_offset(batch, token, y_batch, y_row, UNIT), C, CHUNK, N)
                z_now = load_row(z + _row_offset(batch, token, z_batch, z_row, UNIT), C, CHUNK, N)

        squares = tl.zeros((CHUNK,), tl.float32)
        products = tl.zeros((CHUNK,), tl.float32)
        for k in tl.static_range(N):
            gate = z_now[k].to(tl.float32)
            h = y_now[k].to(tl.float32) * (gate * sigmoid(gate))
            squares += h * h
            products += h * (scale[k] * dg_now[k].to(tl.float32))
        # Both sums in one reduction: warps meet once.
        square, product = tl.split(tl.sum(tl.join(squares, products), axis=0))
        inverse = 1.0 / tl.sqrt(square / C + eps)
        # dh = inverse (w dg − n mean(n w dg)) with n = h · inverse
        mean = product / C * inverse

        dy_out = dy + _row_offset(batch, token, dy_batch, dy_row, UNIT)
        dz_out = dz + _row_offset(batch, token, dz_batch, dz_row, UNIT)
        g_out = g + _row_offset(batch, token, g_batch, g_row, UNIT)
        summed = ()
        for k in tl.static_range(N):
            gate = z_now[k].to(tl.float32)
            value = y_now[k].to(tl.float32)
            gradient = dg_now[k].to(tl.float32)
            open_share = sigmoid(gate)
            silu = gate * open_share
            normal = value * silu * inverse
            dh = inverse * (scale[k] * gradient - normal * mean)
            passed = dh * value * open_share
            store_chunk(dy_out, dh * silu, k, C, CHUNK)
            store_chunk(dz_out, passed + passed * (gate - silu), k, C, CHUNK)  # σ (1 + z (1 − σ)) is silu'
            if STORE_G:
                store_chunk(g_out, normal * scale[k], k, C, CHUNK)
            summed = summed + (d_scale[k] + gradient * normal,)
        d_scale = summed
    for k in tl.static_range(N):
        store_chunk(partials + first.to(tl.int64) * C, d_scale[k], k, C, CHUNK)


def _backward_shape(channels: int) -> dict[str, int]:
    shape = row_shape(channels, _BACKWARD.channels)
    limit = {} if _BACKWARD.registers is None else {"maxnreg": _BACKWARD.registers}
    return {**shape, "PREFETCH": _BACKWARD.prefetch, **limit}


def _is_flat(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the rows of each lie at equal distances."""
    return all(1 in t.shape[:2] or t.stride(0) == t.shape[1] * t.stride(1) for t in tensors)


def _strides(tensor: Tensor, flat: bool) -> tuple[int, int]:
    """Strides of batch and row; the last must be 1. Those of axes of length 1 are 0: they are free, and may be odd.
    Of flat tensors, 0 and that of a row of all.
    """
    if tensor.stride(2) != 1 and tensor.shape[2] != 1:
        raise ValueError(f"need a last stride of 1, got strides {tensor.stride()}")
    (batches, tokens, _), (batch, row, _) = tensor.shape, tensor.stride()
    if flat:
        # One token a batch: batches are the rows. The stride of an axis of length 1 says nothing.
        return 0, row if tokens > 1 else batch if batches > 1 else 0
    return batch if batches > 1 else 0, row if tokens > 1 else 0


def _check(y: Tensor, weight: Tensor, **others: Tensor) -> None:
    if y.ndim != 3 or weight.shape != y.shape[2:] or not 1 <= y.shape[2] <= MAX_TRITON_CHANNELS:
        raise ValueError(
            f"need y [B, T, C ≤ {MAX_TRITON_CHANNELS}], weight [C], got {tuple(y.shape)}, {tuple(weight.shape)}"
        )
    if weight.dtype != torch.float32 or not weight.is_contiguous():
        raise ValueError(f"need weight in float32 and contiguous, got {weight.dtype}")
    for name, tensor in others.items():
        if tensor.shape != y.shape:
            raise ValueError(f"need {name} of the shape of y, {tuple(y.shape)}, got {tuple(tensor.shape)}")


def gated_norm_forward(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(y · silu(z)) · weight over the last axis.

    Args:
        y, z: [B, T, C], last stride 1, other strides free; C ≤ 8192; float32 or bfloat16.
        weight: [C] float32.
        eps: added to the mean square.

    Returns:
        [B, T, C], contiguous, in the type of y.

    Raises:
        ValueError: shapes, types or strides that do not fit.
    """
    _check(y, weight, z=z)
    batch, tokens, channels = y.shape
    g = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    flat = _is_flat((y, z))
    strides = (*_strides(y, flat), *_strides(z, flat))
    unit = math.gcd(8, *strides)
    if g.numel():
        gated_norm_forward_kernel[(batch * tokens,)](
            y, z, weight, g, eps, tokens, *(stride // unit for stride in strides), *[g] * 5, 0, 0, 0, 0,
            UNIT=unit, FLAT=flat, BITS=0, SLOPE=0.0, **row_shape(channels, 8),
        )  # fmt: skip
    return g


class Codes(NamedTuple):
    """What `quantize` makes of y and z [B, T, C], C a multiple of 64."""

    y: Tensor
    y_scales: Tensor
    z: Tensor
    z_scales: Tensor
    bits: int


def gated_norm_forward_to_codes(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, bits: int, step: Tensor, y_stream: int, z_stream: int
) -> tuple[Tensor, Codes]:
    """`gated_norm_forward`, and what `quantize` makes of y and z, from one reading of them.

    Args:
        y, z, weight, eps: as in `gated_norm_forward`; C a multiple of 64, fewer than 2^34 elements.
        bits, step, y_stream, z_stream: as in `eco_llm.ops.quantize.quantize`.

    Raises:
        ValueError: shapes, types or strides that do not fit.
    """
    _check(y, weight, z=z)
    batch, tokens, channels = y.shape
    if channels % numbers.GROUP:
        raise ValueError(f"need C a multiple of {numbers.GROUP}, got {channels}")
    g = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    (y_codes, y_scales), (z_codes, z_scales) = (numbers.empty_codes(t.numel(), bits, t) for t in (y, z))
    flat = _is_flat((y, z))
    strides = (*_strides(y, flat), *_strides(z, flat))
    unit = math.gcd(8, *strides)
    if g.numel():
        gated_norm_forward_kernel[(batch * tokens,)](
            y, z, weight, g, eps, tokens, *(stride // unit for stride in strides),
            y_codes, y_scales.view(torch.int16), z_codes, z_scales.view(torch.int16), step,
            *signed_keys(y_stream), *signed_keys(z_stream),
            UNIT=unit, FLAT=flat, BITS=bits, SLOPE=numbers.slope(bits), **row_shape(channels, 8),
        )  # fmt: skip
    return g, Codes(y_codes, y_scales, z_codes, z_scales, bits)


def gated_norm_backward_partials(
    dg: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, dz_out: Tensor, dy_out: Tensor,
    g_out: Tensor | None = None, codes: Codes | None = None,
) -> Tensor:  # fmt: skip
    """Gradients of `gated_norm_forward`; statistics are computed again. Deterministic.

    Args:
        dg: [B, T, C], the gradient of the output.
        y, z, weight, eps: as in `gated_norm_forward`.
        dz_out, dy_out: [B, T, C] that dz and dy are written into, each in its own type. dy_out may be dg itself;
            otherwise outputs overlap nothing.
        g_out: [B, T, C] for the output of the forward, computed again; None to leave it out.
        codes: of y and z, in whose type dy_out is then; y and z only give the shape, and may be any tensors of it.

    All [B, T, C] have a last stride of 1 and free other strides.

    Returns:
        Summands of dweight [rows, C] float32, for `sum_partials`.

    Raises:
        ValueError: shapes, types or strides that do not fit.
    """
    _check(y, weight, dg=dg, z=z, dz_out=dz_out, dy_out=dy_out, **({} if g_out is None else {"g_out": g_out}))
    batch, tokens, channels = y.shape
    rows = batch * tokens
    if rows == 0:
        return torch.zeros((1, channels), dtype=torch.float32, device=y.device)
    g = y if g_out is None else g_out
    tensors = (dg, y, z, dy_out, dz_out) if g_out is None else (dg, y, z, dy_out, dz_out, g_out)
    flat = _is_flat(tensors)
    strides = [stride for tensor in tensors for stride in _strides(tensor, flat)]
    unit = math.gcd(8, *strides)
    strides += [0] * (12 - len(strides))
    inputs = (y, z, weight, weight)
    if codes is not None:
        inputs = (codes.y, codes.z, codes.y_scales.view(torch.int16), codes.z_scales.view(torch.int16))
    shape = _backward_shape(channels)
    programs = programs_for(rows, shape["num_warps"], _BACKWARD.warps, y.device)
    partials = torch.empty((programs, channels), dtype=torch.float32, device=y.device)
    gated_norm_backward_kernel[(programs,)](
        dg, *inputs, weight, dy_out, dz_out, g, partials, eps, rows, tokens, *(stride // unit for stride in strides),
        UNIT=unit, FLAT=flat, STORE_G=g_out is not None, BITS=codes.bits if codes else 0,
        LARGEST=torch.finfo(dy_out.dtype).max, **shape,
    )  # fmt: skip
    return partials


def gated_norm_backward(
    dg: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, dz_out: Tensor, dy_out: Tensor,
    g_out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`gated_norm_backward_partials`, summed: dweight [C] float32."""
    return sum_partials(gated_norm_backward_partials(dg, y, z, weight, eps, dz_out, dy_out, g_out))[0]
