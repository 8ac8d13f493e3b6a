# mypy: allow-untyped-defs
"""The passes over a tensor's elements: squares of gradients, norms, update.

A program walks one chunk of one tensor in tiles. Nothing of a tensor's size is ever written but the state itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eco_llm.optim.c3o_kernels.codes import (
    _bytes_there,
    _code,
    _kept,
    _part,
    _raised,
    _read_bytes,
    _read_scales,
    _scale_of,
    _twice_inverse,
    _write_rows,
)
from eco_llm.optim.c3o_kernels.plan import _summarise
from eco_llm.optim.c3o_kernels.rule import _advance, _advance_coded, _clipped, _direction, _quotient_beside
from eco_llm.optim.c3o_kernels.tiles import (
    HALF,
    P1,
    P2,
    QUARTER,
    _base,
    _dithered,
    _phase,
    _read,
    _read_weight,
    _thresholds,
    _write,
    _write_weight,
)


@triton.jit
def _where(chunks, turn, count, backwards):
    """(row of the chunk table, tensor, chunk within the tensor) of the `turn`th of `count` chunks."""
    at = tl.where(backwards != 0, count - 1 - turn, turn)
    return at, tl.load(chunks + 2 * at), tl.load(chunks + 2 * at + 1)


@triton.jit
def _some(turns, n_tensors, turn):
    """Whether some tensor has that turn; one load's latency, so that a pass with nothing to do ends at once."""
    LANES: tl.constexpr = 256
    found = tl.zeros([LANES], tl.int32)
    for at in range(0, n_tensors, LANES):
        i = at + tl.arange(0, LANES)
        found |= (tl.load(turns + i, mask=i < n_tensors, other=-1) == turn).to(tl.int32)
    return tl.max(found) != 0


