# Kernels build tuples of tiles by `+`, for they know no unpacking, and rebind a name with another number of them.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, no-untyped-def"
"""Rows in the registers of one program, as `ops.gated_norm` and `ops.residual_norm` hold them.

A row of C channels is a tuple of up to three chunks of a power of two, so that C = 1536 costs no idle lanes. Rows can
be read from and written as the codes of `ops.quantize`; C is a multiple of its groups then.

Import it only where Triton is there.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from eco_llm.ops.quantize.triton import GROUP, from_codes, store_scales, to_codes

CHUNKS = 3  # at most; more of them would not fit the registers in the norms' backward


@triton.jit
def load_row(pointer, C: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr):
    """One row as N chunks, in its own type; 0 beyond C."""
    columns = tl.arange(0, CHUNK)
    row = ()
    for k in tl.static_range(N):
        here = pointer + (k * CHUNK + columns)
        if (k + 1) * CHUNK <= C:
            row = row + (tl.load(here),)
        else:
            row = row + (tl.load(here, mask=k * CHUNK + columns < C, other=0.0),)
    return row


@triton.jit
def load_row_of_codes(
    codes, scales, row, C: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr,
    BITS: tl.constexpr, DTYPE: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """`load_row` of row `row` of what the codes of a [rows, C] stand for, in DTYPE."""
    GROUPS: tl.constexpr = CHUNK // GROUP
    BYTES: tl.constexpr = GROUP * BITS // 8
    group = tl.arange(0, GROUPS)[:, None]
    codes += tl.cast(row, tl.int64) * (C // GROUP * BYTES)
    scales += tl.cast(row, tl.int64) * (C // GROUP)
    read = ()
    for k in tl.static_range(N):
        here = k * GROUPS + group
        inside = here < C // GROUP
        packed = tl.load(codes + here * BYTES + tl.arange(0, BYTES)[None, :], mask=inside, other=0)
        scale_bits = tl.load(scales + here, mask=inside, other=0)
        read = read + (tl.reshape(from_codes(packed, scale_bits, GROUPS, BITS, DTYPE, LARGEST), (CHUNK,)),)
    return read


@triton.jit
def store_codes(
    codes, scales, values, row, k: tl.constexpr, key0, key1, C: tl.constexpr, CHUNK: tl.constexpr,
    BITS: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Chunk k of row `row`, [CHUNK], as codes and scales of a [rows, C]."""
    GROUPS: tl.constexpr = CHUNK // GROUP
    BYTES: tl.constexpr = GROUP * BITS // 8
    group = k * GROUPS + tl.arange(0, GROUPS)[:, None]
    first = row.to(tl.int64) * (C // GROUP)
    quads = (first * (GROUP // 4)).to(tl.uint32) + (group * (GROUP // 4) + tl.arange(0, GROUP // 4)[None, :]).to(
        tl.uint32
    )
    values = tl.reshape(values.to(tl.float32), (GROUPS, GROUP))
    packed, scale_bits = to_codes(values, quads, key0, key1, GROUPS, BITS, SLOPE)
    inside = group < C // GROUP
    tl.store(codes + first * BYTES + group * BYTES + tl.arange(0, BYTES)[None, :], packed, mask=inside)
    store_scales(scales + first, group, scale_bits, inside, GROUP // 8)  # without a detour for 8 channels a thread only


@triton.jit
def store_chunk(pointer, value, k: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    columns = k * CHUNK + tl.arange(0, CHUNK)
    if (k + 1) * CHUNK <= C:
        tl.store(pointer + columns, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + columns, value.to(pointer.dtype.element_ty), mask=columns < C)


@functools.cache
def multiprocessors(device: torch.device, interpreted: int) -> int:
    """How many `device` has; `interpreted` where kernels are not run on a GPU."""
    if device.type != "cuda":
        return interpreted
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def row_shape(channels: int, widest: int) -> dict[str, int]:
    """Chunks of a row and warps: chunks of a third of the row at least, so that little of the last one is idle, and
    at most `widest` channels a thread and chunk.
    """
    chunk = max(128, triton.next_power_of_2(triton.cdiv(channels, CHUNKS)))
    warps = max(1, min(16, chunk // (32 * widest)))
    return {"C": channels, "CHUNK": chunk, "N": triton.cdiv(channels, chunk), "num_warps": warps, "num_stages": 1}


def programs_for(rows: int, warps: int, resident: int, device: torch.device) -> int:
    """As few programs as do not take longer than all that fit at once, for each leaves a partial sum.

    Args:
        rows: to share among them.
        warps: of a program.
        resident: warps on a multiprocessor at a time.
    """
    processors = multiprocessors(device, interpreted=2)  # few, so that a program meets several rows
    fitting = max(1, resident // warps) * processors
    return math.ceil(rows / math.ceil(rows / fitting))
