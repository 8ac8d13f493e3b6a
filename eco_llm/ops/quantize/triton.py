"""The quantizers as Triton kernels: one launch each, every byte moved once. Maths: README.md beside this file.

A program owns 64 groups of 64 elements. Integer work is what could make a kernel slower than its bytes, so a random
number costs little of it: two wide products serve four elements, and their words another one each. Products and sums
are not contracted into multiply-adds: the reference in PyTorch ops has no such thing, and the bits are the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eco_llm.ops.quantize import reference as numbers

_GROUPS = 64  # a program; 32 elements a thread
_WARPS = 4
_MAX_LEADING = 3

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)
GROUP = tl.constexpr(numbers.GROUP)
FRACTION = tl.constexpr(numbers.FRACTION)
UNIT = tl.constexpr(numbers.UNIT)
MAGIC = tl.constexpr(numbers.MAGIC)
# What a sum of bits and a random number holds beside the code: MAGIC's own bits; less what a nibble is stored with.
SIGNED = tl.constexpr(numbers.MAGIC_BITS)
NIBBLE = tl.constexpr(numbers.MAGIC_BITS - (numbers.ZERO_NIBBLE << numbers.FRACTION))
LOW_BITS = tl.constexpr((1 << numbers.FRACTION) - 1)
HIGH_SHIFT = tl.constexpr(32 - numbers.FRACTION)
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
def _step_keys(step, key0, key1):
    """The stream's keys with the step mixed in."""
    s = tl.load(step).to(tl.int64)
    low, high = s.to(tl.uint32), (s >> 32).to(tl.uint32)
    key0 = _fold(_fold(low ^ key0.to(tl.uint32, bitcast=True), P2) ^ high, P3)
    key1 = _fold(_fold(low ^ key1.to(tl.uint32, bitcast=True), P2) ^ high, P3)
    return key0, key1


