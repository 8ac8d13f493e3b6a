# mypy: allow-untyped-defs
"""C3O's Triton kernels: squares, plan, measure, trust, update, summary; launched by `c3o_triton`, where the tables are.

A program walks one chunk of one tensor in tiles. Moments come in two forms. Numbers (float32, bfloat16) are read and
written element by element. Codes (`storage`, 8 or 4 bits) are tiles [rows, 64], a group a row, so that a group's scale
is a maximum along a row in registers; with 4 bits a row of bytes holds two groups, handled one after the other, and no
tile is laid out anew. Nothing of a tensor's size is ever written but the state itself.

Every multiply-add is written as one and both passes over the moments use the same functions, so that all forms of the
update give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

P1, P2 = tl.constexpr((49471 - 65536) << 16), tl.constexpr((37345 - 65536) << 16)
"""`rounding`'s strides, in units of 2^-32 of a period: thresholds in the upper half of int32 need no remainder."""
QUARTER, HALF = tl.constexpr(1 << 30), tl.constexpr(-(1 << 31))
"""Of a period: where the sequences of the weight and of the second moment start."""
LEAST = tl.constexpr(1.1754944e-38)
"""The smallest normal float32."""
STAGES = tl.constexpr(3)
"""Tiles whose loads are under way while one is computed: with codes, whose arithmetic is long, a tenth of the time."""


