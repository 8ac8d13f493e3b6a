"""The quantizers as Triton kernels: one launch each, every byte moved once. Maths: README.md beside this file.

A program owns 64 groups of 64 elements. Integer work is what could make a kernel slower than its bytes, so a random
number costs little of it: two wide products serve four elements, and their words another one each. Products and sums
are not contracted into multiply-adds: the reference in PyTorch ops has no such thing, and the bits are the same.

Ops that quantize what they have in registers anyway take `step_keys`, `to_codes` and `store_scales` from here, those
that read codes `from_codes` or `from_words`, and `narrowed` to round results as `dequantize` rounds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from eco_llm.ops.quantize import reference as numbers

_GROUPS = 64  # a program; 32 elements a thread
_WARPS = 4

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)
GROUP = tl.constexpr(numbers.GROUP)
UNIT = tl.constexpr(numbers.UNIT)
MAGIC = tl.constexpr(numbers.MAGIC)
SMALLEST_SCALE = tl.constexpr(numbers.SMALLEST_SCALE)
NAN_BITS = tl.constexpr(numbers.NAN_BITS)
INFINITY_BITS = tl.constexpr(numbers.INFINITY_BITS)
ZERO_NIBBLE = tl.constexpr(numbers.ZERO_NIBBLE)
P0, P1, P2, P3 = (tl.constexpr(prime) for prime in numbers.PRIMES)


@triton.jit
def _fold(x, PRIME: tl.constexpr):
    """Both halves of the 64-bit product, one upon the other; uint32."""
    if _PTX:  # one instruction for the product, where the compiler takes two or three
        return tl.inline_asm_elementwise(
            """{
            .reg .b64 p;
            .reg .b32 l, h;
            mul.wide.u32 p, $1, $2;
            mov.b64 {l, h}, p;
            xor.b32 $0, l, h;
            }""",
            "=r,r,n",
            [x, PRIME],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.umulhi(x, PRIME) ^ (x * PRIME)


@triton.jit
def step_keys(step, key0, key1):
    """The stream's keys with the step mixed in."""
    s = tl.load(step).to(tl.int64)
    low, high = s.to(tl.uint32), (s >> 32).to(tl.uint32)
    key0 = _fold(_fold(low ^ key0.to(tl.uint32, bitcast=True), P2) ^ high, P3)
    key1 = _fold(_fold(low ^ key1.to(tl.uint32, bitcast=True), P2) ^ high, P3)
    return key0, key1