@triton.jit
def _sum_in_any_order(x):
    """The sum of x >= 0, at most 4096 of them: the same bits for every order of addition, so for every layout.

    Adding 2^13 times a power of two P with P <= max x < 2 P, and taking it away again, leaves float64 multiples of
    2^-39 P, whose sums, below 2^13 P, have 52 bits: all are exact but the rounding to float32 at the end.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    top = (bits * 0 + tl.max(bits)).to(tl.float32, bitcast=True)
    rounder = tl.where(top < float("inf"), top, 0.0).to(tl.float64) * 8192.0
    return tl.sum((x.to(tl.float64) + rounder) - rounder).to(tl.float32)


@triton.jit(do_not_specialize=["n_tensors"])
def _address_kernel(source, grads, n_tensors, LANES: tl.constexpr):
    """grads[i] = source[i], which is host memory."""
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    tl.store(grads + i, tl.load(source + i, mask=i < n_tensors), mask=i < n_tensors)


@triton.jit(do_not_specialize=["first", "count", "grads", "n_tensors"])
def _squares_kernel(
    chunks, grads, tensors, turns, squares, first, count, n_tensors,
    G: tl.constexpr, EARLY: tl.constexpr, PACK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """squares[first + i] = sum of squares of chunk i of the gradients; 0 for a tensor without one. With EARLY, tensors
    that `_measure_kernel` measured in its first turn, which sums these too, are left out.
    """
    lanes = tl.arange(0, TILE // PACK)
    lanes = (lanes // 64) * (64 * PACK) + lanes % 64 if PACK > 1 else lanes
    end = count
    if EARLY:
        end = tl.where(_some(turns, n_tensors, 0), count, 0)
    for at in range(tl.program_id(0), end, tl.num_programs(0)):
        tensor, part = tl.load(chunks + 2 * (first + at)), tl.load(chunks + 2 * (first + at) + 1)
        wanted = tl.load(grads + tensor) != 0
        left_out = False
        if EARLY:
            left_out = tl.load(turns + tensor) == 1
            wanted = wanted & (not left_out)
        total = tl.zeros([TILE // PACK], tl.float32)
        if wanted:
            start = part.to(tl.int64) * CHUNK
            g_base = _base(grads, tensor, G, ALIGN) + start
            left = tl.minimum(tl.load(tensors + tensor * COLUMNS + 7) - start, CHUNK).to(tl.int32)
            full = left // TILE * TILE
            for begin in tl.range(0, full, TILE, loop_unroll_factor=4):
                for half in tl.static_range(PACK):
                    g = _read(g_base, begin + half * 64 + lanes, left, False)
                    total = tl.fma(g, g, total)
            if full < left:
                for half in tl.static_range(PACK):
                    g = _read(g_base, full + half * 64 + lanes, left, True)
                    total = tl.fma(g, g, total)
        if not left_out:
            tl.store(squares + first + at, _sum_in_any_order(total))


@triton.jit
def _streams(
    line, grad, start, most, P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BITS: tl.constexpr, ALIGN: tl.constexpr
):
    """Where a program reads of a tensor, from element `start` on: θ, its error bits, g, m, v (or codes of r and v); and
    how many elements there are, at most `most`.

    Less than 0 for a later share of a chunk that ends before it. Nothing is done then, for `left // TILE * TILE` rounds
    towards 0: it is at most 0, so there are no whole tiles, and not less than `left`, so there is no rest.
    """
    PACK: tl.constexpr = 8 // BITS if BITS else 1
    MOMENT: tl.constexpr = tl.uint8 if BITS else S
    p_base = _base(line, 0, P, ALIGN) + start
    e_base = _base(line, 10, tl.int8, 16) + start
    g_base = _base(grad, 0, G, ALIGN) + start
    m_base = _base(line, 1, MOMENT, 16) + start // PACK
    v_base = _base(line, 2, MOMENT, 16) + start // PACK
    return p_base, e_base, g_base, m_base, v_base, tl.minimum(tl.load(line + 7) - start, most).to(tl.int32)


@triton.jit
def _scales(line, start):
    """Where the scales of r and of v are, of the groups from element `start` on."""
    return _base(line, 8, tl.bfloat16, 16) + start // 64, _base(line, 9, tl.bfloat16, 16) + start // 64


@triton.jit
def _planned(row):
    """Factor, limit, w1, b2, w2, lead, gain, shift and decay of a tensor's row of the plan."""
    return (
        tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 12),
        tl.load(row + 5), tl.load(row + 6), tl.load(row + 7),
    )  # fmt: skip


