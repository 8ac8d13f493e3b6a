# mypy: allow-untyped-defs
"""C3O's step in a handful of Triton launches, whatever the number of tensors. Import it only where Triton is installed.

Tensors of one optimizer form a table on the device: addresses of parameter, moments, step and caches, and rows of
`CHUNK` elements that programs walk. Moments stay in the arenas of `c3o_foreach`, so that both paths share one state.

    1  sum of squares of every chunk of the gradients                      reads g
    2  plan, one program: norm, verdict, clip factor, bias corrections,    scalars
       the norm skip's decision; advances the step counts
    3  |d|², |θ|² of every chunk of the tensors that must be measured       reads p g m v (writes m v)
    4  trust, one program a tensor: the cap's scale and new bounds         scalars
    5  update                                                              reads p g m v, writes p m v

Bytes decide between two forms of 3 and 5. With moments stored as they are computed (float32), 3 writes the advanced
moments, and 5 reads them back in place of advancing them again: g is not read a third time. With bfloat16 moments the
direction uses the unrounded ones (the rule), so 3 writes nothing and 5 repeats its arithmetic. Bytes per parameter:

    parameters, gradients / moments   clip + exact           clip + skipped or no cap   as foreach
    fp32 / fp32                       4 + 24 + 16 = 44       4 + 28 = 32                100 + 12
    fp32 / bf16                       4 + 12 + 20 = 36       4 + 20 = 24
    bf16 / bf16                       2 +  8 + 14 = 24       2 + 14 = 16

(fp32 without "advance" would be 48.) Gradients are never written: the clip factor is applied as they are read. Passes
walk the chunks in alternating directions, so that each starts on what the last one left in the L2 cache.

Sums have a fixed order (no atomics) and every multiply-add is written as one, so that all forms of the update give the
same bits. Nothing is read by the host. Under CUDA-graph capture the only transfer is that of the gradients' addresses,
which autograd chooses while capturing: it is recorded from a pinned buffer of its own, made beforehand
(`prepare_capture`), that lives and keeps its contents as long as this object: every replay copies the same addresses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eco_llm.optim.c3o_foreach import Arena
from eco_llm.optim.norm_skip import Slack
from eco_llm.optim.rule import BLOCK, Rule

CHUNK = 16384
"""Elements that one program walks; a multiple of BLOCK, so that positions in a credit block are known."""
TILE = 1024
"""Elements in registers at a time, at 4 warps: 8 of each stream a thread."""
WARPS = 4
_LANES = 128  # tensors, or partial sums, that a scalar program takes at a time
_SUM_LANES = 1024
_SPARE_TABLES = 8

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

# Columns of the tables. Tensors, int64:
_T = ("param", "exp_avg", "exp_avg_sq", "step", "update_norm", "param_norm", "norm_age", "numel")
# Arenas, float64:
_A = (
    "lr", "beta1", "beta2", "log_beta1", "log_beta2", "eps", "weight_decay", "radius", "floor", "drift", "refresh",
    "clip_norm", "clip_value", "slack_state", "slack_param", "may_skip",
)  # fmt: skip
# Plan, float32, made by the device in every step: 0 clip factor, 1 clip value, 2 1-b1, 3 b2, 4 1-b2, 5 gain, 6 shift,
# 7 weight decay, 8 lr · scale, 9 step, 10 bound, 11 mode (0 leave alone, 1 update, 2 measure and update).
_PLAN = 16


# ---- kernels ------------------------------------------------------------------------------------------------------


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
def _dithered(x, threshold):
    """`rounding.dithered_bfloat16`: the same bits for the same x."""
    up = ((x.to(tl.int32, bitcast=True) + threshold) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, up).to(tl.bfloat16)


@triton.jit
def _nearest(x):
    """bfloat16 by rounding to nearest, ties to even. Triton's interpreter truncates, so it is spelled out here."""
    b = x.to(tl.int32, bitcast=True)
    up = ((b + (0x7FFF + ((b >> 16) & 1))) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, up).to(tl.bfloat16)