@triton.jit
def _lanes(GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """[GROUPS, WIDTH]: 0, 1, … in row-major order."""
    return tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _read(
    x, units, n1, n2, s0, s1, s2,
    GROUPS: tl.constexpr, ALIGN: tl.constexpr, STRIDE_ALIGN: tl.constexpr, LEADING: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """float32 [GROUPS, GROUP] of this program, 0 past the end. x has units · ALIGN elements: rows of WIDTH below
    LEADING axes, the inner ones of n1 and n2, with strides s0, s1, s2 in units of STRIDE_ALIGN; contiguous if 0.
    WHOLE: rows hold whole groups.
    """
    start = tl.program_id(0).to(tl.int64) * (GROUPS * GROUP)
    lanes = _lanes(GROUPS, GROUP)
    inside = lanes < units.to(tl.int64) * ALIGN - start
    if LEADING == 0:
        pointers = x + start + lanes
    else:
        first_row = start // WIDTH
        rest = (start - first_row * WIDTH).to(tl.int32)
        # Rows inside the tile count in 32 bits: a 64-bit division for every element would cost more than the loads.
        begin = lanes
        if WHOLE:
            begin = _lanes(GROUPS, 1) * GROUP
        further = (rest + begin) // WIDTH
        column = rest + lanes - further * WIDTH
        row = (first_row + further).to(tl.int32)
        if LEADING == 1:
            at = row.to(tl.int64) * s0
        elif LEADING == 2:
            outer = row // n1
            at = outer.to(tl.int64) * s0 + (row - outer * n1).to(tl.int64) * s1
        else:
            middle = row // n2
            outer = middle // n1
            at = outer.to(tl.int64) * s0 + (middle - outer * n1).to(tl.int64) * s1
            at += (row - middle * n2).to(tl.int64) * s2
        pointers = x + (at * STRIDE_ALIGN + column)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _scales(x, SLOPE: tl.constexpr):
    """int32 [GROUPS, 1], the bits of the scales as float32, whose lower 16 are 0; NaN for a group not finite."""
    # As integers, magnitudes sort as they do as numbers, and NaN comes last.
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    scale = tl.maximum(top.to(tl.float32, bitcast=True) * SLOPE, SMALLEST_SCALE)
    up = (scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    return tl.where(top < INFINITY_BITS, up, NAN_BITS)


@triton.jit
def _codes(x, scale, key0, key1, GROUPS: tl.constexpr, BIAS: tl.constexpr):
    """Codes, signed or as nibbles, as four int32 [GROUPS, GROUP / 4]: those of elements 0, 4, …; 1, 5, …; and so on.

    Meaningless, beyond the bits of a code too, where the scale is NaN.
    """
    first = (tl.program_id(0).to(tl.int64) * (GROUPS * GROUP // 4)).to(tl.uint32)
    quads = first + _lanes(GROUPS, GROUP // 4).to(tl.uint32)
    mixed = _fold(_fold(quads ^ key0, P0) ^ key1, P1)
    word0, word1 = _fold(mixed, P2), _fold(mixed, P3)
    inverse = tl.div_rn(tl.full(scale.shape, UNIT, tl.float32), scale)
    fixed = (x * inverse + MAGIC).to(tl.int32, bitcast=True)
    even, odd = tl.split(tl.reshape(fixed, (GROUPS, GROUP // 4, 2, 2)))
    fixed0, fixed2 = tl.split(even)
    fixed1, fixed3 = tl.split(odd)
    code0 = (fixed0 + (word0 & LOW_BITS).to(tl.int32) - BIAS) >> FRACTION
    code1 = (fixed1 + (word0 >> HIGH_SHIFT).to(tl.int32) - BIAS) >> FRACTION
    code2 = (fixed2 + (word1 & LOW_BITS).to(tl.int32) - BIAS) >> FRACTION
    code3 = (fixed3 + (word1 >> HIGH_SHIFT).to(tl.int32) - BIAS) >> FRACTION
    return code0, code1, code2, code3


@triton.jit
def _rounded(y, DTYPE: tl.constexpr, LARGEST: tl.constexpr):
    """y in DTYPE, to nearest, ties to even; within ±LARGEST, but NaN stays."""
    y = tl.clamp(y, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    if _INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter truncates
        b = y.to(tl.int32, bitcast=True)
        up = ((b + (0x7FFF + ((b >> 16) & 1))) & -65536).to(tl.float32, bitcast=True)
        y = tl.where(y != y, y, up)
    return y.to(DTYPE)


@triton.jit(do_not_specialize=["units", "key0", "key1", "n1", "n2", "s0", "s1", "s2"])
def quantize_kernel(
    x, codes, scales, step, key0, key1, units, n1, n2, s0, s1, s2,
    BITS: tl.constexpr, SLOPE: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr, LEADING: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """codes int8 or uint8; scales int16, the upper bits of float32 numbers."""
    key0, key1 = _step_keys(step, key0, key1)
    values = _read(x, units, n1, n2, s0, s1, s2, GROUPS, ALIGN, STRIDE_ALIGN, LEADING, WIDTH, WHOLE)
    scale_bits = _scales(values, SLOPE)
    scale = scale_bits.to(tl.float32, bitcast=True)
    program = tl.program_id(0).to(tl.int64)
    numel = units.to(tl.int64) * ALIGN
    if BITS == 8:
        code0, code1, code2, code3 = _codes(values, scale, key0, key1, GROUPS, SIGNED)
        even, odd = tl.join(code0.to(tl.int8), code2.to(tl.int8)), tl.join(code1.to(tl.int8), code3.to(tl.int8))
        packed = tl.reshape(tl.join(even, odd), (GROUPS, GROUP))
        lanes = _lanes(GROUPS, GROUP)
        start = program * (GROUPS * GROUP)
        tl.store(codes + start + lanes, packed, mask=lanes < numel - start)
    else:
        code0, code1, code2, code3 = _codes(values, scale, key0, key1, GROUPS, NIBBLE)
        low, high = (code0 & 15) | (code1 << 4), (code2 & 15) | (code3 << 4)
        packed = tl.reshape(tl.join(low.to(tl.uint8), high.to(tl.uint8)), (GROUPS, GROUP // 2))
        lanes = _lanes(GROUPS, GROUP // 2)
        start = program * (GROUPS * GROUP // 2)
        if ALIGN % 2 == 0:
            size = units.to(tl.int64) * (ALIGN // 2)
        else:
            size = (numel + 1) // 2
        tl.store(codes + start + lanes, packed, mask=lanes < size - start)
    group = tl.arange(0, GROUPS)[:, None]
    left = (numel + (GROUP - 1)) // GROUP - program * GROUPS
    tl.store(scales + program * GROUPS + group, (scale_bits >> 16).to(tl.int16), mask=group < left)


@triton.jit(do_not_specialize=["units"])
def dequantize_kernel(
    codes, scales, y, units, BITS: tl.constexpr, LARGEST: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    numel = units.to(tl.int64) * ALIGN
    group = tl.arange(0, GROUPS)[:, None]
    left = (numel + (GROUP - 1)) // GROUP - program * GROUPS
    scale = tl.load(scales + program * GROUPS + group, mask=group < left, other=0).to(tl.int32) << 16
    scale = scale.to(tl.float32, bitcast=True)
    start = program * (GROUPS * GROUP)
    lanes = _lanes(GROUPS, GROUP)
    if BITS == 8:
        code = tl.load(codes + start + lanes, mask=lanes < numel - start, other=0).to(tl.float32)
    else:
        half = _lanes(GROUPS, GROUP // 2)
        if ALIGN % 2 == 0:
            size = units.to(tl.int64) * (ALIGN // 2)
        else:
            size = (numel + 1) // 2
        pair = tl.load(codes + start // 2 + half, mask=half < size - start // 2, other=0).to(tl.int32)
        code = tl.reshape(tl.join((pair & 15) - ZERO_NIBBLE, (pair >> 4) - ZERO_NIBBLE), (GROUPS, GROUP)).to(tl.float32)
    tl.store(y + start + lanes, _rounded(code * scale, y.dtype.element_ty, LARGEST), mask=lanes < numel - start)


@triton.jit(do_not_specialize=["units", "key0", "key1", "n1", "n2", "s0", "s1", "s2"])
def error_kernel(
    x, partials, step, key0, key1, units, n1, n2, s0, s1, s2,
    SLOPE: tl.constexpr, LARGEST: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr, LEADING: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """partials float32 [2, programs]: this program's squared error and squares."""
    key0, key1 = _step_keys(step, key0, key1)
    values = _read(x, units, n1, n2, s0, s1, s2, GROUPS, ALIGN, STRIDE_ALIGN, LEADING, WIDTH, WHOLE)
    scale = _scales(values, SLOPE).to(tl.float32, bitcast=True)
    code0, code1, code2, code3 = _codes(values, scale, key0, key1, GROUPS, SIGNED)
    code = tl.reshape(tl.join(tl.join(code0, code2), tl.join(code1, code3)), (GROUPS, GROUP)).to(tl.float32)
    error = _rounded(code * scale, x.dtype.element_ty, LARGEST).to(tl.float32) - values
    program = tl.program_id(0)
    tl.store(partials + program, tl.sum(error * error))
    tl.store(partials + tl.num_programs(0) + program, tl.sum(values * values))


def _merged(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the fewest axes that visit x in row-major order."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes or [(1, 1)]


def _layout(x: Tensor) -> tuple[Tensor, list[int], dict[str, Any]]:
    """(x or a copy that `_read` can walk, its numbers, its constants)."""
    axes = _merged(x)
    if axes[-1][1] != 1 or len(axes) > _MAX_LEADING + 1 or x.numel() // axes[-1][0] >= 2**31:
        x = x.contiguous()
        axes = _merged(x)
    *leading, (width, _) = axes
    align = math.gcd(x.numel(), 16)  # of masks and strides: all that wide loads need to know
    stride_align = math.gcd(16, *(stride for _, stride in leading)) if leading else 1
    sizes = [size for size, _ in leading[1:]] + [1, 1]
    strides = [stride // stride_align for _, stride in leading] + [0, 0, 0]
    constants = {
        "GROUPS": _GROUPS,
        "ALIGN": align,
        "STRIDE_ALIGN": stride_align,
        "LEADING": len(leading),
        "WIDTH": width if leading else 0,
        "WHOLE": width % numbers.GROUP == 0,
    }
    return x, [x.numel() // align, *sizes[:2], *strides[:3]], constants


def _keys(stream: int) -> list[int]:
    """`stream_keys` as signed numbers, which the launcher passes in 32 bits."""
    return [key - (key >> 31 << 32) for key in numbers.stream_keys(stream)]


def _programs(numel: int) -> int:
    return triton.cdiv(numel, _GROUPS * numbers.GROUP)


def quantize_triton(x: Tensor, bits: int, step: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of `eco_llm.ops.quantize.quantize`."""
    n = x.numel()
    scales = torch.empty(-(-n // numbers.GROUP), dtype=torch.bfloat16, device=x.device)
    size, dtype = (n, torch.int8) if bits == 8 else (-(-n // 2), torch.uint8)
    codes = torch.empty(size, dtype=dtype, device=x.device)
    if n:
        x, layout, constants = _layout(x)
        quantize_kernel[(_programs(n),)](
            x, codes, scales.view(torch.int16), step, *_keys(stream), *layout,
            BITS=bits, SLOPE=numbers.slope(bits), **constants, num_warps=_WARPS, enable_fp_fusion=False,
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
        x, layout, constants = _layout(x)
        error_kernel[(_programs(n),)](
            x, partials, step, *_keys(stream), *layout, SLOPE=numbers.slope(bits),
            LARGEST=torch.finfo(x.dtype).max, **constants, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return partials.sum(dim=1)
