# Kernels build tuples of tiles by `+`, for they know no unpacking, and rebind a name with another number of them.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""Causal depthwise convolution + SiLU as Triton kernels. Maths: README.md beside this file.

A thread owns a few channels and walks along time with the last W − 1 inputs in registers, so that every input is
read once and converted once. A program is `_STRIPS` strips of time, side by side, × a block of channels; in backward
the strips' sums for dWeight and dBias meet in the program, the programs' in one sum of fixed order.

Loads are issued `STEP` tokens ahead of their use (the compiler may not move them over stores). Row strides reach the
kernels divided by their common power of two, `UNIT`, and are multiplied by it there: that tells the compiler the
alignment, and so the safe vector width, also where strides are no multiples of 16 (the only hint Triton has itself).

Where codes of x (`ops.quantize`) are read or written a block of channels is one group or two, so that a tile, one token
a strip, is whole groups with a scale each. They are read as words, one a thread: bytes would be taken apart and put
together again. A strip's own tokens are coded by it alone: those of its neighbours that it reads too are not.

Sums of two products are written as fused multiply-adds: left to itself the compiler rounds one of the two first, not
always the same one, and results from codes would not have the bits of results from what they stand for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eco_llm.ops.partials import sum_partials
from eco_llm.ops.quantize import reference as numbers
from eco_llm.ops.quantize.triton import GROUP, from_words, signed_keys, step_keys, store_scales, to_codes
from eco_llm.ops.rows import multiprocessors
from eco_llm.ops.sigmoid import sigmoid

_WARPS = 4
_STRIPS = 4
WORDS = tl.constexpr(32)  # of codes in a block of a row: one a thread
_STRIP_TOKENS = (8, 16, 24, 32, 48, 64)  # to choose from; multiples of every step
_STRIP_OVERHEAD = 8  # tokens that would take as long as what a strip costs besides its tokens: taps, neighbours, sums


class _Tuning(NamedTuple):
    """How a kernel uses a multiprocessor, with 4 taps and bfloat16 inputs."""

    channels: int  # a thread, at most
    step: int  # tokens loaded ahead
    resident: int  # programs that share a multiprocessor, as strips are chosen: what measured best


# Registers a thread, by ptxas for compute capability 9.0, and programs that they leave room for:
#     forward 72, 7; of codes 72, 7; to 8 bits 96, 5; to 4 bits 72, 7
#     backward 96, 5, with one or two summands of dy's tail; 122, 4, with three; 124, 4, with eight; of codes 128, 4
# `resident` is that number in some rows and one off in others: it was not derived, strips were measured with it, on an
# H200. A multiprocessor there needs some 25 kB in flight for full bandwidth; 7 programs forward keep 28 kB, 5 backward
# 40 kB. Issue slots come next: 15 instructions a channel and token forward, 31 to 35 backward. Four channels a thread
# would be the cheaper backward, but take 162 registers.
_FORWARD = _Tuning(channels=4, step=4, resident=7)
_BACKWARD = _Tuning(channels=2, step=8, resident=5)
_FORWARD_CODED = _Tuning(channels=4, step=4, resident=6)
# 32 instructions a channel and token; 8 tokens ahead of 4 bits, whose stores are narrower, gain nothing.
_FORWARD_TO_CODES = {8: _Tuning(channels=4, step=8, resident=5), 4: _Tuning(channels=4, step=4, resident=6)}


@triton.jit
def _silu_input(window, x_t, weights, bias, W: tl.constexpr):
    """Σ_w weight[w] · x[t − W + 1 + w] + bias; `window` holds the W − 1 tokens before t."""
    pre = bias + weights[W - 1] * x_t
    for w in tl.static_range(W - 1):
        pre += weights[w] * window[w]
    return pre