@triton.jit
def _phase(step):
    return ((step.to(tl.int64) * 37345) & 0xFFFF).to(tl.int32)


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
def _direction(p, m, v, gain, shift, decay):
    return tl.fma(decay, p, tl.div_rn(m, tl.fma(tl.sqrt_rn(v), gain, shift)))


@triton.jit
def _where(chunks, program, programs, REVERSE: tl.constexpr):
    """(row of the chunk table, tensor, chunk within the tensor) of this program."""
    at = program
    if REVERSE:
        at = programs - 1 - program
    return at, tl.load(chunks + 2 * at), tl.load(chunks + 2 * at + 1)


@triton.jit(do_not_specialize=["first", "grads"])
def _squares_kernel(
    chunks, grads, tensors, partials, first,
    G: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partials[first + i] = sum of squares of chunk i of the gradients; 0 for a tensor without one."""
    program = tl.program_id(0)
    tensor, part = tl.load(chunks + 2 * (first + program)), tl.load(chunks + 2 * (first + program) + 1)
    lanes = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    if tl.load(grads + tensor) != 0:
        start = part.to(tl.int64) * CHUNK
        g_base = _base(grads, tensor, G, ALIGN) + start
        left = tl.minimum(tl.load(tensors + tensor * COLUMNS + 7) - start, CHUNK).to(tl.int32)
        full = left // TILE * TILE
        for at in range(0, full, TILE):
            g = _read(g_base, at + lanes, left, False)
            total = tl.fma(g, g, total)
        if full < left:
            g = _read(g_base, full + lanes, left, True)
            total = tl.fma(g, g, total)
    tl.store(partials + first + program, tl.sum(total))


@triton.jit(
    do_not_specialize=[
        "n_partials", "n_tensors", "known_norm", "loss", "found_inf", "grads", "norm_out", "applied_out", "clip_arena"
    ]
)  # fmt: skip
def _plan_kernel(
    partials, n_partials, known_norm, loss, found_inf, arenas, lr_at, tensors, arena_of, grads, n_tensors,
    plan, stats, control, norm_out, applied_out, clip_arena,
    MEASURED: tl.constexpr, KNOWN: tl.constexpr, GUARD: tl.constexpr, FLAG: tl.constexpr,
    COLUMNS: tl.constexpr, ARENA_COLUMNS: tl.constexpr, PLAN: tl.constexpr, SLACK: tl.constexpr,
    LANES: tl.constexpr, SUM_LANES: tl.constexpr,
):  # fmt: skip
    """Everything about a step that is a scalar of the optimizer or of a tensor; see the module's docstring."""
    norm = tl.zeros([], tl.float32)
    if MEASURED:
        sums = tl.zeros([SUM_LANES], tl.float64)
        for at in range(0, n_partials, SUM_LANES):
            index = at + tl.arange(0, SUM_LANES)
            sums += tl.load(partials + index, mask=index < n_partials, other=0.0).to(tl.float64)
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
    tl.store(norm_out, norm)
    tl.store(applied_out, tl.where(refused == 0, 1, 0).to(tl.uint8))
    if refused == 0:
        clip = tl.load(arenas + clip_arena * ARENA_COLUMNS + 11).to(tl.float32)
        factor = clip / (norm + 1e-6)
        tl.store(control, tl.where((factor > 1) | (clip == 0), 1.0, factor))

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
        _store_floats(step_at, t, live)
        t64 = t.to(tl.float64)
        bias1, bias2 = 1 - tl.exp(t64 * tl.load(a + 3)), 1 - tl.exp(t64 * tl.load(a + 4))

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
        room = (1 - drift) * radius - lr * decay
        skip = (lr * bound <= room * tl.maximum(known, floor * sqrt_n)) & (age <= refresh) & may_skip
        trust = radius > 0

        skipped = live & skip
        keep = tl.maximum(1 - lr * decay, 0.0)
        lower = tl.maximum(known * keep * (1 - SLACK) - lr * bound * (1 + SLACK), 0.0) * (1 - slack_param)
        _store_floats(u_at, bound, skipped)
        _store_floats(l_at, lower, skipped)
        _store_floats(age_at, age + 1, skipped)

        out = plan + i * PLAN
        tl.store(out, factor, mask=inside)
        tl.store(out + 1, tl.load(a + 12).to(tl.float32), mask=inside)
        tl.store(out + 2, (1 - b1).to(tl.float32), mask=inside)
        tl.store(out + 3, b2.to(tl.float32), mask=inside)
        tl.store(out + 4, (1 - b2).to(tl.float32), mask=inside)
        tl.store(out + 5, (bias1 / tl.sqrt(bias2)).to(tl.float32), mask=inside)
        tl.store(out + 6, (eps * bias1).to(tl.float32), mask=inside)
        tl.store(out + 7, decay.to(tl.float32), mask=inside)
        tl.store(out + 8, lr.to(tl.float32), mask=inside)
        tl.store(out + 9, t, mask=inside)
        tl.store(out + 10, bound.to(tl.float32), mask=inside)
        tl.store(out + 11, tl.where(live, tl.where(trust & (skip == 0), 2.0, 1.0), 0.0), mask=inside)
        # A skipped tensor keeps the ratio last measured; one that is measured is written by `_trust_kernel`.
        now = inside & (refused == 0)
        tl.store(stats + i * 4, tl.where(skipped, 1.0, 0.0), mask=now)
        tl.store(stats + i * 4 + 1, 0.0, mask=now)
        tl.store(stats + i * 4 + 2, 0.0, mask=now)
        tl.store(stats + i * 4 + 3, 0.0, mask=now & (skip == 0))


@triton.jit
def _measure_tile(
    p_base, g_base, m_base, v_base, at, left, factor, limit, w1, b2, w2, gain, shift, decay,
    CLAMP: tl.constexpr, ADVANCE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """θ and d of one tile; writes the advanced moments if ADVANCE."""
    g = _clipped(_read(g_base, at, left, MASKED), factor, limit, CLAMP)
    p = _read(p_base, at, left, MASKED)
    m, v = _advance(g, _read(m_base, at, left, MASKED), _read(v_base, at, left, MASKED), w1, b2, w2)
    if ADVANCE:
        _write(m_base, at, left, m, MASKED)
        _write(v_base, at, left, v, MASKED)
    return p, _direction(p, m, v, gain, shift, decay)


@triton.jit(do_not_specialize=["first", "programs", "all_chunks", "grads"])
def _measure_kernel(
    chunks, grads, tensors, plan, partials, first, programs, all_chunks,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, CLAMP: tl.constexpr, ADVANCE: tl.constexpr,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """partials[i], partials[all_chunks + i] = |d|², |θ|² of chunk i, if its tensor must be measured."""
    at, tensor, part = _where(chunks + 2 * first, tl.program_id(0), programs, REVERSE)
    row = plan + tensor * PLAN
    if tl.load(row + 11) == 2.0:
        start = part.to(tl.int64) * CHUNK
        p_base = _base(tensors, tensor * COLUMNS, P, ALIGN) + start
        g_base = _base(grads, tensor, G, ALIGN) + start
        m_base = _base(tensors, tensor * COLUMNS + 1, S, 16) + start
        v_base = _base(tensors, tensor * COLUMNS + 2, S, 16) + start
        left = tl.minimum(tl.load(tensors + tensor * COLUMNS + 7) - start, CHUNK).to(tl.int32)
        factor, limit, w1, b2 = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        w2, gain, shift, decay = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
        lanes = tl.arange(0, TILE)
        d_sum, p_sum = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        full = left // TILE * TILE
        for begin in range(0, full, TILE):
            p, d = _measure_tile(
                p_base, g_base, m_base, v_base, begin + lanes, left, factor, limit, w1, b2, w2, gain, shift, decay,
                CLAMP, ADVANCE, False,
            )  # fmt: skip
            d_sum, p_sum = tl.fma(d, d, d_sum), tl.fma(p, p, p_sum)
        if full < left:
            p, d = _measure_tile(
                p_base, g_base, m_base, v_base, full + lanes, left, factor, limit, w1, b2, w2, gain, shift, decay,
                CLAMP, ADVANCE, True,
            )  # fmt: skip
            d_sum, p_sum = tl.fma(d, d, d_sum), tl.fma(p, p, p_sum)
        tl.store(partials + first + at, tl.sum(d_sum))
        tl.store(partials + all_chunks + first + at, tl.sum(p_sum))


@triton.jit(do_not_specialize=["all_chunks"])
def _trust_kernel(
    partials, all_chunks, arenas, tensors, arena_of, span, plan, stats,
    COLUMNS: tl.constexpr, ARENA_COLUMNS: tl.constexpr, PLAN: tl.constexpr, SLACK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The cap of one measured tensor: lr · scale, statistics, and the bounds that its norms give."""
    i = tl.program_id(0)
    row = plan + i * PLAN
    if tl.load(row + 11) == 2.0:
        first, count = tl.load(span + 2 * i), tl.load(span + 2 * i + 1)
        d_sum, p_sum = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
        for at in range(0, count, LANES):
            k = at + tl.arange(0, LANES)
            d_sum += tl.load(partials + first + k, mask=k < count, other=0.0).to(tl.float64)
            p_sum += tl.load(partials + all_chunks + first + k, mask=k < count, other=0.0).to(tl.float64)
        d_norm, p_norm = tl.sqrt(tl.sum(d_sum)), tl.sqrt(tl.sum(p_sum))
        a = arenas + tl.load(arena_of + i) * ARENA_COLUMNS
        tensor = tensors + i * COLUMNS
        lr = tl.load(row + 8).to(tl.float64)
        weight = tl.maximum(p_norm, tl.load(a + 8) * tl.sqrt(tl.load(tensor + 7).to(tl.float64)))
        limit, delta = tl.load(a + 7) * weight, lr * d_norm
        binds = delta > limit
        scale = tl.where(binds, limit / tl.where(binds, delta, 1.0), 1.0)
        tl.store(row + 8, (lr * scale).to(tl.float32))
        ratio = tl.where(weight > 0, delta * scale / tl.where(weight > 0, weight, 1.0), 0.0)
        tl.store(stats + 4 * i, 0.0)
        tl.store(stats + 4 * i + 1, 1.0)
        tl.store(stats + 4 * i + 2, tl.where(scale < 1, 1.0, 0.0))
        tl.store(stats + 4 * i + 3, ratio.to(tl.float32))
        if tl.load(a + 15) != 0:
            bound = tl.load(row + 10).to(tl.float64)
            measured = (d_norm + tl.load(a + 6) * p_norm) * (1 + SLACK)
            lower = p_norm * (1 - SLACK) - lr * scale * d_norm * (1 + SLACK)
            # Not `bound < measured` alone: an unknown history times α = 0 is NaN.
            _store_floats(tl.load(tensor + 4), tl.where(bound < measured, bound, measured), True)
            _store_floats(tl.load(tensor + 5), tl.maximum(lower, 0.0) * (1 - tl.load(a + 14)), True)
            _store_floats(tl.load(tensor + 6), 1.0 + 0.0 * lr, True)


@triton.jit
def _update_tile(
    p_base, g_base, m_base, v_base, at, left, position, factor, limit, w1, b2, w2, gain, shift, decay, size,
    phase, CLAMP: tl.constexpr, P: tl.constexpr, S: tl.constexpr, ADVANCED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    p = _read(p_base, at, left, MASKED)
    m, v = _read(m_base, at, left, MASKED), _read(v_base, at, left, MASKED)
    if not ADVANCED:
        g = _clipped(_read(g_base, at, left, MASKED), factor, limit, CLAMP)
        m, v = _advance(g, m, v, w1, b2, w2)
        if S.primitive_bitwidth == 16:
            threshold = (position * 49471 + phase) & 0xFFFF
            _write(m_base, at, left, _dithered(m, threshold), MASKED)
            # Half a period on, modulo 2^16: the other half of the same threshold.
            _write(v_base, at, left, _dithered(v, threshold ^ 0x8000), MASKED)
        else:
            _write(m_base, at, left, m, MASKED)
            _write(v_base, at, left, v, MASKED)
    p = tl.fma(-size, _direction(p, m, v, gain, shift, decay), p)
    if P.primitive_bitwidth == 16:
        _write(p_base, at, left, _nearest(p), MASKED)
    else:
        _write(p_base, at, left, p, MASKED)


@triton.jit(do_not_specialize=["first", "programs", "grads"])
def _update_kernel(
    chunks, grads, tensors, plan, first, programs,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, CLAMP: tl.constexpr, ADVANCE: tl.constexpr,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
    PLAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """θ <- θ - lr scale d, and the moments where `_measure_kernel` has not advanced them."""
    _, tensor, part = _where(chunks + 2 * first, tl.program_id(0), programs, REVERSE)
    row = plan + tensor * PLAN
    mode = tl.load(row + 11)
    if mode != 0.0:
        start = part.to(tl.int64) * CHUNK
        p_base = _base(tensors, tensor * COLUMNS, P, ALIGN) + start
        g_base = _base(grads, tensor, G, ALIGN) + start
        m_base = _base(tensors, tensor * COLUMNS + 1, S, 16) + start
        v_base = _base(tensors, tensor * COLUMNS + 2, S, 16) + start
        left = tl.minimum(tl.load(tensors + tensor * COLUMNS + 7) - start, CHUNK).to(tl.int32)
        factor, limit, w1, b2 = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        w2, gain, shift, decay = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
        size, step = tl.load(row + 8), tl.load(row + 9)
        phase = _phase(step)
        lanes = tl.arange(0, TILE)
        full = left // TILE * TILE
        if ADVANCE and mode == 2.0:
            for begin in range(0, full, TILE):
                at = begin + lanes
                _update_tile(
                    p_base, g_base, m_base, v_base, at, left, at & (BLOCK - 1), factor, limit, w1, b2, w2, gain,
                    shift, decay, size, phase, CLAMP, P, S, True, False,
                )  # fmt: skip
            if full < left:
                at = full + lanes
                _update_tile(
                    p_base, g_base, m_base, v_base, at, left, at & (BLOCK - 1), factor, limit, w1, b2, w2, gain,
                    shift, decay, size, phase, CLAMP, P, S, True, True,
                )  # fmt: skip
        else:
            for begin in range(0, full, TILE):
                at = begin + lanes
                _update_tile(
                    p_base, g_base, m_base, v_base, at, left, at & (BLOCK - 1), factor, limit, w1, b2, w2, gain,
                    shift, decay, size, phase, CLAMP, P, S, False, False,
                )  # fmt: skip
            if full < left:
                at = full + lanes
                _update_tile(
                    p_base, g_base, m_base, v_base, at, left, at & (BLOCK - 1), factor, limit, w1, b2, w2, gain,
                    shift, decay, size, phase, CLAMP, P, S, False, True,
                )  # fmt: skip


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


# ---- launchers ----------------------------------------------------------------------------------------------------


class _Kind:
    """Chunks first..first+count-1 of the table: tensors alike in every type."""

    def __init__(self, arena: Arena, first: int) -> None:
        self.types = {"P": _TYPES[arena.param_dtype], "G": _TYPES[arena.param_dtype], "S": _TYPES[arena.state_dtype]}
        self.advance = arena.state_dtype == torch.float32
        self.first, self.count = first, 0


class KernelPlan:
    """The tables of some arenas of one device, and the launches that step them.

    Args:
        arenas: each with its parameter group; float32 or bfloat16 throughout, contiguous, no credit.

    Tensors need not have a gradient in every step: those without one are left alone.
    """

    def __init__(self, arenas: Sequence[tuple[Arena, dict[str, Any]]]) -> None:
        # Arenas of one kind are neighbours, so that a kind is one run of chunks.
        self._arenas = sorted(arenas, key=lambda x: (str(x[0].param_dtype), str(x[0].state_dtype)))
        self.device = self._arenas[0][0].device
        self.params = [p for arena, _ in self._arenas for p in arena.params]
        self._owner = [k for k, (arena, _) in enumerate(self._arenas) for _ in arena.params]
        self._dtypes = [p.dtype for p in self.params]
        self._slack = [Slack.of(arena.state_dtype, arena.param_dtype, torch.float32) for arena, _ in self._arenas]
        n = len(self.params)

        chunks: list[tuple[int, int]] = []
        spans: list[tuple[int, int]] = []
        self._kinds: list[_Kind] = []
        for k, (arena, _) in enumerate(self._arenas):
            if not k or self._kind_of(k) != self._kind_of(k - 1):
                self._kinds.append(_Kind(arena, len(chunks)))
            for p in arena.params:
                parts = -(-p.numel() // CHUNK)
                spans.append((len(chunks), parts))
                chunks += [(len(spans) - 1, j) for j in range(parts)]
            self._kinds[-1].count = len(chunks) - self._kinds[-1].first
        self._chunk_count = len(chunks)
        self._chunks = self._uploaded(chunks, torch.int32)
        self._span = self._uploaded(spans, torch.int32)
        self._arena_of = self._uploaded(self._owner, torch.int32)
        self._tensors = torch.zeros(n, len(_T), dtype=torch.int64, device=self.device)
        self._settings = torch.zeros(len(self._arenas), len(_A), dtype=torch.float64, device=self.device)
        self._lr_at = torch.zeros(len(self._arenas), dtype=torch.int64, device=self.device)
        self._grads = torch.zeros(n, dtype=torch.int64, device=self.device)
        self._plan = torch.zeros(n, _PLAN, device=self.device)
        self._stats = torch.zeros(n, 4, device=self.device)
        self._control = torch.ones(1, device=self.device)
        self._summary = torch.zeros(7, device=self.device)
        self._partials = torch.zeros(2 * self._chunk_count, device=self.device)

        self._param_at: list[int] = []
        self._grad_at: list[int] = []
        self._settings_key: Any = None
        self._lr_key: Any = None
        self._align = 16
        self._aligned_for: list[int] = []
        self._bound_grads = self._grads
        self._clip_count = 0
        self.bound = 0
        """Gradients that the last `bind` took up."""
        self._spare: list[tuple[Tensor, Tensor]] = []
        self._captured: list[tuple[Tensor, Tensor]] = []  # recorded copies read them in every replay

    def _kind_of(self, k: int) -> tuple[torch.dtype, torch.dtype]:
        return self._arenas[k][0].param_dtype, self._arenas[k][0].state_dtype

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being recorded on the current stream."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _uploaded(self, values: Any, dtype: torch.dtype) -> Tensor:
        """A device tensor of host numbers, without waiting for the device."""
        self._refuse_in_capture("a table changed")
        host = torch.tensor(values, dtype=dtype)
        # Pinned: the allocator keeps it until the copy is done. Pageable memory would make the copy wait.
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def _refuse_in_capture(self, what: str) -> None:
        if getattr(self, "device", None) is not None and self.capturing:
            raise RuntimeError(f"C3O: {what} while a CUDA graph is being captured; call make_capturable() before")

    # -- what changes between steps --

    def bind(self, rules: Sequence[Rule]) -> set[int]:
        """Take up this step's gradients and settings.

        Args:
            rules: one an arena, in the order of `groups`.

        Returns:
            Indices of arenas that hold a gradient the kernels cannot read; then nothing was bound.

        Raises:
            RuntimeError: something other than gradients changed while a CUDA graph is being captured.
        """
        # On the hot path of an eager step: as few calls a tensor as make the addresses safe. Gradients share device and
        # (unless told otherwise) type with their parameter, which PyTorch enforces; sparse ones are refused before.
        grads: list[int] = []
        unfit: set[int] = set()
        for p, dtype, owner in zip(self.params, self._dtypes, self._owner, strict=True):
            g = p.grad
            if g is None:
                grads.append(0)
            elif g.dtype is dtype and g.is_contiguous():
                grads.append(g.data_ptr())
            else:
                unfit.add(owner)
        params = [p.data_ptr() for p in self.params]
        moved = params != self._param_at
        if moved:
            unfit |= {
                owner
                for p, dtype, owner in zip(self.params, self._dtypes, self._owner, strict=True)
                if not p.is_contiguous() or p.dtype != dtype or p.device != self.device
            }
        if unfit:
            return unfit
        self.bound = len(grads) - grads.count(0)
        if moved:
            self._tensors.copy_(self._uploaded(self._rows(params), torch.int64))
            self._param_at = params
        if moved or grads != self._aligned_for:
            aligned = all(at % 16 == 0 for at in params) and all(at % 16 == 0 for at in grads)
            self._align = 16 if aligned else min(dtype.itemsize for dtype in self._dtypes)
            self._aligned_for = grads
        if self.capturing:
            if not self._spare:
                raise RuntimeError("C3O: no table left for another captured step; call make_capturable() before")
            host, there = self._spare.pop()
            host.copy_(torch.tensor(grads, dtype=torch.int64))
            there.copy_(host, non_blocking=True)
            self._captured.append((host, there))
            self._bound_grads = there
        else:
            if grads != self._grad_at:
                self._grads.copy_(self._uploaded(grads, torch.int64))
                self._grad_at = grads
            self._bound_grads = self._grads
        self._bind_settings(rules)
        return unfit

    def _rows(self, params: list[int]) -> list[tuple[int, ...]]:
        rows: list[tuple[int, ...]] = []
        for arena, _ in self._arenas:
            width = arena.exp_avg.element_size() * BLOCK
            m, v = arena.exp_avg.data_ptr(), arena.exp_avg_sq.data_ptr()
            caches = [0] * 3 if arena.cache is None else [x.data_ptr() for x in arena.cache]
            for i, p in enumerate(arena.params):
                offset = arena.first[i] * width
                scalars = (arena.step.data_ptr() + 4 * i, *(c + 4 * i if c else 0 for c in caches))
                rows.append((params[len(rows)], m + offset, v + offset, *scalars, p.numel()))
        return rows

    def _bind_settings(self, rules: Sequence[Rule]) -> None:
        rows: list[tuple[float, ...]] = []
        addresses: list[int] = []
        for slack, rule in zip(self._slack, rules, strict=True):
            lr, address = 0.0, 0
            if not isinstance(rule.lr, Tensor):
                lr = rule.lr
            elif rule.lr.dtype == torch.float32 and rule.lr.device == self.device:
                address = rule.lr.data_ptr()
            elif rule.lr.device.type == "cpu":
                lr = float(rule.lr)  # host memory: reading it waits for nothing
            else:
                raise TypeError(f"C3O: a device lr must be float32 on {self.device}, not {rule.lr.dtype}")
            rows.append(
                (
                    lr,
                    rule.beta1,
                    rule.beta2,
                    _log(rule.beta1),
                    _log(rule.beta2),
                    rule.eps,
                    rule.weight_decay,
                    rule.trust_radius,
                    rule.trust_floor,
                    rule.trust_norm_refresh_drift,
                    rule.trust_norm_refresh_steps,
                    rule.grad_clip if rule.clips_norm else 0.0,
                    rule.grad_clip if rule.clips_value else float("inf"),
                    slack.state,
                    slack.param,
                    float(rule.may_skip_norms),
                )
            )
            addresses.append(address)
        if rows != self._settings_key:
            self._settings.copy_(self._uploaded(rows, torch.float64))
            self._settings_key = rows
        if addresses != self._lr_key:
            self._lr_at.copy_(self._uploaded(addresses, torch.int64))
            self._lr_key = addresses
        if self.capturing and 0 in addresses:
            raise RuntimeError("C3O: lr is a number, which a CUDA graph would freeze; call make_capturable() before")
        self._clamps = any(rule.clips_value for rule in rules)
        self._trusts = any(rule.has_trust for rule in rules)
        self._skips = any(rule.may_skip_norms for rule in rules)
        clipping = [k for k, rule in enumerate(rules) if rule.clips_norm]
        self._clip_arena = clipping[-1] if clipping else 0
        self.clips_norm = bool(clipping)
        self._clip_count = sum(rule.grad_clip > 0 for rule in rules)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The group of every arena, in the order that `bind` expects their rules."""
        return [group for _, group in self._arenas]

    @property
    def arenas(self) -> list[Arena]:
        """The arenas, in the same order."""
        return [arena for arena, _ in self._arenas]

    # -- the step --

    def step(
        self, *, measure: bool, norm: Tensor | None, loss: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One step of what `bind` took up. No host sync; five kinds of launch.

        Args:
            measure: compute the norm of all bound gradients.
            norm: or take this one, 0-dim; None with `measure` off: no clipping by norm.
            loss: 0-dim; given, the step is taken only if it and the norm are finite.
            found_inf: 0-dim or 1-element; not 0 refuses the step too.

        Returns:
            (norm, applied): 0-dim float32 and bool, of their own memory.
        """
        norm_out = torch.empty((), dtype=torch.float32, device=self.device)
        applied = torch.empty((), dtype=torch.bool, device=self.device)
        grads, table, shape = self._bound_grads, self._tensors, {"CHUNK": CHUNK, "TILE": TILE, "num_warps": WARPS}
        columns = {"COLUMNS": len(_T)}
        scalars = {**columns, "ARENA_COLUMNS": len(_A), "PLAN": _PLAN, "SLACK": 8 * torch.finfo(torch.float32).eps}
        # Start where the last full pass ended; with the skip on, that of the measurement is usually empty.
        backwards = measure if self._skips else measure != self._trusts
        with self._on_device():
            if measure:
                for kind in self._kinds:
                    _squares_kernel[(kind.count,)](
                        self._chunks, grads, table, self._partials, kind.first,
                        G=kind.types["G"], ALIGN=self._align, **columns, **shape,
                    )  # fmt: skip
            _plan_kernel[(1,)](
                self._partials, self._chunk_count, norm, loss, found_inf, self._settings, self._lr_at, table,
                self._arena_of, grads, len(self.params), self._plan, self._stats, self._control, norm_out,
                applied.view(torch.uint8), self._clip_arena, MEASURED=measure, KNOWN=norm is not None,
                GUARD=loss is not None, FLAG=found_inf is not None, LANES=_LANES, SUM_LANES=_SUM_LANES, **scalars,
            )  # fmt: skip
            if self._trusts:
                for kind in self._kinds:
                    _measure_kernel[(kind.count,)](
                        self._chunks, grads, table, self._plan, self._partials, kind.first, kind.count,
                        self._chunk_count, CLAMP=self._clamps, ADVANCE=kind.advance, REVERSE=measure,
                        ALIGN=self._align, PLAN=_PLAN, **kind.types, **columns, **shape,
                    )  # fmt: skip
                _trust_kernel[(len(self.params),)](
                    self._partials, self._chunk_count, self._settings, table, self._arena_of, self._span,
                    self._plan, self._stats, LANES=_LANES, **scalars,
                )  # fmt: skip
            for kind in self._kinds:
                _update_kernel[(kind.count,)](
                    self._chunks, grads, table, self._plan, kind.first, kind.count,
                    CLAMP=self._clamps, ADVANCE=kind.advance, REVERSE=backwards, ALIGN=self._align,
                    PLAN=_PLAN, BLOCK=BLOCK, **kind.types, **columns, **shape,
                )  # fmt: skip
        return norm_out, applied

    def summarise(self) -> Tensor:
        """float32 [7], `C3O.metrics_tensor`'s values of the last applied step, in memory that stays the same."""
        with self._on_device():
            _summary_kernel[(1,)](
                self._stats, self._control, self._summary, len(self.params), len(self._arenas), self._clip_count,
                LANES=_LANES,
            )  # fmt: skip
        return self._summary

    def stats(self) -> Tensor:
        """float32 [4], as `foreach_step` returns: sums over tensors."""
        return self._stats.sum(0)

    def prepare_capture(self) -> None:
        """Make the memory that captured steps need; enough for several, topped up by every call."""
        while len(self._spare) < _SPARE_TABLES:
            host = torch.zeros(len(self.params), dtype=torch.int64)
            host = host.pin_memory() if self.device.type == "cuda" else host
            self._spare.append((host, torch.zeros_like(self._grads)))

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


def _log(beta: float) -> float:
    # exp of it is 0, as 0 to any power; not minus infinity, whose products could be NaN.
    return math.log(beta) if beta > 0 else -1e30
