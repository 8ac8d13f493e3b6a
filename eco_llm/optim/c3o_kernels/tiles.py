# mypy: allow-untyped-defs
"""Memory and rounding of one tile: numbers as they are stored, in float32 registers."""

from __future__ import annotations

import triton
import triton.language as tl

P1, P2 = tl.constexpr((49471 - 65536) << 16), tl.constexpr((37345 - 65536) << 16)
"""`rounding`'s strides, in units of 2^-32 of a period: thresholds in the upper half of int32 need no remainder."""
QUARTER, HALF = tl.constexpr(1 << 30), tl.constexpr(-(1 << 31))
"""Of a period: where the sequences of the weight and of the second moment start."""


@triton.jit
def _base(table, index, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The address in `table[index]` as a pointer."""
    return tl.multiple_of(tl.multiple_of(tl.load(table + index), ALIGN).to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def _read(base, at, left, MASKED: tl.constexpr):
    """float32 values of one tile; 0 past the tensor's end."""
    if MASKED:
        x = tl.load(base + at, mask=at < left, other=0.0)
    else:
        x = tl.load(base + at)
    return x.to(tl.float32)


@triton.jit
def _write(base, at, left, x, MASKED: tl.constexpr):
    if MASKED:
        tl.store(base + at, x, mask=at < left)
    else:
        tl.store(base + at, x)


@triton.jit
def _thresholds(lanes, begin, phase, START: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """`rounding.thresholds` in the upper half of int32, of elements begin + lanes; `begin` is a multiple of the tile,
    and that of BLOCK, or the other way round. One multiply-add an element for each sequence.
    """
    return (lanes & (BLOCK - 1)) * STRIDE + ((begin & (BLOCK - 1)) * STRIDE + (phase + START))


@triton.jit
def _phase(step, STRIDE: tl.constexpr):
    return (step.to(tl.int64) * STRIDE).to(tl.int32)


@triton.jit
def _shifted(x, PLACES: tl.constexpr):
    """x >> PLACES of int32, zeros shifted in."""
    return (x.to(tl.uint32, bitcast=True) >> PLACES).to(tl.int32, bitcast=True)


@triton.jit
def _dithered(x, threshold):
    """`rounding.dithered_bfloat16`: the same bits for the same x."""
    # CUDA's NaN, 0x7FFFFFFF, would wrap around; 0x7FFE0000 is one too.
    bits = tl.minimum(x.to(tl.int32, bitcast=True), 0x7FFE0000) + _shifted(threshold, 16)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _nearest(x):
    """bfloat16 by rounding to nearest, ties to even. Triton's interpreter truncates, so it is spelled out here."""
    b = x.to(tl.int32, bitcast=True)
    up = ((b + (0x7FFF + ((b >> 16) & 1))) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, up).to(tl.bfloat16)


@triton.jit
def _split(x, threshold):
    """`rounding.split_weight`: (bfloat16, int8)."""
    bits = (x.to(tl.int32, bitcast=True) + _shifted(threshold, 24)) >> 8
    near = (bits + 128) >> 8
    nan = x != x
    weight = tl.where(nan, x, (near << 16).to(tl.float32, bitcast=True)).to(tl.bfloat16)
    return weight, tl.where(nan, 0, bits - (near << 8)).to(tl.int8)


@triton.jit
def _read_weight(p_base, e_base, at, left, ERROR: tl.constexpr, MASKED: tl.constexpr):
    """θ in float32: the parameter, with its error bits if it has any."""
    p = _read(p_base, at, left, MASKED)
    if ERROR:
        if MASKED:
            e = tl.load(e_base + at, mask=at < left, other=0)
        else:
            e = tl.load(e_base + at)
        p = (p.to(tl.int32, bitcast=True) + (e.to(tl.int32) << 8)).to(tl.float32, bitcast=True)
    return p


@triton.jit
def _write_weight(
    p_base, e_base, at, left, p, threshold, P: tl.constexpr, ERROR: tl.constexpr, DITHER: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    if P.primitive_bitwidth != 16:
        _write(p_base, at, left, p, MASKED)
    elif ERROR:
        p, e = _split(p, threshold)
        _write(p_base, at, left, p, MASKED)
        _write(e_base, at, left, e, MASKED)
    elif DITHER:
        _write(p_base, at, left, _dithered(p, threshold), MASKED)
    else:
        _write(p_base, at, left, _nearest(p), MASKED)
