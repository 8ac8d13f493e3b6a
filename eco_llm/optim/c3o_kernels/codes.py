# mypy: allow-untyped-defs
"""Moments in 8 or 4 bits: `storage.encode` and `decode` of tiles [rows, 64], a group of 64 elements a row.

A group's scale is a maximum along a row, in registers. With 4 bits a row of bytes holds two groups, handled one after
the other, and no tile is laid out anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eco_llm.optim.c3o_kernels.tiles import _shifted


@triton.jit
def _pattern(magnitude, MANTISSA: tl.constexpr):
    """z of a code, 1 for 0: one multiply-add of integers."""
    return (magnitude * (1 << (23 - MANTISSA)) + 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _ratio(code, scale, MANTISSA: tl.constexpr, BITS: tl.constexpr):
    """`storage.decode` of codes with a sign: int32 [rows, 64], scale float32 [rows, 1] >= 0.

    By the pattern of 2 z, whose exponent is a power of two: sign, code and exponent are disjoint bits.
    """
    top = code << (32 - BITS)
    kept: tl.constexpr = (((1 << (BITS - 1)) - 1) << (23 - MANTISSA)) - 2147483648
    twice = ((top >> (9 + MANTISSA - BITS)) & kept) | 0x40000000
    less = (scale.to(tl.int32, bitcast=True) | (~top & -2147483648)).to(tl.float32, bitcast=True)
    return tl.fma(twice.to(tl.float32, bitcast=True), scale * 0.5, less)


@triton.jit
def _scale_of(x, factor, SIGNED: tl.constexpr, SPAN: tl.constexpr):
    """The scales [rows, 1] of groups x · factor, x [rows, 64], factor [rows, 1] or a number, not negative: float32 that
    bfloat16 holds; see `storage.encode`.
    """
    bits = x.to(tl.int32, bitcast=True)  # a maximum of floats drops NaN
    if SIGNED:
        bits = bits & 0x7FFFFFFF
    bits = tl.max(bits, axis=1, keep_dims=True)
    top = bits.to(tl.float32, bitcast=True) * (factor * (1.0 / SPAN))
    bits = tl.minimum(top.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7FC00000)
    bits = (bits + 0xFFFF) & -65536
    return tl.where(bits < 0x00800000, 0, bits).to(tl.float32, bitcast=True)


@triton.jit
def _twice_inverse(scale):
    """2 / scale within a few units in the last place; 0 of 0."""
    root = tl.rsqrt(scale)
    return tl.where(scale > 0, root * root * 2.0, 0.0)


@triton.jit
def _raised(z, threshold, MANTISSA: tl.constexpr):
    """Pattern of z, 2 or more, with a threshold in the upper half of int32 added to what its code discards."""
    return z.to(tl.int32, bitcast=True) + _shifted(threshold, 9 + MANTISSA)


@triton.jit
def _kept(raised, MANTISSA: tl.constexpr):
    """What the code of `raised` is read back as."""
    return (raised & -(1 << (23 - MANTISSA))).to(tl.float32, bitcast=True)


@triton.jit
def _code(raised, sign, MANTISSA: tl.constexpr, BITS: tl.constexpr):
    """Code of a `_raised` pattern in BITS bits, `sign` (the top bit of an int32) on top of them."""
    return _shifted((raised << (9 + MANTISSA - BITS)) | sign, 32 - BITS)


@triton.jit
def _read_scales(r_scales, v_scales, begin, left, BITS: tl.constexpr, TILE: tl.constexpr):
    """Both scales, float32 [rows, 1], of the groups of the tile at `begin`: of the first in a row of bytes, and of the
    second, with 8 bits the same; 0 where there is no such group.

    Loops read them a tile ahead: they are too narrow for the copies that bring codes, gradients and weights.
    """
    PACK: tl.constexpr = 8 // BITS
    group = begin // 64 + tl.arange(0, TILE // (64 * PACK))[:, None] * PACK
    r_low = tl.load(r_scales + group, mask=group * 64 < left, other=0.0).to(tl.float32)
    v_low = tl.load(v_scales + group, mask=group * 64 < left, other=0.0).to(tl.float32)
    r_high, v_high = r_low, v_low
    if PACK == 2:
        r_high = tl.load(r_scales + group + 1, mask=group * 64 + 64 < left, other=0.0).to(tl.float32)
        v_high = tl.load(v_scales + group + 1, mask=group * 64 + 64 < left, other=0.0).to(tl.float32)
    return r_low, v_low, r_high, v_high


@triton.jit
def _read_bytes(base, at, there, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(base + at, mask=there, other=0).to(tl.int32)
    return tl.load(base + at).to(tl.int32)


@triton.jit
def _bytes_there(rows, lane, left, BITS: tl.constexpr):
    """Which bytes of codes belong to the tensor: with 4 bits all of its last pair of groups, with 8 one an element."""
    if BITS == 4:
        return ((rows * 128 < left)[:, None]) & (lane < 64)
    return rows[:, None] * 64 + lane < left


@triton.jit
def _part(bytes, half: tl.constexpr, BITS: tl.constexpr):
    """The codes of group `half` of a row of bytes."""
    if BITS == 8:
        return bytes
    return (bytes >> (half * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _write_rows(base, at, x, there, MASKED: tl.constexpr):
    x = x.to(base.dtype.element_ty)  # scales are values that bfloat16 holds
    if MASKED:
        tl.store(base + at, x, mask=there)
    else:
        tl.store(base + at, x)