@triton.jit
def _measure_tile(
    p_base, e_base, g_base, m_base, v_base, at, left, factor, limit, w1, b2, w2, lead, gain, shift, decay, g_sum,
    plain_sum, ERROR: tl.constexpr, CLAMP: tl.constexpr, NESTEROV: tl.constexpr, PLAIN: tl.constexpr,
    ADVANCE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """θ and d of one tile, `g_sum` with the squares of its gradients added as they are, and with PLAIN `plain_sum` with
    those of (1 - b1) u, u being the direction without Nesterov's look ahead; writes the advanced moments if ADVANCE.
    """
    g = _read(g_base, at, left, MASKED)
    g_sum = tl.fma(g, g, g_sum)
    g = _clipped(g, factor, limit, CLAMP)
    p = _read_weight(p_base, e_base, at, left, ERROR, MASKED)
    m, v = _advance(g, _read(m_base, at, left, MASKED), _read(v_base, at, left, MASKED), w1, b2, w2)
    if ADVANCE:
        _write(m_base, at, left, m, MASKED)
        _write(v_base, at, left, v, MASKED)
    S: tl.constexpr = m_base.dtype.element_ty
    if PLAIN:
        plain = _quotient_beside(m, v, gain, shift, S)
        plain_sum = tl.fma(plain, plain, plain_sum)
    return p, _direction(p, g, m, v, lead, gain, shift, decay, S, NESTEROV), g_sum, plain_sum


@triton.jit
def _measure_coded(
    p_base, e_base, g_base, m_base, v_base, r_low, v_low, r_high, v_high, begin, left, factor, limit, w1, b2, w2, lead,
    gain, shift, decay, g_sum, d_sum, p_sum, dot, BITS: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    ERROR: tl.constexpr, CLAMP: tl.constexpr, NESTEROV: tl.constexpr, SPHERE: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Adds g², d², θ² and, with SPHERE, θ d of the tile at `begin` to the sums, [rows, 64], for moments in codes."""
    PACK: tl.constexpr = 8 // BITS
    row, lane = tl.arange(0, TILE // (64 * PACK)), tl.arange(0, 64)[None, :]
    byte_rows = begin // (64 * PACK) + row
    bytes_at = byte_rows[:, None] * 64 + lane
    there = _bytes_there(byte_rows, lane, left, BITS)
    r_bytes = _read_bytes(m_base, bytes_at, there, MASKED)
    v_bytes = _read_bytes(v_base, bytes_at, there, MASKED)
    for half in tl.static_range(PACK):
        group = (byte_rows * PACK + half)[:, None]
        at = group * 64 + lane
        r_scale, v_scale = (r_high, v_high) if half else (r_low, v_low)
        g = _read(g_base, at, left, MASKED)
        g_sum = tl.fma(g, g, g_sum)
        g = _clipped(g, factor, limit, CLAMP)
        p = _read_weight(p_base, e_base, at, left, ERROR, MASKED)
        m, v = _advance_coded(
            g, _part(r_bytes, half, BITS), _part(v_bytes, half, BITS), r_scale, v_scale, w1, b2, w2, R, V, BITS
        )  # fmt: skip
        d = _direction(p, g, m, v, lead, gain, shift, decay, m_base.dtype.element_ty, NESTEROV)
        if MASKED:
            d = tl.where(at < left, d, 0.0)
        d_sum, p_sum = tl.fma(d, d, d_sum), tl.fma(p, p, p_sum)
        if SPHERE:
            dot = tl.fma(p, d, dot)
    return g_sum, d_sum, p_sum, dot


@triton.jit(
    do_not_specialize=["first", "count", "all_chunks", "n_tensors", "grads", "turn", "ticket", "backwards"]
)  # fmt: skip
def _measure_kernel(
    chunks, grads, tensors, plan, turns, control, tickets, partials, squares, first, count, all_chunks, n_tensors,
    turn, ticket, backwards,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    ERROR: tl.constexpr, CLAMP: tl.constexpr, NESTEROV: tl.constexpr, PLAIN: tl.constexpr, SPHERE: tl.constexpr,
    ADVANCE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """partials[i], partials[all_chunks + i] = |d|², |θ|² of chunk i, if its tensor is to be measured in this turn; with
    SPHERE, for some tensor of the step, partials[2 all_chunks + i] = <θ, d>; with PLAIN, for moments that are not
    codes, partials[3 all_chunks + i] = |(1 - b1) u|², u being the direction without Nesterov's look ahead.
    squares[i] as `_squares_kernel` has it.

    Programs take chunks as they get done with one: tickets[ticket], 0 at first, counts those beyond everyone's first.
    """
    some = _some(turns, n_tensors, turn)
    if tl.program_id(0) == 0:
        tl.store(control + 1 + turn, tl.where(some, 1.0, 0.0))
    if some:
        taken = tl.program_id(0)
        while taken < count:
            at, tensor, part = _where(chunks + 2 * first, taken, count, backwards)
            row = plan + tensor * PLAN
            if tl.load(turns + tensor) == turn:
                start = part.to(tl.int64) * CHUNK
                line = tensors + tensor * COLUMNS
                p_base, e_base, g_base, m_base, v_base, left = _streams(
                    line, grads + tensor, start, CHUNK, P, G, S, BITS, ALIGN
                )  # fmt: skip
                factor, limit, w1, b2, w2, lead, gain, shift, decay = _planned(row)
                full = left // TILE * TILE
                if BITS == 0:
                    lanes = tl.arange(0, TILE)
                    g_sum, d_sum = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
                    p_sum, dot = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
                    plain_sum = tl.zeros([TILE], tl.float32)
                    for begin in tl.range(0, full, TILE, num_stages=STAGES):
                        p, d, g_sum, plain_sum = _measure_tile(
                            p_base, e_base, g_base, m_base, v_base, begin + lanes, left, factor, limit, w1, b2, w2,
                            lead, gain, shift, decay, g_sum, plain_sum, ERROR, CLAMP, NESTEROV, PLAIN, ADVANCE, False,
                        )  # fmt: skip
                        d_sum, p_sum = tl.fma(d, d, d_sum), tl.fma(p, p, p_sum)
                        if SPHERE:
                            dot = tl.fma(p, d, dot)
                    if full < left:
                        p, d, g_sum, plain_sum = _measure_tile(
                            p_base, e_base, g_base, m_base, v_base, full + lanes, left, factor, limit, w1, b2, w2,
                            lead, gain, shift, decay, g_sum, plain_sum, ERROR, CLAMP, NESTEROV, PLAIN, ADVANCE, True,
                        )  # fmt: skip
                        d_sum, p_sum = tl.fma(d, d, d_sum), tl.fma(p, p, p_sum)
                        if SPHERE:
                            dot = tl.fma(p, d, dot)
                    if PLAIN:
                        tl.store(partials + 3 * all_chunks + first + at, tl.sum(plain_sum))
                else:
                    r_scales, v_scales = _scales(line, start)
                    rows: tl.constexpr = TILE // (64 * (8 // BITS))
                    g_sum, d_sum = tl.zeros([rows, 64], tl.float32), tl.zeros([rows, 64], tl.float32)
                    p_sum, dot = tl.zeros([rows, 64], tl.float32), tl.zeros([rows, 64], tl.float32)
                    r_low, v_low, r_high, v_high = _read_scales(r_scales, v_scales, 0, left, BITS, TILE)
                    for begin in tl.range(0, full, TILE, num_stages=STAGES):
                        ahead = _read_scales(r_scales, v_scales, begin + TILE, left, BITS, TILE)
                        g_sum, d_sum, p_sum, dot = _measure_coded(
                            p_base, e_base, g_base, m_base, v_base, r_low, v_low, r_high, v_high, begin, left, factor,
                            limit, w1, b2, w2, lead, gain, shift, decay, g_sum, d_sum, p_sum, dot, BITS, R, V, ERROR,
                            CLAMP, NESTEROV, SPHERE, TILE, False,
                        )  # fmt: skip
                        r_low, v_low, r_high, v_high = ahead
                    if full < left:
                        r_low, v_low, r_high, v_high = _read_scales(r_scales, v_scales, full, left, BITS, TILE)
                        g_sum, d_sum, p_sum, dot = _measure_coded(
                            p_base, e_base, g_base, m_base, v_base, r_low, v_low, r_high, v_high, full, left, factor,
                            limit, w1, b2, w2, lead, gain, shift, decay, g_sum, d_sum, p_sum, dot, BITS, R, V, ERROR,
                            CLAMP, NESTEROV, SPHERE, TILE, True,
                        )  # fmt: skip
                tl.store(squares + first + at, _sum_in_any_order(g_sum))
                tl.store(partials + first + at, tl.sum(d_sum))
                tl.store(partials + all_chunks + first + at, tl.sum(p_sum))
                if SPHERE:
                    tl.store(partials + 2 * all_chunks + first + at, tl.sum(dot))
            taken = tl.atomic_add(tickets + ticket, 1, sem="relaxed") + tl.num_programs(0)


@triton.jit
def _update_tile(
    p_base, e_base, g_base, m_base, v_base, begin, left, factor, limit, w1, b2, w2, lead, gain, shift, decay, size,
    phase, CLAMP: tl.constexpr, NESTEROV: tl.constexpr, P: tl.constexpr, S: tl.constexpr, ERROR: tl.constexpr,
    DITHER: tl.constexpr, ADVANCED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, TILE)
    at = begin + lanes
    p = _read_weight(p_base, e_base, at, left, ERROR, MASKED)
    m, v = _read(m_base, at, left, MASKED), _read(v_base, at, left, MASKED)
    g = 0.0  # ADVANCED is without Nesterov, which needs it
    if not ADVANCED:
        g = _clipped(_read(g_base, at, left, MASKED), factor, limit, CLAMP)
        m, v = _advance(g, m, v, w1, b2, w2)
        if S.primitive_bitwidth == 16:
            _write(m_base, at, left, _dithered(m, _thresholds(lanes, begin, phase, 0, P1, BLOCK)), MASKED)
            _write(v_base, at, left, _dithered(v, _thresholds(lanes, begin, phase, HALF, P1, BLOCK)), MASKED)
        else:
            _write(m_base, at, left, m, MASKED)
            _write(v_base, at, left, v, MASKED)
    p = tl.fma(-size, _direction(p, g, m, v, lead, gain, shift, decay, S, NESTEROV), p)
    threshold = _thresholds(lanes, begin, phase, QUARTER, P1, BLOCK)
    _write_weight(p_base, e_base, at, left, p, threshold, P, ERROR, DITHER, MASKED)


@triton.jit
def _update_coded(
    p_base, e_base, g_base, m_base, v_base, r_scales, v_scales, r_low, v_low, r_high, v_high, begin, left, factor,
    limit, w1, b2, w2, lead, gain, shift, decay, size, phase, ratio_phase, r_sum, BITS: tl.constexpr, R: tl.constexpr,
    V: tl.constexpr, R_SPAN: tl.constexpr, V_SPAN: tl.constexpr, CLAMP: tl.constexpr, NESTEROV: tl.constexpr,
    P: tl.constexpr, ERROR: tl.constexpr, DITHER: tl.constexpr, WATCH: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The tile at `begin` for moments in codes: `storage.code_moments` in registers. Adds r², as stored, if WATCH."""
    PACK: tl.constexpr = 8 // BITS
    # The largest threshold leaves 2^(7 - mantissa) units in the last place to the next code: of v 16 or more, of r as
    # few as 4, which rounding may use up; so r is held at its last code. Without a sign, so that NaN ends there too.
    LAST: tl.constexpr = 0x40000000 + (1 << (22 - R + BITS)) - 1
    row, lane = tl.arange(0, TILE // (64 * PACK)), tl.arange(0, 64)[None, :]
    byte_rows = begin // (64 * PACK) + row
    bytes_at = byte_rows[:, None] * 64 + lane
    there = _bytes_there(byte_rows, lane, left, BITS)
    r_bytes = _read_bytes(m_base, bytes_at, there, MASKED)
    v_bytes = _read_bytes(v_base, bytes_at, there, MASKED)
    new_r, new_v = tl.zeros_like(r_bytes), tl.zeros_like(v_bytes)
    for half in tl.static_range(PACK):
        group = (byte_rows * PACK + half)[:, None]
        has_group = group * 64 < left
        at = group * 64 + lane
        r_scale, v_scale = (r_high, v_high) if half else (r_low, v_low)
        g = _clipped(_read(g_base, at, left, MASKED), factor, limit, CLAMP)
        p = _read_weight(p_base, e_base, at, left, ERROR, MASKED)
        m, v = _advance_coded(
            g, _part(r_bytes, half, BITS), _part(v_bytes, half, BITS), r_scale, v_scale, w1, b2, w2, R, V, BITS
        )  # fmt: skip
        lanes = (row[:, None] * PACK + half) * 64 + lane
        threshold = _thresholds(lanes, begin, phase, QUARTER, P1, BLOCK)
        p = tl.fma(-size, _direction(p, g, m, v, lead, gain, shift, decay, m_base.dtype.element_ty, NESTEROV), p)
        _write_weight(p_base, e_base, at, left, p, threshold, P, ERROR, DITHER, MASKED)
        if MASKED:  # a group's scale must not see what is past the end
            m, v = tl.where(at < left, m, 0.0), tl.where(at < left, v, 0.0)

        # z of v = z scale, and r = m / sqrt(v as kept), in halves: 2 z has an exponent that is a power of two, under
        # which a code is bits of the pattern. Where scale is 0, so is all of r: v reads back as 0 in whole groups only.
        v_scale = _scale_of(v, 1.0, False, V_SPAN)
        v_raised = _raised(
            tl.maximum(v * _twice_inverse(v_scale), 2.0), _thresholds(lanes, begin, phase, HALF, P1, BLOCK), V
        )  # fmt: skip
        r = m * tl.rsqrt(_kept(v_raised, V))
        over = tl.where(v_scale > 0, tl.rsqrt(v_scale) * 1.41421356, 0.0)
        r_scale = _scale_of(r, over, True, R_SPAN)
        r_raised = _raised(
            tl.fma(tl.abs(r), _twice_inverse(r_scale) * over, 2.0),
            _thresholds(lanes, begin, ratio_phase, 0, P2, BLOCK), R,
        )  # fmt: skip
        r_raised = tl.minimum(r_raised.to(tl.uint32, bitcast=True), LAST).to(tl.int32, bitcast=True)
        if WATCH:
            kept = tl.fma(_kept(r_raised, R), r_scale * 0.5, -r_scale)
            r_sum = tl.fma(kept, kept, r_sum)
        new_r += _code(r_raised, r.to(tl.int32, bitcast=True) & -2147483648, R, BITS) << (half * BITS)
        new_v += _code(v_raised, 0, V, BITS) << (half * BITS)
        _write_rows(r_scales, group, r_scale, has_group, MASKED)
        _write_rows(v_scales, group, v_scale, has_group, MASKED)
    _write_rows(m_base, bytes_at, new_r.to(tl.uint8), there, MASKED)
    _write_rows(v_base, bytes_at, new_v.to(tl.uint8), there, MASKED)
    return r_sum


@triton.jit(
    do_not_specialize=["first", "count", "grads", "measured", "summaries", "n_tensors", "buckets", "clipped"]
)  # fmt: skip
def _update_kernel(
    chunks, grads, tensors, plan, control, partials, first, count, measured, stats, summary, summaries, n_tensors,
    buckets, clipped,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    R_SPAN: tl.constexpr, V_SPAN: tl.constexpr, ERROR: tl.constexpr, DITHER: tl.constexpr, WATCH: tl.constexpr,
    CLAMP: tl.constexpr, NESTEROV: tl.constexpr, ADVANCE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, SHARES: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr, PLAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """θ <- θ - lr scale d, and the moments where `_measure_kernel` has not advanced them.

    Starts where the last pass ended: at the end, if it was one over the gradients alone (`measured`) or the measuring
    one's first turn; at the start, if it was the second after either.

    Shares of a chunk are programs of their own: the fewer elements a program has, the less of the card waits for the
    last ones. With `summaries` 1 the first program writes the metrics instead, which are known: that costs no launch.

    WATCH, for codes: partials[first + i] = |r|² of chunk i as stored (`_stored_norm_kernel` ends it).
    """
    turn = tl.program_id(0) - summaries
    if turn < 0:
        _summarise(stats, control, summary, n_tensors, buckets, clipped)
    backwards = measured ^ (tl.load(control + 3) != 0.0).to(tl.int32)
    chunk, tensor, part = _where(chunks + 2 * first, tl.maximum(turn, 0) // SHARES, count, backwards)
    row = plan + tensor * PLAN
    mode = tl.where(turn < 0, 0.0, tl.load(row + 11))
    if mode != 0.0:
        SHARE: tl.constexpr = CHUNK // SHARES
        start = part.to(tl.int64) * CHUNK + (turn % SHARES) * SHARE
        line = tensors + tensor * COLUMNS
        p_base, e_base, g_base, m_base, v_base, left = _streams(
            line, grads + tensor, start, SHARE, P, G, S, BITS, ALIGN
        )  # fmt: skip
        factor, limit, w1, b2, w2, lead, gain, shift, decay = _planned(row)
        size, step = tl.load(row + 8), tl.load(row + 9)
        phase, ratio_phase = _phase(step, P2), _phase(step, P1)  # `rounding`'s streams
        full = left // TILE * TILE
        if BITS == 0:
            if ADVANCE and mode == 2.0:
                for begin in tl.range(0, full, TILE, num_stages=STAGES):
                    _update_tile(
                        p_base, e_base, g_base, m_base, v_base, begin, left, factor, limit, w1, b2, w2, lead, gain,
                        shift, decay, size, phase, CLAMP, NESTEROV, P, S, ERROR, DITHER, True, BLOCK, TILE, False,
                    )  # fmt: skip
                if full < left:
                    _update_tile(
                        p_base, e_base, g_base, m_base, v_base, full, left, factor, limit, w1, b2, w2, lead, gain,
                        shift, decay, size, phase, CLAMP, NESTEROV, P, S, ERROR, DITHER, True, BLOCK, TILE, True,
                    )  # fmt: skip
            else:
                for begin in tl.range(0, full, TILE, num_stages=STAGES):
                    _update_tile(
                        p_base, e_base, g_base, m_base, v_base, begin, left, factor, limit, w1, b2, w2, lead, gain,
                        shift, decay, size, phase, CLAMP, NESTEROV, P, S, ERROR, DITHER, False, BLOCK, TILE, False,
                    )  # fmt: skip
                if full < left:
                    _update_tile(
                        p_base, e_base, g_base, m_base, v_base, full, left, factor, limit, w1, b2, w2, lead, gain,
                        shift, decay, size, phase, CLAMP, NESTEROV, P, S, ERROR, DITHER, False, BLOCK, TILE, True,
                    )  # fmt: skip
        else:
            r_scales, v_scales = _scales(line, start)
            r_sum = tl.zeros([TILE // (64 * (8 // BITS)), 64], tl.float32)
            r_low, v_low, r_high, v_high = _read_scales(r_scales, v_scales, 0, left, BITS, TILE)
            for begin in tl.range(0, full, TILE, num_stages=STAGES):
                ahead = _read_scales(r_scales, v_scales, begin + TILE, left, BITS, TILE)
                r_sum = _update_coded(
                    p_base, e_base, g_base, m_base, v_base, r_scales, v_scales, r_low, v_low, r_high, v_high, begin,
                    left, factor, limit, w1, b2, w2, lead, gain, shift, decay, size, phase, ratio_phase, r_sum, BITS, R,
                    V, R_SPAN, V_SPAN, CLAMP, NESTEROV, P, ERROR, DITHER, WATCH, BLOCK, TILE, False,
                )  # fmt: skip
                r_low, v_low, r_high, v_high = ahead
            if full < left:
                r_low, v_low, r_high, v_high = _read_scales(r_scales, v_scales, full, left, BITS, TILE)
                r_sum = _update_coded(
                    p_base, e_base, g_base, m_base, v_base, r_scales, v_scales, r_low, v_low, r_high, v_high, full,
                    left, factor, limit, w1, b2, w2, lead, gain, shift, decay, size, phase, ratio_phase, r_sum, BITS, R,
                    V, R_SPAN, V_SPAN, CLAMP, NESTEROV, P, ERROR, DITHER, WATCH, BLOCK, TILE, True,
                )  # fmt: skip
            if WATCH:
                tl.store(partials + first + chunk, tl.sum(r_sum))