@triton.jit
def _load_taps(weight, bias, columns, C, W: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr):
    """The W taps and the bias, each [STRIPS, COLUMNS] float32."""
    inside = columns < C
    weights = ()
    for w in tl.static_range(W):
        tap = tl.load(weight + columns * W + w, mask=inside, other=0.0)
        weights = weights + (tl.broadcast_to(tap[None, :], (STRIPS, COLUMNS)),)
    offset = tl.load(bias + columns, mask=inside, other=0.0)
    return weights, tl.broadcast_to(offset[None, :], (STRIPS, COLUMNS))


@triton.jit
def _load_rows(pointers, row_stride, inside, left, first, ROWS: tl.constexpr, slice_stride, SLICES: tl.constexpr):
    """Tokens first … first + ROWS − 1 after the strip's pointers, ROWS · SLICES tiles; 0 where `left` tokens end."""
    rows = ()
    for u in tl.static_range(ROWS):
        here = pointers + (first + u) * row_stride
        for s in tl.static_range(SLICES):
            rows = rows + (tl.load(here + s * slice_stride, mask=inside & (u < left), other=0.0),)
    return rows


@triton.jit
def _load_scales(pointers, row_stride, inside, left, first, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Scales of `_load_rows` of codes, [groups, 1] each; without BITS nothing."""
    if BITS:
        return _load_rows(pointers, row_stride, inside, left, first, ROWS, 0, 1)
    else:
        return ()


@triton.jit
def _input(
    tiles, scales, u: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr
):
    """Tile u of `_load_rows`, float32; of codes what `dequantize` makes of them in DTYPE."""
    if BITS:
        return _decoded(tiles[u], scales[u], STRIPS, COLUMNS, BITS, DTYPE)
    else:
        return tiles[u].to(tl.float32)


@triton.jit
def _decoded(words, scale_bits, STRIPS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    LARGEST: tl.constexpr = 3.4028234663852886e38 if tl.float32 == DTYPE else 3.3895313892515355e38
    GROUPS: tl.constexpr = STRIPS * COLUMNS // GROUP
    tile = from_words(words, scale_bits, GROUPS, BITS, COLUMNS // WORDS, DTYPE, LARGEST).to(tl.float32)
    return tl.reshape(tile, (STRIPS, COLUMNS))


@triton.jit
def _load_window(
    pointers, row_stride, scales, scale_stride, inside, start, T,
    W: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The W − 1 tokens before the strip, float32; 0 before the first."""
    window = ()
    for u in tl.static_range(W - 1):
        t = start + (u + 1 - W)
        there = (t >= 0) & (t < T)
        tile = tl.load(pointers + (u + 1 - W) * row_stride, mask=inside & there, other=0)
        if BITS:
            scale = tl.load(scales + (u + 1 - W) * scale_stride, mask=inside & there, other=0)
            window = window + (_decoded(tile, scale, STRIPS, COLUMNS, BITS, DTYPE),)
        else:
            window = window + (tile.to(tl.float32),)
    return window


@triton.jit
def _groups_of(block, first_strip, strip, STRIPS: tl.constexpr, COLUMNS: tl.constexpr):
    """(group, first token), [STRIPS · COLUMNS / GROUP, 1], of the groups that a tile of a block of channels has."""
    OF_STRIP: tl.constexpr = COLUMNS // GROUP
    each = tl.arange(0, STRIPS * OF_STRIP)[:, None]
    return block * OF_STRIP + each % OF_STRIP, (first_strip + each // OF_STRIP) * strip


@triton.jit
def _word_pointers(codes, scales, row, group, C, COLUMNS: tl.constexpr):
    """(codes, scales) of group `group` [n, 1] of rows [n, 1] of a [rows, C]; codes in words, as many as a thread has
    channels.
    """
    COUNT: tl.constexpr = COLUMNS // WORDS
    of_group = group * (GROUP // COUNT) + tl.arange(0, GROUP // COUNT)[None, :]
    return codes + row * (C // COUNT) + of_group, scales + row * (C // GROUP) + group


@triton.jit
def _code_pointers(codes, scales, row, group, C, BITS: tl.constexpr):
    """(codes, scales) of group `group`, one or one each, of rows [n, 1] of a [rows, C]."""
    BYTES: tl.constexpr = GROUP * BITS // 8
    groups = C // GROUP
    return (
        codes + row * (groups * BYTES) + (group * BYTES + tl.arange(0, BYTES)[None, :]),
        scales + row * groups + group,
    )


@triton.jit(do_not_specialize=["T", "strip", "blocks", "programs", "x_batch", "x_row", "key0", "key1"])
def conv_silu_forward_kernel(
    x, scales, weight, bias, y, T, C, strip, blocks, programs, x_batch, x_row,
    x_codes, x_scales, step, key0, key1,
    W: tl.constexpr, UNIT: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    BITS: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Programs of one stretch of time are neighbours, for they share memory pages. BITS: 0, or x is codes, and of the
    type of y; then scales are read. KEEP: 0, and the second line of arguments is not read; or what x is written in
    too, by `quantize`.
    """
    DTYPE: tl.constexpr = y.dtype.element_ty
    pid = tl.program_id(0)
    columns = (pid % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    batch = (pid // blocks // programs).to(tl.int64)
    start = ((pid // blocks % programs) * STRIPS + tl.arange(0, STRIPS)[:, None]) * strip
    inside = (columns < C)[None, :]
    known = inside
    begin = start  # of what is read of x
    scale_row = C // GROUP
    if BITS:
        group, begin = _groups_of(pid % blocks, pid // blocks % programs * STRIPS, strip, STRIPS, COLUMNS)
        x_pointers, s_pointers = _word_pointers(x, scales, batch * T + begin.to(tl.int64), group, C, COLUMNS)
        x_row = C // (COLUMNS // WORDS)
        known = group < scale_row
    else:
        x_row = x_row * UNIT
        x_pointers = x + batch * x_batch * UNIT + start.to(tl.int64) * x_row + columns[None, :]
        s_pointers = scales
    y_pointers = y + (batch * T + start.to(tl.int64)) * C + columns[None, :]
    if KEEP:
        key0, key1 = step_keys(step, key0, key1)
        GROUPS: tl.constexpr = STRIPS * COLUMNS // GROUP
        lane = tl.arange(0, GROUP // 4)[None, :]
        group, first = _groups_of(pid % blocks, pid // blocks % programs * STRIPS, strip, STRIPS, COLUMNS)
        row = batch * T + first.to(tl.int64)
        code_pointers, code_scales = _code_pointers(x_codes, x_scales, row, group, C, KEEP)
        quads = ((row * scale_row + group) * (GROUP // 4)).to(tl.uint32) + lane.to(tl.uint32)
        coded = tl.where(group < scale_row, tl.minimum(T - first, strip), 0)  # tokens to write codes of

    left = tl.minimum(T - start, strip)  # tokens still to compute
    unread = tl.minimum(T - begin, strip)
    ahead = _load_rows(x_pointers, x_row, known, unread, 0, STEP, 0, 1)
    s_ahead = _load_scales(s_pointers, scale_row, known, unread, 0, STEP, BITS)
    window = _load_window(x_pointers, x_row, s_pointers, scale_row, known, begin, T, W, STRIPS, COLUMNS, BITS, DTYPE)
    weights, offset = _load_taps(weight, bias, columns, C, W, STRIPS, COLUMNS)
    for i in range(0, strip, STEP):
        now, s_now = ahead, s_ahead
        unread -= STEP
        ahead = _load_rows(x_pointers, x_row, known, unread, i + STEP, STEP, 0, 1)
        s_ahead = _load_scales(s_pointers, scale_row, known, unread, i + STEP, STEP, BITS)
        for u in tl.static_range(STEP):
            x_t = _input(now, s_now, u, STRIPS, COLUMNS, BITS, DTYPE)
            pre = _silu_input(window, x_t, weights, offset, W)
            tl.store(y_pointers + (i + u) * C, (pre * sigmoid(pre)).to(y.dtype.element_ty), mask=inside & (u < left))
            if KEEP:
                of_token = quads + ((i + u) * (C // 4)).to(tl.uint32)
                tile = tl.reshape(x_t, (GROUPS, GROUP))
                packed, scale_bits = to_codes(tile, of_token, key0, key1, GROUPS, KEEP, SLOPE)
                tl.store(code_pointers + (i + u) * (C * KEEP // 8), packed, mask=i + u < coded)
                store_scales(code_scales, (i + u) * scale_row, scale_bits, i + u < coded, GROUP // 4)
            window = window[1:] + (x_t,)
        left -= STEP


@triton.jit
def _backward_step(x_t, dy_t, window, d_window, weights, offset, W: tl.constexpr):
    """Gradient of the pre-activation at t, and dx at t − W + 1."""
    pre = _silu_input(window, x_t, weights, offset, W)
    gate = sigmoid(pre)
    passed = dy_t * gate
    d_pre = tl.fma(passed, pre - pre * gate, passed)  # dy σ (1 + p (1 − σ))
    dx = weights[W - 1] * d_window[0]
    for w in tl.static_range(1, W - 1):
        dx = tl.fma(weights[W - 1 - w], d_window[w], dx)
    return d_pre, tl.fma(weights[0], d_pre, dx)


@triton.jit
def _add_slices(tiles, u: tl.constexpr, SLICES: tl.constexpr):
    total = tiles[u * SLICES].to(tl.float32)
    for s in tl.static_range(1, SLICES):
        total += tiles[u * SLICES + s].to(tl.float32)
    return total


@triton.jit
def _backward_columns(
    x_pointers, s_pointers, dy_pointers, dx_pointers, weight, bias, partial, start, columns, end_column, T, C, strip,
    x_row, scale_row, dy_row, dx_row, dy_slice,
    W: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, SLICES: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """dx of `strip` tokens from `start` on, and their share of dWeight and dBias, for one block of channels."""
    DTYPE: tl.constexpr = dx_pointers.dtype.element_ty
    inside = (columns < end_column)[None, :]
    known = inside
    if BITS:
        known = start >= 0  # blocks are whole groups
    # dx[t] needs the gradients of the pre-activation up to t + W − 1: the walk goes that far and stores W − 1 behind.
    left = tl.minimum(T - start, strip + (W - 1))  # tokens still to read
    unwritten = tl.minimum(T - start, strip)
    x_ahead = _load_rows(x_pointers, x_row, known, left, 0, STEP, 0, 1)
    s_ahead = _load_scales(s_pointers, scale_row, known, left, 0, STEP, BITS)
    dy_ahead = _load_rows(dy_pointers, dy_row, inside, left, 0, STEP, dy_slice, SLICES)
    window = _load_window(x_pointers, x_row, s_pointers, scale_row, known, start, T, W, STRIPS, COLUMNS, BITS, DTYPE)
    weights, offset = _load_taps(weight, bias, columns, end_column, W, STRIPS, COLUMNS)
    zero = tl.zeros((STRIPS, COLUMNS), tl.float32)
    d_window = ()  # gradients of the pre-activation at the W − 1 tokens before t
    d_weights = ()
    d_offset = zero
    for _ in tl.static_range(W - 1):
        d_window = d_window + (zero,)
    for _ in tl.static_range(W):
        d_weights = d_weights + (zero,)

    for i in range(0, strip, STEP):
        x_now, s_now, dy_now = x_ahead, s_ahead, dy_ahead
        left -= STEP
        x_ahead = _load_rows(x_pointers, x_row, known, left, i + STEP, STEP, 0, 1)
        s_ahead = _load_scales(s_pointers, scale_row, known, left, i + STEP, STEP, BITS)
        dy_ahead = _load_rows(dy_pointers, dy_row, inside, left, i + STEP, STEP, dy_slice, SLICES)
        for u in tl.static_range(STEP):
            x_t = _input(x_now, s_now, u, STRIPS, COLUMNS, BITS, DTYPE)
            d_pre, dx = _backward_step(x_t, _add_slices(dy_now, u, SLICES), window, d_window, weights, offset, W)
            kept = inside & (u - (W - 1) < unwritten)
            if u < W - 1:
                kept = kept & (i + u >= W - 1)
            tl.store(dx_pointers + (i + u - (W - 1)) * dx_row, dx.to(dx_pointers.dtype.element_ty), mask=kept)
            taken = window + (x_t,)
            summed = ()
            for w in tl.static_range(W):
                summed = summed + (d_weights[w] + d_pre * taken[w],)
            d_weights = summed
            d_offset += d_pre
            window = taken[1:]
            d_window = d_window[1:] + (d_pre,)
        unwritten -= STEP

    # The W − 1 tokens after the strip add to dx only: dWeight and dBias get them from the next strip.
    if W - 1 > STEP:
        x_ahead = x_ahead + _load_rows(x_pointers, x_row, known, left - STEP, strip + STEP, W - 1 - STEP, 0, 1)
        s_ahead = s_ahead + _load_scales(s_pointers, scale_row, known, left - STEP, strip + STEP, W - 1 - STEP, BITS)
        dy_ahead = dy_ahead + _load_rows(
            dy_pointers, dy_row, inside, left - STEP, strip + STEP, W - 1 - STEP, dy_slice, SLICES
        )
    for u in tl.static_range(W - 1):
        x_t = _input(x_ahead, s_ahead, u, STRIPS, COLUMNS, BITS, DTYPE)
        d_pre, dx = _backward_step(x_t, _add_slices(dy_ahead, u, SLICES), window, d_window, weights, offset, W)
        kept = inside & (u - (W - 1) < unwritten) & (strip + u >= W - 1)
        tl.store(dx_pointers + (strip + u - (W - 1)) * dx_row, dx.to(dx_pointers.dtype.element_ty), mask=kept)
        window = window[1:] + (x_t,)
        d_window = d_window[1:] + (d_pre,)

    for w in tl.static_range(W):
        tl.store(partial + columns * W + w, tl.sum(d_weights[w], axis=0), mask=columns < end_column)
    tl.store(partial + C * W + columns, tl.sum(d_offset, axis=0), mask=columns < end_column)


@triton.jit(
    do_not_specialize=[
        "T", "strip", "blocks", "head_blocks", "programs", "x_batch", "x_row",
        "head_batch", "head_row", "tail_slice", "tail_batch", "tail_row", "dx_batch", "dx_row",
    ]
)  # fmt: skip
def conv_silu_backward_kernel(
    x, scales, weight, bias, dy_head, dy_tail, dx, partials, T, C, C_head, strip, blocks, head_blocks, programs,
    x_batch, x_row, head_batch, head_row, tail_slice, tail_batch, tail_row, dx_batch, dx_row,
    W: tl.constexpr, UNIT: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_STEP: tl.constexpr, TAIL_STEP: tl.constexpr, SLICES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A block of channels lies in the head or in the tail of dy, never in both: each starts its own blocks.

    BITS: 0, or x is codes, and of the type of dx; then scales are read.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    row = pid // blocks
    batch = (row // programs).to(tl.int64)
    start = ((row % programs) * STRIPS + tl.arange(0, STRIPS)[:, None]) * strip
    far = start.to(tl.int64)
    scale_row = C // GROUP
    dx_row = dx_row * UNIT
    partial = partials + row.to(tl.int64) * (C * (W + 1))
    if BITS:
        # The groups of head and tail follow each other, as their blocks do.
        x_pointers, s_pointers = _word_pointers(x, scales, batch * T + far, block, C, COLUMNS)
        x_row = C // (COLUMNS // WORDS)
    else:
        x_row = x_row * UNIT
        channels = block * COLUMNS + tl.arange(0, COLUMNS)
        if block >= head_blocks:
            channels += C_head - head_blocks * COLUMNS
        x_pointers = x + batch * x_batch * UNIT + far * x_row + channels[None, :]
        s_pointers = scales
    dx_pointers = dx + batch * dx_batch * UNIT + far * dx_row
    if block < head_blocks:
        columns = block * COLUMNS + tl.arange(0, COLUMNS)
        dy_row = head_row * UNIT
        _backward_columns(
            x_pointers, s_pointers,
            dy_head + batch * head_batch * UNIT + far * dy_row + columns[None, :],
            dx_pointers + columns[None, :],
            weight, bias, partial, start, columns, C_head, T, C, strip, x_row, scale_row, dy_row, dx_row, 0,
            W, STRIPS, COLUMNS, HEAD_STEP, 1, BITS,
        )  # fmt: skip
    elif SLICES > 0:
        inner = (block - head_blocks) * COLUMNS + tl.arange(0, COLUMNS)
        columns = C_head + inner
        dy_row = tail_row * UNIT
        _backward_columns(
            x_pointers, s_pointers,
            dy_tail + batch * tail_batch * UNIT + far * dy_row + inner[None, :],
            dx_pointers + columns[None, :],
            weight, bias, partial, start, columns, C, T, C, strip, x_row, scale_row, dy_row, dx_row,
            tl.cast(tail_slice, tl.int64) * UNIT,
            W, STRIPS, COLUMNS, TAIL_STEP, SLICES, BITS,
        )  # fmt: skip


def _columns(taps: int, tuning: _Tuning) -> int:
    """Channels a program; fewer a thread where the registers for the taps would not suffice."""
    return 32 * min(tuning.channels, 4 if taps <= 4 else 2 if taps <= 8 else 1)


def _strip_tokens(batch: int, tokens: int, blocks: int, tuning: _Tuning, device: torch.device) -> int:
    """Tokens a strip: short ones where programs are few, for a walk is a chain of waits; long ones where they are many,
    for every strip reads its neighbours' tokens too.
    """

    few = 1  # interpreted, so that strips are long

    def time(strip: int) -> float:
        programs = batch * math.ceil(tokens / (_STRIPS * strip)) * blocks
        share = (
            math.ceil(programs / multiprocessors(device, few)) / tuning.resident
        )  # of a multiprocessor, by the busiest
        return max(share, 1.0) * (strip + _STRIP_OVERHEAD)

    return min(reversed(_STRIP_TOKENS), key=time)


def _unit(*strides: int) -> int:
    """The largest power of two, 8 at most, that divides all strides."""
    return math.gcd(8, *strides)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """All strides but the last, which must be 1. Those of axes of length 1 are 0: they are free, and may be odd."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError(f"need a last stride of 1, got strides {tensor.stride()}")
    shape, strides = tensor.shape[:-1], tensor.stride()[:-1]
    return tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    channels = x.shape[-1]
    if x.ndim != 3 or weight.shape[0] != channels or bias.shape != (channels,) or not 2 <= weight.shape[1] <= 16:
        raise ValueError(
            f"need x [B, T, C], weight [C, 2…16], bias [C], got {tuple(x.shape)}, {tuple(weight.shape)}, "
            f"{tuple(bias.shape)}"
        )
    if weight.dtype != torch.float32 or bias.dtype != torch.float32:
        raise ValueError(f"need weight and bias in float32, got {weight.dtype}, {bias.dtype}")
    if not (weight.is_contiguous() and bias.is_contiguous()):
        raise ValueError("need weight and bias contiguous")


_WORDS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


class Codes(NamedTuple):
    """x [B, T, C], C a multiple of 64, as `quantize` makes it.

    Codes begin at a multiple of 4 bytes of their storage, as tensors of their own do: they are read as words.
    """

    codes: Tensor
    scales: Tensor
    bits: int


def takes_codes(channels: int, taps: int) -> bool:
    """Whether the kernels read and write codes of x: a block of channels is one group or two then.

    More than 8 taps leave a thread registers for one channel (`_columns`), and a block is half a group.
    """
    return channels % numbers.GROUP == 0 and taps <= 8


def _coded(x: Tensor, codes: Codes | None, columns: int, taps: int, head: int = 0) -> tuple[Tensor, Tensor, int]:
    """(x or words of codes, scales, bits or 0), as kernels with blocks of `columns` take them; `head` channels come in
    blocks of their own.
    """
    if codes is None:
        return x, x, 0
    _check_groups(x, taps, head)
    numbers.check_bits(codes.bits)
    word = _WORDS[columns // WORDS.value * codes.bits]
    return codes.codes.view(word), codes.scales.view(torch.int16), codes.bits


def _check_groups(x: Tensor, taps: int, head: int = 0) -> None:
    if not takes_codes(x.shape[-1], taps) or head % numbers.GROUP:
        raise ValueError(f"need whole groups of {numbers.GROUP} channels and at most 8 taps for codes, got {x.shape}")


def conv_silu_forward(x: Tensor, weight: Tensor, bias: Tensor, codes: Codes | None = None) -> Tensor:
    """silu(causal depthwise convolution of x + bias).

    Args:
        x: [B, T, C], last stride 1, other strides free; float32 or bfloat16.
        codes: of x, which then only gives shape and type.
        weight: [C, W] float32 contiguous, 2 ≤ W ≤ 16; the last tap meets the token itself.
        bias: [C] float32.

    Returns:
        [B, T, C], contiguous, in the type of x.

    Raises:
        ValueError: shapes, types or strides that do not fit.
    """
    _check(x, weight, bias)
    taps, tuning = weight.shape[1], _FORWARD_CODED if codes else _FORWARD
    source, scales, bits = _coded(x, codes, _columns(taps, tuning), taps)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_forward(x, source, scales, weight, bias, y, tuning, *[y] * 3, 0, 0, BITS=bits, KEEP=0, SLOPE=0.0)
    return y


def conv_silu_forward_to_codes(
    x: Tensor, weight: Tensor, bias: Tensor, bits: int, step: Tensor, stream: int
) -> tuple[Tensor, Codes]:
    """`conv_silu_forward`, and what `quantize` makes of x, from one reading of it.

    Args:
        x, weight, bias: as in `conv_silu_forward`, where `takes_codes`; fewer than 2^34 elements.
        bits, step, stream: as in `eco_llm.ops.quantize.quantize`.

    Raises:
        ValueError: shapes, types, strides or bits that do not fit.
    """
    _check(x, weight, bias)
    _check_groups(x, weight.shape[1])
    codes = Codes(*numbers.empty_codes(x.numel(), bits, x), bits)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_forward(
        x, x, x, weight, bias, y, _FORWARD_TO_CODES[bits], codes.codes, codes.scales.view(torch.int16), step,
        *signed_keys(stream), BITS=0, KEEP=bits, SLOPE=numbers.slope(bits),
    )  # fmt: skip
    return y, codes


def _launch_forward(
    x: Tensor, source: Tensor, scales: Tensor, weight: Tensor, bias: Tensor, y: Tensor, tuning: _Tuning,
    *to_codes: Tensor | int, **constants: int | float,
) -> None:  # fmt: skip
    (batch, tokens, channels), taps = x.shape, weight.shape[1]
    columns = _columns(taps, tuning)
    blocks = triton.cdiv(channels, columns)
    strip = _strip_tokens(batch, tokens, blocks, tuning, x.device)
    programs = triton.cdiv(tokens, _STRIPS * strip)
    x_batch, x_row = _strides(x)
    unit = _unit(x_batch, x_row)
    if y.numel():
        conv_silu_forward_kernel[(batch * programs * blocks,)](
            source, scales, weight, bias, y, tokens, channels, strip, blocks, programs, x_batch // unit, x_row // unit,
            *to_codes, W=taps, UNIT=unit, STRIPS=_STRIPS, COLUMNS=columns, STEP=tuning.step,
            num_warps=_WARPS, num_stages=1, **constants,
        )  # fmt: skip


def conv_silu_backward_partials(
    x: Tensor, weight: Tensor, bias: Tensor, dy_head: Tensor, dy_tail: Tensor | None, out: Tensor,
    codes: Codes | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `conv_silu_forward`; the pre-activation is computed again from x. Deterministic.

    The gradient of the output comes in two parts along the channels, as the kernels of the state space model leave it.

    Args:
        x, weight, bias: as in `conv_silu_forward`.
        dy_head: [B, T, C1], last stride 1; any floating type.
        dy_tail: [S, B, T, C − C1] float32, last stride 1: S summands; None where C1 = C.
        out: [B, T, C], last stride 1, other strides free: dx is written into it, in its type. Must not overlap inputs.
        codes: of x, in the type of `out`; x then only gives its shape, and may be `out`.

    Returns:
        Summands of dweight [rows, C · W] and of dbias [rows, C], float32: views of one buffer, for `sum_partials`.

    Raises:
        ValueError: shapes, types or strides that do not fit.
    """
    _check(x, weight, bias)
    (batch, tokens, channels), taps = x.shape, weight.shape[1]
    head = dy_head.shape[-1]
    if dy_head.shape != (batch, tokens, head) or out.shape != x.shape:
        raise ValueError(f"need dy_head [B, T, C1], out {tuple(x.shape)}, got {dy_head.shape}, {out.shape}")
    slices = 0 if dy_tail is None else dy_tail.shape[0]
    if dy_tail is None:
        if head != channels:
            raise ValueError(f"dy_head has {head} of {channels} channels and there is no dy_tail")
        tail_strides: tuple[int, ...] = (0, 0, 0)
    else:
        if dy_tail.shape != (slices, batch, tokens, channels - head) or slices < 1 or dy_tail.dtype != torch.float32:
            raise ValueError(
                f"need dy_tail [S, {batch}, {tokens}, {channels - head}] float32, got {dy_tail.shape} {dy_tail.dtype}"
            )
        tail_strides = _strides(dy_tail)

    columns = _columns(taps, _BACKWARD)
    source, scales, bits = _coded(x, codes, columns, taps, head)
    head_blocks = triton.cdiv(head, columns)
    blocks = head_blocks + triton.cdiv(channels - head, columns)
    strip = _strip_tokens(batch, tokens, blocks, _BACKWARD, x.device)
    programs = triton.cdiv(tokens, _STRIPS * strip)
    strides = (*_strides(x), *_strides(dy_head), *tail_strides, *_strides(out))
    unit = _unit(*strides)
    partials = torch.empty((batch * programs, channels * (taps + 1)), dtype=torch.float32, device=x.device)
    if x.numel():
        conv_silu_backward_kernel[(batch * programs * blocks,)](
            source, scales, weight, bias, dy_head, dy_head if dy_tail is None else dy_tail, out, partials,
            tokens, channels, head, strip, blocks, head_blocks, programs, *(stride // unit for stride in strides),
            W=taps, UNIT=unit, STRIPS=_STRIPS, COLUMNS=columns,
            HEAD_STEP=_BACKWARD.step, TAIL_STEP=4 if slices <= 1 else 2 if slices <= 4 else 1, SLICES=slices,
            BITS=bits, num_warps=_WARPS, num_stages=1,
        )  # fmt: skip
    return partials[:, : channels * taps], partials[:, channels * taps :]


def conv_silu_backward(
    x: Tensor, weight: Tensor, bias: Tensor, dy_head: Tensor, dy_tail: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """`conv_silu_backward_partials`, summed: dweight [C, W] and dbias [C], float32, that share no memory."""
    dweight, dbias = sum_partials(*conv_silu_backward_partials(x, weight, bias, dy_head, dy_tail, out))
    return dweight.view(weight.shape), dbias