@triton.jit
def lanes_of(GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """[GROUPS, WIDTH]: 0, 1, … in row-major order."""
    return tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _read(x, units, GROUPS: tl.constexpr, ALIGN: tl.constexpr):
    """float32 [GROUPS, GROUP] of this program, 0 past the end. x has units · ALIGN elements."""
    start = tl.program_id(0).to(tl.int64) * (GROUPS * GROUP)
    lanes = lanes_of(GROUPS, GROUP)
    inside = lanes < units.to(tl.int64) * ALIGN - start
    return tl.load(x + start + lanes, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _read_rows(
    x, gap, units, GROUPS: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr, UNIT_OF_GAP: tl.constexpr
):
    """`_read` of rows of WIDTH groups with gap · UNIT_OF_GAP further elements between them."""
    start = tl.program_id(0).to(tl.int64) * GROUPS
    first_row = start // WIDTH
    here = tl.arange(0, GROUPS)[:, None]
    further = ((start - first_row * WIDTH).to(tl.int32) + here) // WIDTH
    gap = gap.to(tl.int64) * UNIT_OF_GAP
    inside = here * GROUP < units.to(tl.int64) * ALIGN - start * GROUP
    pointers = x + (start * GROUP + first_row * gap) + (here * GROUP + further * gap) + tl.arange(0, GROUP)[None, :]
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scales(x, SLOPE: tl.constexpr):
    """int32 [GROUPS, 1], the bits of the scales as float32, whose lower 16 are 0; NaN for a group not finite."""
    # As integers, magnitudes sort as they do as numbers, and NaN comes last.
    if _INTERPRETED:
        top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    else:  # one instruction a number: the sign costs none, and NaN stays
        top = tl.reduce(tl.abs(x), 1, _larger, keep_dims=True).to(tl.int32, bitcast=True)
    scale = tl.maximum(top.to(tl.float32, bitcast=True) * SLOPE, SMALLEST_SCALE)
    up = (scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    return tl.where((top & 0x7FFFFFFF) < INFINITY_BITS, up, NAN_BITS)


@triton.jit
def _quads(GROUPS: tl.constexpr):
    """uint32 [GROUPS, GROUP / 4]: a quarter of the indices of this program's elements 0, 4, …"""
    first = (tl.program_id(0).to(tl.int64) * (GROUPS * GROUP // 4)).to(tl.uint32)
    return first + lanes_of(GROUPS, GROUP // 4).to(tl.uint32)


@triton.jit
def _fixed_point(x, inverse):
    """x · inverse + MAGIC, rounded twice, whatever the kernel's other sums of products are contracted to."""
    if _PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 p;
            mul.rn.f32 p, $1, $2;
            add.rn.f32 $0, p, 0f4B400000;
            }""",
            "=f,f,f",
            [x, inverse],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return x * inverse + MAGIC


@triton.jit
def _sums(x, scale, quads, key0, key1, GROUPS: tl.constexpr):
    """Codes beside other bits, as four uint32 [GROUPS, GROUP / 4]: those of elements 0, 4, …; 1, 5, …; and so on.

    Bits 16 … 23 are the code + 128: 2 · fixed is 2 · MAGIC_BITS + 2 · v, and of a random word's half the lowest bit
    cannot carry into an even number. Meaningless where the scale is NaN.
    """
    mixed = _fold(_fold(quads ^ key0, P0) ^ key1, P1)
    word0, word1 = _fold(mixed, P2), _fold(mixed, P3)
    fixed = _fixed_point(x, _unit_over(scale)).to(tl.uint32, bitcast=True)
    even, odd = tl.split(tl.reshape(fixed * 2, (GROUPS, GROUP // 4, 2, 2)))
    fixed0, fixed2 = tl.split(even)
    fixed1, fixed3 = tl.split(odd)
    return fixed0 + (word0 & 0xFFFF), fixed1 + (word0 >> 16), fixed2 + (word1 & 0xFFFF), fixed3 + (word1 >> 16)


@triton.jit
def _third_bytes(sums):
    """int8: the third bytes of `_sums`, less 128."""
    if _PTX:  # four at once, by instructions that the compiler does not find
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 l, h;
            prmt.b32 l, $1, $2, 0x0062;
            prmt.b32 h, $3, $4, 0x0062;
            prmt.b32 l, l, h, 0x5410;
            xor.b32 $0, l, 0x80808080;
            }""",
            "=r,r,r,r,r",
            [sums],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return (((sums >> 16) & 0xFF) ^ 0x80).to(tl.int8)


@triton.jit
def _nibbles(even, odd):
    """uint8: from the third bytes of `_sums` of two neighbours, codes + 8, the first one in the lower half."""
    if _PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 e, o, h;
            prmt.b32 e, $1, $2, 0x0062;
            prmt.b32 h, $3, $4, 0x0062;
            prmt.b32 e, e, h, 0x5410;
            prmt.b32 o, $5, $6, 0x0062;
            prmt.b32 h, $7, $8, 0x0062;
            prmt.b32 o, o, h, 0x5410;
            shl.b32 o, o, 4;
            and.b32 e, e, 0x0F0F0F0F;
            and.b32 o, o, 0xF0F0F0F0;
            or.b32 e, e, o;
            xor.b32 $0, e, 0x88888888;
            }""",
            "=r,r,r,r,r,r,r,r,r",
            [even, odd],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        return ((((even >> 16) & 0xF) | ((odd >> 12) & 0xF0)) ^ 0x88).to(tl.uint8)


@triton.jit
def _unit_over(scale):
    """UNIT / scale, rounded to nearest, for what `_scales` gives.

    Such a scale has 8 significant bits, so one step of Newton's suffices: 1 − scale · r is exact, what is then left is
    2⁻⁴⁰ of the quotient at most, and none is nearer than 2⁻³³ to where rounding turns. A test does it for every scale.
    Neither scale nor inverse is denormal.
    """
    if _PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 r, n, e;
            rcp.approx.ftz.f32 r, $1;
            neg.f32 n, $1;
            fma.rn.f32 e, n, r, 0f3F800000;
            fma.rn.f32 r, r, e, r;
            mul.rn.f32 $0, r, $2;
            }""",
            "=f,f,f",
            [scale, UNIT],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.div_rn(tl.full(scale.shape, UNIT, tl.float32), scale)


@triton.jit
def to_codes(x, quads, key0, key1, GROUPS: tl.constexpr, BITS: tl.constexpr, SLOPE: tl.constexpr):
    """Quantize whole groups. Elsewhere than with NVIDIA's compiler, launch with `enable_fp_fusion=False`.

    Args:
        x: float32 [GROUPS, GROUP], groups of the tensor in row-major order, any of them.
        quads: uint32 [GROUPS, GROUP / 4], a quarter of the indices that elements 0, 4, … have in the tensor.
        key0, key1: by `step_keys`.
        GROUPS, BITS, SLOPE: groups; 8 or 4; `reference.slope(BITS)`.

    Returns:
        (int8 [GROUPS, GROUP] or uint8 [GROUPS, GROUP / 2], as they are stored; int16 [GROUPS, 1], the scales' bits).
    """
    scale_bits = _scales(x, SLOPE)
    scale = scale_bits.to(tl.float32, bitcast=True)
    sum0, sum1, sum2, sum3 = _sums(x, scale, quads, key0, key1, GROUPS)
    even, odd = tl.join(sum0, sum2), tl.join(sum1, sum3)
    if BITS == 8:
        packed = _third_bytes(tl.reshape(tl.join(even, odd), (GROUPS, GROUP)))
    else:
        packed = _nibbles(tl.reshape(even, (GROUPS, GROUP // 2)), tl.reshape(odd, (GROUPS, GROUP // 2)))
    return packed, (scale_bits >> 16).to(tl.int16)


@triton.jit
def store_scales(scales, groups, scale_bits, inside, LANES: tl.constexpr):
    """Store what `to_codes` returned as scales of `groups`, all but the first argument [GROUPS, 1].

    As rows of which the first number counts, one for each of the LANES threads that share a group: a column of them
    would change hands through shared memory, and so would rows that seem to follow each other in memory. LANES is 8
    where a thread has 8 channels of a group, 16 where it has 4; any other power of two costs that detour, no more.
    """
    lane = tl.arange(0, LANES)[None, :]
    repeated = tl.broadcast_to(scale_bits, (scale_bits.shape[0], LANES))
    first = tl.max_contiguous(scales + groups, [1, 1])
    tl.store(first + lane, repeated, mask=inside & (lane == 0))


@triton.jit
def from_codes(
    packed, scale_bits, GROUPS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, LARGEST: tl.constexpr
):
    """What `to_codes` returned, as DTYPE [GROUPS, GROUP]; LARGEST is the largest number of that type."""
    scale = (scale_bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if BITS == 8:
        code = _numbers_of_bytes(packed)
    else:
        even, odd = _numbers_of_nibbles(packed)
        code = tl.reshape(tl.join(even, odd), (GROUPS, GROUP))
    return rounded(code * scale, DTYPE, LARGEST)


# Four codes of a byte become float32. Each is the lower bits of 2²³ + code + 128, from which the rest is subtracted:
# `cvt` runs in the unit of exponentials and reciprocals, which kernels that read codes keep busy already.
_FOUR_BYTES = tl.constexpr(
    """{
    .reg .b32 v, a;
    xor.b32 v, $4, 0x80808080;
    prmt.b32 a, v, 0x4B000000, 0x7440;
    sub.rn.f32 $0, a, 0f4B000080;
    prmt.b32 a, v, 0x4B000000, 0x7441;
    sub.rn.f32 $1, a, 0f4B000080;
    prmt.b32 a, v, 0x4B000000, 0x7442;
    sub.rn.f32 $2, a, 0f4B000080;
    prmt.b32 a, v, 0x4B000000, 0x7443;
    sub.rn.f32 $3, a, 0f4B000080;
    }"""
)


@triton.jit
def _numbers_of_bytes(packed):
    """float32 of int8."""
    if _PTX:
        return tl.inline_asm_elementwise(
            _FOUR_BYTES,
            "=f,=f,=f,=f,r",
            [packed],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        return packed.to(tl.float32)


@triton.jit
def _numbers_of_nibbles(packed):
    """float32 of the lower and of the upper nibbles of uint8, less 8; as `_numbers_of_bytes`."""
    if _PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 v, w, a;
            and.b32 v, $8, 0x0F0F0F0F;
            shr.b32 w, $8, 4;
            and.b32 w, w, 0x0F0F0F0F;
            prmt.b32 a, v, 0x4B000000, 0x7440;
            sub.rn.f32 $0, a, 0f4B000008;
            prmt.b32 a, v, 0x4B000000, 0x7441;
            sub.rn.f32 $1, a, 0f4B000008;
            prmt.b32 a, v, 0x4B000000, 0x7442;
            sub.rn.f32 $2, a, 0f4B000008;
            prmt.b32 a, v, 0x4B000000, 0x7443;
            sub.rn.f32 $3, a, 0f4B000008;
            prmt.b32 a, w, 0x4B000000, 0x7440;
            sub.rn.f32 $4, a, 0f4B000008;
            prmt.b32 a, w, 0x4B000000, 0x7441;
            sub.rn.f32 $5, a, 0f4B000008;
            prmt.b32 a, w, 0x4B000000, 0x7442;
            sub.rn.f32 $6, a, 0f4B000008;
            prmt.b32 a, w, 0x4B000000, 0x7443;
            sub.rn.f32 $7, a, 0f4B000008;
            }""",
            "=f,=f,=f,=f,=f,=f,=f,=f,r",
            [packed],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        pair = packed.to(tl.int32)
        return ((pair & 15) - ZERO_NIBBLE).to(tl.float32), ((pair >> 4) - ZERO_NIBBLE).to(tl.float32)


@triton.jit
def from_words(
    words, scale_bits, GROUPS: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """`from_codes` of codes that are read COUNT at once, for kernels whose threads own 2 or 4 neighbours of a row.

    words: integers of COUNT · BITS bits, [GROUPS, GROUP / COUNT].
    """
    words = words.to(tl.int32)
    scale = (scale_bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if COUNT == 2:
        code0, code1 = _numbers_of_pair(words, BITS)
        code = tl.join(code0, code1)
    else:
        tl.static_assert(COUNT == 4)
        code0, code1, code2, code3 = _numbers_of_quad(words, BITS)
        code = tl.join(tl.join(code0, code2), tl.join(code1, code3))
    return rounded(tl.reshape(code, (GROUPS, GROUP)) * scale, DTYPE, LARGEST)


@triton.jit
def _numbers_of_pair(words, BITS: tl.constexpr):
    """As `_numbers_of_bytes`, of the two lowest codes of an int32."""
    if _PTX and BITS == 8:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 v, a;
            xor.b32 v, $2, 0x80808080;
            prmt.b32 a, v, 0x4B000000, 0x7440;
            sub.rn.f32 $0, a, 0f4B000080;
            prmt.b32 a, v, 0x4B000000, 0x7441;
            sub.rn.f32 $1, a, 0f4B000080;
            }""",
            "=f,=f,r",
            [words],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    elif _PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a;
            and.b32 a, $2, 15;
            or.b32 a, a, 0x4B000000;
            sub.rn.f32 $0, a, 0f4B000008;
            bfe.u32 a, $2, 4, 4;
            or.b32 a, a, 0x4B000000;
            sub.rn.f32 $1, a, 0f4B000008;
            }""",
            "=f,=f,r",
            [words],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return _number_of(words, 0, BITS), _number_of(words, 1, BITS)


@triton.jit
def _numbers_of_quad(words, BITS: tl.constexpr):
    """As `_numbers_of_bytes`, of the four lowest codes of an int32."""
    if _PTX and BITS == 8:
        return tl.inline_asm_elementwise(
            _FOUR_BYTES,
            "=f,=f,=f,=f,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    elif _PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 v, w, a;
            and.b32 v, $4, 0x0F0F0F0F;
            shr.b32 w, $4, 4;
            and.b32 w, w, 0x0F0F0F0F;
            prmt.b32 a, v, 0x4B000000, 0x7440;
            sub.rn.f32 $0, a, 0f4B000008;
            prmt.b32 a, w, 0x4B000000, 0x7440;
            sub.rn.f32 $1, a, 0f4B000008;
            prmt.b32 a, v, 0x4B000000, 0x7441;
            sub.rn.f32 $2, a, 0f4B000008;
            prmt.b32 a, w, 0x4B000000, 0x7441;
            sub.rn.f32 $3, a, 0f4B000008;
            }""",
            "=f,=f,=f,=f,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            _number_of(words, 0, BITS), _number_of(words, 1, BITS), _number_of(words, 2, BITS),
            _number_of(words, 3, BITS),
        )  # fmt: skip


@triton.jit
def _number_of(words, i: tl.constexpr, BITS: tl.constexpr):
    """Code i of int32 words."""
    if BITS == 8:
        code = ((words >> 8 * i) & 255 ^ 128) - 128
    else:
        code = ((words >> 4 * i) & 15) - ZERO_NIBBLE
    return code.to(tl.float32)


@triton.jit
def rounded(y, DTYPE: tl.constexpr, LARGEST: tl.constexpr):
    """y in DTYPE, to nearest, ties to even; within ±LARGEST, but NaN stays."""
    y = tl.clamp(y, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return narrowed(y, DTYPE)


@triton.jit
def narrowed(y, DTYPE: tl.constexpr):
    """float32 y in DTYPE, to nearest, ties to even."""
    if tl.bfloat16 != DTYPE:
        return y.to(DTYPE)
    elif _PTX:  # two at once: one alone is rounded in the unit of exponentials
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [y], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif _INTERPRETED:  # which truncates
        b = y.to(tl.int32, bitcast=True)
        up = ((b + (0x7FFF + ((b >> 16) & 1))) & -65536).to(tl.float32, bitcast=True)
        return tl.where(y != y, y, up).to(tl.bfloat16)
    else:
        return y.to(tl.bfloat16)


@triton.jit(do_not_specialize=["units", "key0", "key1", "gap"])
def quantize_kernel(
    x, codes, scales, step, key0, key1, units, gap,
    BITS: tl.constexpr, SLOPE: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr,
    UNIT_OF_GAP: tl.constexpr,
):  # fmt: skip
    """codes int8 or uint8; scales int16, the upper bits of float32 numbers. WIDTH: of `_read_rows`; 0 without gaps."""
    key0, key1 = step_keys(step, key0, key1)
    if WIDTH:
        values = _read_rows(x, gap, units, GROUPS, ALIGN, WIDTH, UNIT_OF_GAP)
    else:
        values = _read(x, units, GROUPS, ALIGN)
    program = tl.program_id(0).to(tl.int64)
    numel = units.to(tl.int64) * ALIGN
    packed, scale_bits = to_codes(values, _quads(GROUPS), key0, key1, GROUPS, BITS, SLOPE)
    if BITS == 8:
        lanes = lanes_of(GROUPS, GROUP)
        start = program * (GROUPS * GROUP)
        tl.store(codes + start + lanes, packed, mask=lanes < numel - start)
    else:
        lanes = lanes_of(GROUPS, GROUP // 2)
        start = program * (GROUPS * GROUP // 2)
        if ALIGN % 2 == 0:
            size = units.to(tl.int64) * (ALIGN // 2)
        else:
            size = (numel + 1) // 2
        tl.store(codes + start + lanes, packed, mask=lanes < size - start)
    group = tl.arange(0, GROUPS)[:, None]
    left = (numel + (GROUP - 1)) // GROUP - program * GROUPS
    # A column, not `store_scales`: its barrier comes once a program, and rows would take 8 more registers a thread.
    tl.store(scales + program * GROUPS + group, scale_bits, mask=group < left)


@triton.jit(do_not_specialize=["units"])
def dequantize_kernel(
    codes, scales, y, units, BITS: tl.constexpr, LARGEST: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    numel = units.to(tl.int64) * ALIGN
    group = tl.arange(0, GROUPS)[:, None]
    left = (numel + (GROUP - 1)) // GROUP - program * GROUPS
    scale_bits = tl.load(scales + program * GROUPS + group, mask=group < left, other=0)
    start = program * (GROUPS * GROUP)
    lanes = lanes_of(GROUPS, GROUP)
    if BITS == 8:
        packed = tl.load(codes + start + lanes, mask=lanes < numel - start, other=0)
    else:
        half = lanes_of(GROUPS, GROUP // 2)
        if ALIGN % 2 == 0:
            size = units.to(tl.int64) * (ALIGN // 2)
        else:
            size = (numel + 1) // 2
        packed = tl.load(codes + start // 2 + half, mask=half < size - start // 2, other=0)
    value = from_codes(packed, scale_bits, GROUPS, BITS, y.dtype.element_ty, LARGEST)
    tl.store(y + start + lanes, value, mask=lanes < numel - start)


@triton.jit(do_not_specialize=["units", "key0", "key1"])
def error_kernel(
    x, partials, step, key0, key1, units,
    SLOPE: tl.constexpr, LARGEST: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """partials float32 [2, programs]: this program's squared error and squares."""
    key0, key1 = step_keys(step, key0, key1)
    values = _read(x, units, GROUPS, ALIGN)
    scale = _scales(values, SLOPE).to(tl.float32, bitcast=True)
    sum0, sum1, sum2, sum3 = _sums(values, scale, _quads(GROUPS), key0, key1, GROUPS)
    sums = tl.reshape(tl.join(tl.join(sum0, sum2), tl.join(sum1, sum3)), (GROUPS, GROUP))
    code = _numbers_of_bytes(_third_bytes(sums))
    error = rounded(code * scale, x.dtype.element_ty, LARGEST).to(tl.float32) - values
    program = tl.program_id(0)
    tl.store(partials + program, tl.sum(error * error))
    tl.store(partials + tl.num_programs(0) + program, tl.sum(values * values))


def signed_keys(stream: int) -> list[int]:
    """`stream_keys` as signed numbers, which the launcher passes in 32 bits."""
    return [key - (key >> 31 << 32) for key in numbers.stream_keys(stream)]


def _programs(numel: int) -> int:
    return triton.cdiv(numel, _GROUPS * numbers.GROUP)


def _gap(x: Tensor) -> int | None:
    """Elements between rows of whole groups, if x [B, T, C] is a slice along C of a contiguous tensor; else None."""
    if x.ndim != 3 or x.is_contiguous() or x.shape[2] % numbers.GROUP or x.stride(2) != 1:
        return None
    if x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1):
        return None
    gap = x.stride(1) - x.shape[2]
    return gap if x.shape[1] > 1 and gap > 0 else None


def quantize_triton(x: Tensor, bits: int, step: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of `eco_llm.ops.quantize.quantize`."""
    n = x.numel()
    codes, scales = numbers.empty_codes(n, bits, x)
    if n:
        align = math.gcd(n, 16)  # all that wide loads need to know of the masks
        gap = _gap(x)
        x, width = (x.contiguous(), 0) if gap is None else (x, x.shape[-1] // numbers.GROUP)
        unit = math.gcd(gap or 16, 16)
        quantize_kernel[(_programs(n),)](
            x, codes, scales.view(torch.int16), step, *signed_keys(stream), n // align, (gap or 0) // unit,
            BITS=bits, SLOPE=numbers.slope(bits), GROUPS=_GROUPS, ALIGN=align, WIDTH=width, UNIT_OF_GAP=unit,
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales


def dequantize_triton(codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int) -> Tensor:
    """The result of `eco_llm.ops.quantize.dequantize`."""
    y = torch.empty(tuple(shape), dtype=dtype, device=codes.device)
    if n := y.numel():
        align = math.gcd(n, 16)
        dequantize_kernel[(_programs(n),)](
            codes, scales.view(torch.int16), y, n // align, BITS=bits, LARGEST=torch.finfo(dtype).max,
            GROUPS=_GROUPS, ALIGN=align, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def error_triton(x: Tensor, bits: int, step: Tensor, stream: int) -> Tensor:
    """float32 [2] of `eco_llm.ops.quantize.quantization_error`."""
    n = x.numel()
    partials = torch.empty(2, _programs(n), dtype=torch.float32, device=x.device)
    if n:
        align = math.gcd(n, 16)
        error_kernel[(_programs(n),)](
            x.contiguous(), partials, step, *signed_keys(stream), n // align, SLOPE=numbers.slope(bits),
            LARGEST=torch.finfo(x.dtype).max, GROUPS=_GROUPS, ALIGN=align, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return partials.sum(dim=1)