@triton.jit
def _base(table, index, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The address in `table[index]` as a pointer."""
    return tl.multiple_of(tl.multiple_of(tl.load(table + index), ALIGN).to(tl.pointer_type(DTYPE)), ALIGN)


@triton.jit
def _floats(addresses, mask):
    """float32 values at a vector of addresses; 0 where masked."""
    return tl.load(addresses.to(tl.pointer_type(tl.float32)), mask=mask, other=0.0)


@triton.jit
def _store_floats(addresses, values, mask):
    tl.store(addresses.to(tl.pointer_type(tl.float32)), values.to(tl.float32), mask=mask)


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
def _root(v):
    """sqrt(v) within 2 units in the last place; 0 of what is subnormal."""
    return v * tl.rsqrt(tl.maximum(v, LEAST))


@triton.jit
def _quotient_fast(m, root, gain, shift):
    """`_quotient` within a few units in the last place: beside moments of 16 bits or fewer, arithmetic is a cost."""
    inverse = tl.rsqrt(tl.fma(root, gain, shift))
    return m * inverse * inverse


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
def _nearest(x):
    """bfloat16 by rounding to nearest, ties to even. Triton's interpreter truncates, so it is spelled out here."""
    b = x.to(tl.int32, bitcast=True)
    up = ((b + (0x7FFF + ((b >> 16) & 1))) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, up).to(tl.bfloat16)


@triton.jit
def _clipped(g, factor, limit, CLAMP: tl.constexpr):
    g = g * factor
    if CLAMP:  # comparisons with NaN are false: it stays
        g = tl.where(g > limit, limit, g)
        g = tl.where(g < -limit, -limit, g)
    return g


@triton.jit
def _advance(g, m, v, w1, b2, w2):
    return tl.fma(w1, g - m, m), tl.fma(w2 * g, g, b2 * v)


@triton.jit
def _advance_coded(
    g, r_code, v_code, r_scale, v_scale, w1, b2, w2, R: tl.constexpr, V: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """`_advance` of `storage.coded_moments`, with v at least LEAST, so that it has a root.

    Of a group's scales all that is one number is multiplied by row: sqrt(v) = sqrt(z) sqrt(scale), and z is never 0.
    """
    z = _pattern(v_code, V)
    m = _ratio(r_code, (1 - w1) * (r_scale * _root(v_scale)), R, BITS) * (z * tl.rsqrt(z))
    return tl.fma(w1, g, m), tl.fma(w2 * g, g, tl.fma(z, b2 * v_scale, LEAST))


@triton.jit
def _quotient(m, v, gain, shift):
    """m over its corrected root: u, if gain and shift are the plan's."""
    return tl.div_rn(m, tl.fma(tl.sqrt_rn(v), gain, shift))


@triton.jit
def _quotient_beside(m, v, gain, shift, S: tl.constexpr):
    """The quotient, as exact as it comes free beside moments stored as S: at 32 bits memory takes longer."""
    if S.primitive_bitwidth == 32:
        return _quotient(m, v, gain, shift)
    if S.primitive_bitwidth == 16:
        return _quotient_fast(m, _root(v), gain, shift)
    return _quotient_fast(m, v * tl.rsqrt(v), gain, shift)  # `_advance_coded` has none below LEAST


@triton.jit
def _direction(p, g, m, v, lead, gain, shift, decay, S: tl.constexpr, NESTEROV: tl.constexpr):
    """d = u + decay · p. Nesterov costs one multiply-add: what else it scales is in the plan's gain and shift."""
    if NESTEROV:
        m = tl.fma(lead, m, g)
    return tl.fma(decay, p, _quotient_beside(m, v, gain, shift, S))


@triton.jit
def _where(chunks, turn, count, backwards):
    """(row of the chunk table, tensor, chunk within the tensor) of the `turn`th of `count` chunks."""
    at = tl.where(backwards != 0, count - 1 - turn, turn)
    return at, tl.load(chunks + 2 * at), tl.load(chunks + 2 * at + 1)


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


@triton.jit(do_not_specialize=["first", "count", "grads"])
def _squares_kernel(
    chunks, grads, tensors, plan, control, squares, first, count,
    G: tl.constexpr, EARLY: tl.constexpr, PACK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    ALIGN: tl.constexpr, COLUMNS: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """squares[first + i] = sum of squares of chunk i of the gradients; 0 for a tensor without one. With EARLY, tensors
    that `_measure_kernel` measured in its first turn, which sums these too, are left out.
    """
    lanes = tl.arange(0, TILE // PACK)
    lanes = (lanes // 64) * (64 * PACK) + lanes % 64 if PACK > 1 else lanes
    end = count
    if EARLY:
        end = tl.where(tl.load(control + 4) != 0.0, count, 0)
    for at in range(tl.program_id(0), end, tl.num_programs(0)):
        tensor, part = tl.load(chunks + 2 * (first + at)), tl.load(chunks + 2 * (first + at) + 1)
        wanted = tl.load(grads + tensor) != 0
        left_out = False
        if EARLY:
            left_out = tl.load(plan + tensor * PLAN + 14) == 1.0
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


@triton.jit(
    do_not_specialize=[
        "n_chunks", "n_tensors", "known_norm", "loss", "found_inf", "grads", "norm_out", "applied_out", "clip_arena"
    ]
)  # fmt: skip
def _plan_kernel(
    squares, n_chunks, known_norm, loss, found_inf, arenas, lr_at, tensors, arena_of, grads, n_tensors,
    plan, stats, control, tickets, norm_out, applied_out, clip_arena,
    DRAFT: tl.constexpr, EARLY: tl.constexpr, PATIENCE: tl.constexpr, SKIPS: tl.constexpr, MEASURED: tl.constexpr,
    KNOWN: tl.constexpr, GUARD: tl.constexpr, FLAG: tl.constexpr, COLUMNS: tl.constexpr, ARENA_COLUMNS: tl.constexpr,
    PLAN: tl.constexpr, TICKETS: tl.constexpr, SLACK: tl.constexpr, LANES: tl.constexpr, SUM_LANES: tl.constexpr,
):  # fmt: skip
    """Everything about a step that is a scalar of the optimizer or of a tensor; see `c3o_triton`'s docstring.

    DRAFT: before the norm is known; the plan of a step that is taken, with the last one's norm. Changes nothing but the
    plan. EARLY: there was a draft. SKIPS: some tensor may skip.
    """
    norm = tl.zeros([], tl.float32)
    if DRAFT:
        norm = tl.load(control + 1)
    if MEASURED:
        sums = tl.zeros([SUM_LANES], tl.float64)
        for at in range(0, n_chunks, SUM_LANES):
            index = at + tl.arange(0, SUM_LANES)
            sums += tl.load(squares + index, mask=index < n_chunks, other=0.0).to(tl.float64)
        norm = tl.sqrt(tl.sum(sums)).to(tl.float32)
    if KNOWN:
        norm = tl.load(known_norm).to(tl.float32)
    refused = tl.zeros([1], tl.int32)
    if GUARD:
        value = tl.load(loss).to(tl.float32)
        finite = (tl.abs(norm) < float("inf")) & (tl.abs(value) < float("inf"))
        refused += tl.where(finite, 0, 1)
    if FLAG:
        refused += tl.where(tl.load(found_inf) == 0, 0, 1)
    refused = tl.sum(refused)
    if not DRAFT:
        tl.store(norm_out, norm)
        tl.store(applied_out, tl.where(refused == 0, 1, 0).to(tl.uint8))
        if refused == 0:
            clip = tl.load(arenas + clip_arena * ARENA_COLUMNS + 11).to(tl.float32)
            factor = clip / (norm + 1e-6)
            tl.store(control, tl.where((factor > 1) | (clip == 0), 1.0, factor))
            tl.store(control + 1, norm)

    to_measure, to_square = tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.int32)
    for at in range(0, n_tensors, LANES):
        i = at + tl.arange(0, LANES)
        inside = i < n_tensors
        has_grad = tl.load(grads + i, mask=inside, other=0) != 0
        live = has_grad & (refused == 0)
        row = tensors + i * COLUMNS
        arena = tl.load(arena_of + i, mask=inside, other=0)
        a = arenas + arena * ARENA_COLUMNS

        # A learning rate is rounded to float32 wherever it comes from, so that numbers and device values agree.
        lr_address = tl.load(lr_at + arena)
        lr = tl.load(a).to(tl.float32)
        lr = tl.where(lr_address != 0, _floats(lr_address, lr_address != 0), lr).to(tl.float64)
        b1, b2, eps, decay = tl.load(a + 1), tl.load(a + 2), tl.load(a + 5), tl.load(a + 6)
        radius, floor, drift, refresh = tl.load(a + 7), tl.load(a + 8), tl.load(a + 9), tl.load(a + 10)
        clip = tl.load(a + 11).to(tl.float32)
        factor = clip / (norm + 1e-6)
        factor = tl.where((factor > 1) | (clip == 0), 1.0, factor)  # NaN stays

        step_at = tl.load(row + 3, mask=inside, other=0)
        t = _floats(step_at, inside) + 1
        if not DRAFT:
            _store_floats(step_at, t, live)
        t64 = t.to(tl.float64)
        bias1, bias2 = 1 - tl.exp(t64 * tl.load(a + 3)), 1 - tl.exp(t64 * tl.load(a + 4))

        nesterov = tl.load(a + 18) != 0
        ahead = b1 * bias1 / ((1 - b1) + b1 * bias1)  # norm_skip.look_ahead
        trust = radius > 0
        skip = tl.zeros([LANES], tl.int32) != 0
        bound = tl.zeros([LANES], tl.float64)
        if SKIPS:
            # norm_skip.update_norm_bound and may_skip; credit is off on this path.
            may_skip = (tl.load(a + 15) != 0) & inside
            u_at = tl.load(row + 4, mask=inside, other=0)
            l_at = tl.load(row + 5, mask=inside, other=0)
            age_at = tl.load(row + 6, mask=inside, other=0)
            previous, known = _floats(u_at, may_skip).to(tl.float64), _floats(l_at, may_skip).to(tl.float64)
            age = _floats(age_at, may_skip)
            sqrt_n = tl.sqrt(tl.load(row + 7, mask=inside, other=0).to(tl.float64))
            slack_state, slack_param = tl.load(a + 13), tl.load(a + 14)
            shrink1 = tl.maximum((bias1 - (1 - b1)) / bias1, 0.0)
            rho = tl.sqrt(tl.maximum((bias2 - (1 - b2)) / bias2, 0.0))
            alpha = tl.where(t > 1, shrink1 / rho, 0.0)
            beta = (1 - b1) / bias1 * tl.sqrt(bias2 / (1 - b2))
            stored = (1 + slack_state) / tl.sqrt(1 - slack_state)
            bound = (alpha * (stored * previous) + beta * sqrt_n) * (1 + SLACK)
            applied = tl.where(nesterov, (ahead * bound + beta * sqrt_n) * (1 + SLACK), bound)
            room = (1 - drift) * radius - lr * decay
            skip = (lr * applied <= room * tl.maximum(known, floor * sqrt_n)) & (age <= refresh) & may_skip
            if not DRAFT:
                keep = tl.maximum(1 - lr * decay, 0.0)
                lower = tl.maximum(known * keep * (1 - SLACK) - lr * applied * (1 + SLACK), 0.0) * (1 - slack_param)
                _store_floats(u_at, bound, live & skip)
                _store_floats(l_at, lower, live & skip)
                _store_floats(age_at, age + 1, live & skip)

        out = plan + i * PLAN
        drafted = tl.load(out, mask=inside, other=1.0)
        tl.store(out, factor, mask=inside)
        tl.store(out + 1, tl.load(a + 12).to(tl.float32), mask=inside)
        tl.store(out + 2, (1 - b1).to(tl.float32), mask=inside)
        tl.store(out + 3, b2.to(tl.float32), mask=inside)
        tl.store(out + 4, (1 - b2).to(tl.float32), mask=inside)
        # u = m / (sqrt(v) gain + shift); Nesterov's (lead m + g) / (sqrt(v) gain + shift), both over 1 - b1.
        gain, over = bias1 / tl.sqrt(bias2), tl.where(nesterov, 1 - b1, 1.0)
        tl.store(out + 5, (gain / over).to(tl.float32), mask=inside)
        tl.store(out + 6, (eps * bias1 / over).to(tl.float32), mask=inside)
        tl.store(out + 12, (ahead / (1 - b1)).to(tl.float32), mask=inside)
        tl.store(out + 13, gain.to(tl.float32), mask=inside)
        # On a sphere u alone is measured; what θ is multiplied by then follows (`_trust_kernel`).
        sphere = tl.load(a + 17) > 0
        tl.store(out + 7, tl.where(sphere, 0.0, decay).to(tl.float32), mask=inside)
        tl.store(out + 8, lr.to(tl.float32), mask=inside)
        tl.store(out + 9, t, mask=inside)
        tl.store(out + 10, bound.to(tl.float32), mask=inside)
        measured = (trust & (skip == 0)) | sphere
        skipped = live & skip
        tl.store(out + 11, tl.where(live, tl.where(measured, 2.0, 1.0), 0.0), mask=inside)
        if DRAFT:
            expected = tl.load(out + 15, mask=inside, other=0.0) >= PATIENCE
            turn = tl.where(live & measured & (tl.load(a + 19) != 0) & expected, 1.0, 0.0)
            to_measure = tl.maximum(to_measure, tl.where(inside & (turn != 0), 1, 0))
            to_square = tl.maximum(to_square, tl.where(inside & (turn == 0), 1, 0))
        else:
            turn = tl.where(live & measured, 2.0, 0.0)
            if EARLY:
                change = factor / tl.where(inside, drafted, 1.0)
                early = tl.load(out + 14, mask=inside, other=0.0) == 1.0
                bounded = sphere | (tl.load(a + 15) != 0)  # their steps, or bounds, need the norms themselves
                same = (factor == 1.0) & (change == 1.0)
                turn = tl.where(early & live, tl.where(same, 0.0, tl.where(bounded, 2.0, 3.0)), turn)
                # K √n of docs/c3o.md, "Before the norm is known".
                most = (1 - b1) / bias1 * tl.sqrt(bias2 / (1 - b2)) * tl.where(nesterov, 1 + ahead, 1.0)
                most *= tl.sqrt(tl.load(row + 7, mask=inside, other=0).to(tl.float64))
                tl.store(out + 16, change, mask=inside)
                tl.store(out + 17, most.to(tl.float32), mask=inside)
            to_measure = tl.maximum(to_measure, tl.where(inside & (turn == 2.0), 1, 0))
        tl.store(out + 14, turn, mask=inside)
        if not DRAFT:
            # A skipped tensor keeps the ratio last measured; one that is measured is written by `_trust_kernel`.
            now = inside & (refused == 0)
            tl.store(stats + i * 4, tl.where(skipped, 1.0, 0.0), mask=now)
            tl.store(stats + i * 4 + 1, 0.0, mask=now)
            tl.store(stats + i * 4 + 2, 0.0, mask=now)
            tl.store(stats + i * 4 + 3, 0.0, mask=now & (skip == 0))
    if DRAFT:
        tl.store(control + 2, tl.max(to_measure).to(tl.float32))
        tl.store(control + 4, tl.max(to_square).to(tl.float32))
    else:
        tl.store(tickets + tl.arange(0, TICKETS), tl.zeros([TICKETS], tl.int32))
        tl.store(control + 3, tl.max(to_measure).to(tl.float32))


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


@triton.jit(do_not_specialize=["first", "count", "all_chunks", "grads", "turn", "ticket", "backwards"])
def _measure_kernel(
    chunks, grads, tensors, plan, control, tickets, partials, squares, first, count, all_chunks, turn, ticket,
    backwards,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    ERROR: tl.constexpr, CLAMP: tl.constexpr, NESTEROV: tl.constexpr, PLAIN: tl.constexpr, SPHERE: tl.constexpr,
    ADVANCE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """partials[i], partials[all_chunks + i] = |d|², |θ|² of chunk i, if its tensor is to be measured in this turn; with
    SPHERE, for some tensor of the step, partials[2 all_chunks + i] = <θ, d>; with PLAIN, for moments that are not
    codes, partials[3 all_chunks + i] = |(1 - b1) u|², u being the direction without Nesterov's look ahead.
    squares[i] as `_squares_kernel` has it.

    Programs take chunks as they get done with one: tickets[ticket], 0 at first, counts those beyond everyone's first.
    """
    if tl.load(control + 1 + turn) != 0.0:
        taken = tl.program_id(0)
        while taken < count:
            at, tensor, part = _where(chunks + 2 * first, taken, count, backwards)
            row = plan + tensor * PLAN
            if tl.load(row + 14) == turn:
                start = part.to(tl.int64) * CHUNK
                line = tensor * COLUMNS
                p_base = _base(tensors, line, P, ALIGN) + start
                e_base = _base(tensors, line + 10, tl.int8, 16) + start
                g_base = _base(grads, tensor, G, ALIGN) + start
                left = tl.minimum(tl.load(tensors + line + 7) - start, CHUNK).to(tl.int32)
                factor, limit, w1, b2 = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
                w2, lead, gain = tl.load(row + 4), tl.load(row + 12), tl.load(row + 5)
                shift, decay = tl.load(row + 6), tl.load(row + 7)
                full = left // TILE * TILE
                if BITS == 0:
                    m_base = _base(tensors, line + 1, S, 16) + start
                    v_base = _base(tensors, line + 2, S, 16) + start
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
                    m_base = _base(tensors, line + 1, tl.uint8, 16) + start // (8 // BITS)
                    v_base = _base(tensors, line + 2, tl.uint8, 16) + start // (8 // BITS)
                    r_scales = _base(tensors, line + 8, tl.bfloat16, 16) + start // 64
                    v_scales = _base(tensors, line + 9, tl.bfloat16, 16) + start // 64
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
def _total(partials, first, count, LANES: tl.constexpr):
    """float64 sum of `count` partial sums from `first` on."""
    total = tl.zeros([LANES], tl.float64)
    for at in range(0, count, LANES):
        k = at + tl.arange(0, LANES)
        total += tl.load(partials + first + k, mask=k < count, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _stays_idle(d_norm, p_norm, lr, sqrt_n, row, a):
    """Whether the cap is idle with this step's clip factor and with the one that was expected, whichever of the two d
    was measured with: docs/c3o.md, "Before the norm is known".
    """
    change, most = tl.load(row + 16).to(tl.float64), tl.load(row + 17).to(tl.float64)
    decay = tl.load(a + 6)
    least = tl.minimum(change, 1 / change)
    # 1e-5: where the direction's terms cancel, rounding is a share of K and not of u.
    u_norm = (d_norm + decay * p_norm + (1 / least - 1 + 1e-5) * most) / least
    limit = tl.load(a + 7) * tl.maximum(p_norm, tl.load(a + 8) * sqrt_n)
    return lr * (u_norm + decay * p_norm) * (1 + 1e-4) <= limit  # 1e-4: arithmetic, with room; NaN is False


@triton.jit(do_not_specialize=["all_chunks"])
def _check_kernel(
    partials, all_chunks, arenas, tensors, arena_of, span, plan, control,
    COLUMNS: tl.constexpr, ARENA_COLUMNS: tl.constexpr, PLAN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Whether one tensor that was measured with another clip factor than this step's is to be measured again."""
    i = tl.program_id(0)
    row = plan + i * PLAN
    if tl.load(row + 14) == 3.0:
        first, count = tl.load(span + 2 * i), tl.load(span + 2 * i + 1)
        d_norm = tl.sqrt(_total(partials, first, count, LANES))
        p_norm = tl.sqrt(_total(partials + all_chunks, first, count, LANES))
        a = arenas + tl.load(arena_of + i) * ARENA_COLUMNS
        sqrt_n = tl.sqrt(tl.load(tensors + i * COLUMNS + 7).to(tl.float64))
        idle = _stays_idle(d_norm, p_norm, tl.load(row + 8).to(tl.float64), sqrt_n, row, a)
        tl.store(row + 14, tl.where(idle, 0.0, 2.0))
        if not idle:
            tl.store(control + 3, 1.0)


@triton.jit(do_not_specialize=["all_chunks"])
def _trust_kernel(
    partials, all_chunks, arenas, tensors, arena_of, span, plan, stats,
    EARLY: tl.constexpr, PATIENCE: tl.constexpr, SPHERE: tl.constexpr, PLAIN: tl.constexpr, COLUMNS: tl.constexpr,
    ARENA_COLUMNS: tl.constexpr, PLAN: tl.constexpr, SLACK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The cap of one measured tensor: lr · scale, statistics, and the bounds that its norms give; or its step on the
    sphere (`c3o_foreach._onto_sphere`, of which this is the float64 twin).
    """
    i = tl.program_id(0)
    row = plan + i * PLAN
    if tl.load(row + 11) == 2.0:
        first, count = tl.load(span + 2 * i), tl.load(span + 2 * i + 1)
        d_square = _total(partials, first, count, LANES)
        p_square = _total(partials + all_chunks, first, count, LANES)
        p_norm = tl.sqrt(p_square)
        a = arenas + tl.load(arena_of + i) * ARENA_COLUMNS
        sphere, decay = tl.load(a + 17), tl.load(a + 6)
        u_square, dot = d_square, d_square
        if SPHERE:
            dot = _total(partials + 2 * all_chunks, first, count, LANES)
            # What was measured is u; d, for where the cap's rule holds, follows.
            with_decay = tl.maximum(u_square + decay * (2 * dot + decay * p_square), 0.0)
            d_square = tl.where(sphere > 0, with_decay, d_square)
        d_norm = tl.sqrt(d_square)
        tensor = tensors + i * COLUMNS
        lr = tl.load(row + 8).to(tl.float64)
        sqrt_n = tl.sqrt(tl.load(tensor + 7).to(tl.float64))
        weight = tl.maximum(p_norm, tl.load(a + 8) * sqrt_n)
        limit, delta = tl.load(a + 7) * weight, lr * d_norm
        binds = (delta > limit) & (tl.load(a + 7) > 0)
        scale = tl.where(binds, limit / tl.where(binds, delta, 1.0), 1.0)
        size = lr * scale
        if EARLY:  # would a guess have been right?
            bounded = (sphere > 0) | (tl.load(a + 15) != 0)
            same = (tl.load(row) == 1.0) & (tl.load(row + 16) == 1.0)
            right = same | ((not bounded) & _stays_idle(d_norm, p_norm, lr, sqrt_n, row, a))
            tl.store(row + 15, tl.where(right, tl.minimum(tl.load(row + 15) + 1, PATIENCE), 0.0))
        ratio = tl.where(weight > 0, delta * scale / tl.where(weight > 0, weight, 1.0), 0.0)
        if SPHERE:
            radius_at = tl.load(tensor + 11)
            known = _floats(radius_at, sphere > 0).to(tl.float64)
            radius = tl.where(known < 0, p_norm, known)
            _store_floats(radius_at, radius, sphere > 0)
            share, u_norm = sphere * lr, tl.sqrt(u_square)
            on_sphere = (radius > 0) & (u_norm > 0) & (share > 0)
            r, u = tl.where(on_sphere, radius, 1.0), tl.where(on_sphere, u_norm, 1.0)
            now, along = p_norm / r, dot / u / r
            beyond = (now - 1) * (now + 1) - share * (2 * along - share)
            norm = tl.sqrt(1 + beyond)
            step = share * (r / u) / norm
            shrink = beyond / (norm * (norm + 1)) / tl.where(on_sphere, step, 1.0)
            tl.store(row + 7, tl.where(on_sphere, shrink, decay).to(tl.float32))
            size, ratio = tl.where(on_sphere, step, size), tl.where(on_sphere, share, ratio)
            scale = tl.where(on_sphere, 1.0, scale)
        tl.store(row + 8, size.to(tl.float32))
        tl.store(stats + 4 * i, 0.0)
        tl.store(stats + 4 * i + 1, 1.0)
        tl.store(stats + 4 * i + 2, tl.where(scale < 1, 1.0, 0.0))
        tl.store(stats + 4 * i + 3, ratio.to(tl.float32))
        if tl.load(a + 15) != 0:
            bound = tl.load(row + 10).to(tl.float64)
            measured = d_norm + tl.load(a + 6) * p_norm
            if PLAIN:  # with codes `_stored_norm_kernel` has the last word
                plain = tl.sqrt(_total(partials + 3 * all_chunks, first, count, LANES)) / (1 - tl.load(a + 1))
                measured = tl.where(tl.load(a + 18) != 0, plain, measured)
            measured *= 1 + SLACK
            lower = p_norm * (1 - SLACK) - lr * scale * d_norm * (1 + SLACK)
            # Not `bound < measured` alone: an unknown history times α = 0 is NaN.
            _store_floats(tl.load(tensor + 4), tl.where(bound < measured, bound, measured), True)
            _store_floats(tl.load(tensor + 5), tl.maximum(lower, 0.0) * (1 - tl.load(a + 14)), True)
            _store_floats(tl.load(tensor + 6), 1.0 + 0.0 * lr, True)


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


@triton.jit
def _write_rows(base, at, x, there, MASKED: tl.constexpr):
    x = x.to(base.dtype.element_ty)  # scales are values that bfloat16 holds
    if MASKED:
        tl.store(base + at, x, mask=there)
    else:
        tl.store(base + at, x)


@triton.jit(do_not_specialize=["first", "count", "grads", "measured"])
def _update_kernel(
    chunks, grads, tensors, plan, control, partials, first, count, measured,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    R_SPAN: tl.constexpr, V_SPAN: tl.constexpr, ERROR: tl.constexpr, DITHER: tl.constexpr, WATCH: tl.constexpr,
    CLAMP: tl.constexpr, NESTEROV: tl.constexpr, ADVANCE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    ALIGN: tl.constexpr, COLUMNS: tl.constexpr, PLAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """θ <- θ - lr scale d, and the moments where `_measure_kernel` has not advanced them.

    Starts where the last pass ended: at the end, if it was one over the gradients alone (`measured`) or the measuring
    one's first turn; at the start, if it was the second after either.

    WATCH, for codes: partials[first + i] = |r|² of chunk i as stored (`_stored_norm_kernel` ends it).
    """
    backwards = measured ^ (tl.load(control + 3) != 0.0).to(tl.int32)
    chunk, tensor, part = _where(chunks + 2 * first, tl.program_id(0), count, backwards)
    row = plan + tensor * PLAN
    mode = tl.load(row + 11)
    if mode != 0.0:
        start = part.to(tl.int64) * CHUNK
        line = tensor * COLUMNS
        p_base = _base(tensors, line, P, ALIGN) + start
        e_base = _base(tensors, line + 10, tl.int8, 16) + start
        g_base = _base(grads, tensor, G, ALIGN) + start
        left = tl.minimum(tl.load(tensors + line + 7) - start, CHUNK).to(tl.int32)
        factor, limit, w1, b2 = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        w2, lead, gain = tl.load(row + 4), tl.load(row + 12), tl.load(row + 5)
        shift, decay = tl.load(row + 6), tl.load(row + 7)
        size, step = tl.load(row + 8), tl.load(row + 9)
        phase, ratio_phase = _phase(step, P2), _phase(step, P1)  # `rounding`'s streams
        full = left // TILE * TILE
        if BITS == 0:
            m_base = _base(tensors, line + 1, S, 16) + start
            v_base = _base(tensors, line + 2, S, 16) + start
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
            m_base = _base(tensors, line + 1, tl.uint8, 16) + start // (8 // BITS)
            v_base = _base(tensors, line + 2, tl.uint8, 16) + start // (8 // BITS)
            r_scales = _base(tensors, line + 8, tl.bfloat16, 16) + start // 64
            v_scales = _base(tensors, line + 9, tl.bfloat16, 16) + start // 64
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


@triton.jit
def _stored_norm_kernel(
    partials, arenas, tensors, arena_of, span, plan,
    COLUMNS: tl.constexpr, ARENA_COLUMNS: tl.constexpr, PLAN: tl.constexpr, SLACK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`norm_skip.stored_direction_bound` of one tensor with coded moments, as its `update_norm`."""
    i = tl.program_id(0)
    a = arenas + tl.load(arena_of + i) * ARENA_COLUMNS
    row = plan + i * PLAN
    if (tl.load(row + 11) != 0.0) & (tl.load(a + 15) != 0) & (tl.load(a + 16) != 0):
        first, count = tl.load(span + 2 * i), tl.load(span + 2 * i + 1)
        # bias1 / sqrt(bias2)
        bound = tl.sqrt(_total(partials, first, count, LANES)) / tl.load(row + 13).to(tl.float64) * (1 + SLACK)
        _store_floats(tl.load(tensors + i * COLUMNS + 4), bound, True)


@triton.jit(do_not_specialize=["n_tensors", "buckets", "clipped"])
def _summary_kernel(stats, control, out, n_tensors, buckets, clipped, LANES: tl.constexpr):
    """The metrics of `C3O.metrics_tensor`, in its order."""
    skipped, exact = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    capped, ratio = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for at in range(0, n_tensors, LANES):
        i = at + tl.arange(0, LANES)
        row = stats + i * 4
        skipped += tl.load(row, mask=i < n_tensors, other=0.0)
        exact += tl.load(row + 1, mask=i < n_tensors, other=0.0)
        capped += tl.load(row + 2, mask=i < n_tensors, other=0.0)
        ratio += tl.load(row + 3, mask=i < n_tensors, other=0.0)
    trusted = tl.maximum(tl.sum(skipped) + tl.sum(exact), 1.0)
    tl.store(out, tl.sum(skipped))
    tl.store(out + 1, tl.sum(exact))
    tl.store(out + 2, tl.sum(capped))
    tl.store(out + 3, tl.sum(ratio) / trusted)
    tl.store(out + 4, tl.load(control))
    tl.store(out + 5, buckets.to(tl.float32))
    tl.store(out + 6, clipped.to(tl.float32))
