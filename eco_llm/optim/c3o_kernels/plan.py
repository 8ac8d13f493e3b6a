# mypy: allow-untyped-defs
"""What is a scalar of the optimizer or of a tensor: plan, cap, bounds, metrics."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _floats(addresses, mask):
    """float32 values at a vector of addresses; 0 where masked."""
    return tl.load(addresses.to(tl.pointer_type(tl.float32)), mask=mask, other=0.0)


@triton.jit
def _store_floats(addresses, values, mask):
    tl.store(addresses.to(tl.pointer_type(tl.float32)), values.to(tl.float32), mask=mask)


@triton.jit
def _factor(clip, norm):
    """What gradients of that norm are multiplied by; 1 where clip (float64) is 0."""
    clip = clip.to(tl.float32)
    factor = clip / (norm + 1e-6)
    return tl.where((factor > 1) | (clip == 0), 1.0, factor)  # NaN stays


@triton.jit
def _total(partials, first, count, LANES: tl.constexpr):
    """float64 sum of `count` partial sums from `first` on."""
    total = tl.zeros([LANES], tl.float64)
    for at in range(0, count, LANES):
        k = at + tl.arange(0, LANES)
        total += tl.load(partials + first + k, mask=k < count, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _holds(d_norm, p_norm, lr, sqrt_n, factor, change, most, a):
    """Whether |d|, measured with one clip factor, serves a step with another: `factor`, `change` times the first.

    It does if both are 1. Otherwise the cap must be idle with both, whichever of the two d was measured with:
    docs/c3o.md, "Before the norm is known"; and the step must need no norm itself, as spheres and bounds do.
    """
    decay = tl.load(a + 6)
    change64 = change.to(tl.float64)
    least = tl.minimum(change64, 1 / change64)
    # 1e-5: where the direction's terms cancel, rounding is a share of K and not of u.
    u_norm = (d_norm + decay * p_norm + (1 / least - 1 + 1e-5) * most.to(tl.float64)) / least
    limit = tl.load(a + 7) * tl.maximum(p_norm, tl.load(a + 8) * sqrt_n)
    idle = lr * (u_norm + decay * p_norm) * (1 + 1e-4) <= limit  # 1e-4: arithmetic, with room; NaN is False
    bounded = (tl.load(a + 17) > 0) | (tl.load(a + 15) != 0)
    return ((factor == 1.0) & (change == 1.0)) | (idle & (not bounded))


@triton.jit
def _hold_to_region(
    i, a, tensor, row, stats, partials, all_chunks, first, count, d_square, p_square, lr, bound, sqrt_n,
    SPHERE: tl.constexpr, PLAIN: tl.constexpr, SLACK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The cap of one measured tensor: lr · scale, statistics, and the bounds that its norms give; or its step on the
    sphere (`c3o_foreach._onto_sphere`, of which this is the float64 twin).
    """
    p_norm = tl.sqrt(p_square)
    sphere, decay = tl.load(a + 17), tl.load(a + 6)
    u_square, dot = d_square, d_square
    if SPHERE:
        dot = _total(partials + 2 * all_chunks, first, count, LANES)
        # What was measured is u; d, for where the cap's rule holds, follows.
        with_decay = tl.maximum(u_square + decay * (2 * dot + decay * p_square), 0.0)
        d_square = tl.where(sphere > 0, with_decay, d_square)
    d_norm = tl.sqrt(d_square)
    weight = tl.maximum(p_norm, tl.load(a + 8) * sqrt_n)
    limit, delta = tl.load(a + 7) * weight, lr * d_norm
    binds = (delta > limit) & (tl.load(a + 7) > 0)
    scale = tl.where(binds, limit / tl.where(binds, delta, 1.0), 1.0)
    size = lr * scale
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
        proven = bound.to(tl.float64)
        measured = d_norm + decay * p_norm
        if PLAIN:  # with codes `_stored_norm_kernel` has the last word
            plain = tl.sqrt(_total(partials + 3 * all_chunks, first, count, LANES)) / (1 - tl.load(a + 1))
            measured = tl.where(tl.load(a + 18) != 0, plain, measured)
        measured *= 1 + SLACK
        lower = p_norm * (1 - SLACK) - lr * scale * d_norm * (1 + SLACK)
        # Not `proven < measured` alone: an unknown history times α = 0 is NaN.
        _store_floats(tl.load(tensor + 4), tl.where(proven < measured, proven, measured), True)
        _store_floats(tl.load(tensor + 5), tl.maximum(lower, 0.0) * (1 - tl.load(a + 14)), True)
        _store_floats(tl.load(tensor + 6), 1.0 + 0.0 * lr, True)


@triton.jit(
    do_not_specialize=[
        "n_chunks", "known_norm", "loss", "found_inf", "grads", "norm_out", "applied_out", "clip_arena"
    ]
)  # fmt: skip
def _plan_kernel(
    squares, n_chunks, known_norm, loss, found_inf, arenas, lr_at, tensors, arena_of, grads, span, partials,
    plan, turns, stats, control, tickets, norm_out, applied_out, clip_arena,
    DRAFT: tl.constexpr, EARLY: tl.constexpr, PATIENCE: tl.constexpr, SKIPS: tl.constexpr, MEASURED: tl.constexpr,
    KNOWN: tl.constexpr, GUARD: tl.constexpr, FLAG: tl.constexpr, SPHERE: tl.constexpr, PLAIN: tl.constexpr,
    COLUMNS: tl.constexpr, ARENA_COLUMNS: tl.constexpr, PLAN: tl.constexpr, TICKETS: tl.constexpr,
    SLACK: tl.constexpr, LANES: tl.constexpr, SUM_LANES: tl.constexpr,
):  # fmt: skip
    """Everything about a step that is a scalar of the optimizer or of a tensor; see `c3o_triton`'s docstring.

    A program plans one tensor, and finds the norm for itself: a sum of as many numbers as there are chunks costs less
    than a launch. That is tensors · chunks · 4 bytes, out of the L2 cache: 3.7 MB with 100M parameters in 150 tensors,
    but 0.5 GB with 7B in 300, by count some 80 µs of a step of 35 ms, and so more than a launch. The first program also
    writes what is the optimizer's.

    DRAFT: before the norm is known; the plan of a step that is taken, with the last one's norm. Changes nothing but the
    plan. EARLY: there was a draft, and what was measured on it holds, or is to be measured again. SKIPS: some tensor
    may skip.
    """
    i = tl.program_id(0)
    # What depends on nothing is loaded first: this program waits for memory, and for little else.
    arena = tl.load(arena_of + i)
    a = arenas + arena * ARENA_COLUMNS
    row = tensors + i * COLUMNS
    out = plan + i * PLAN
    has_grad = tl.load(grads + i) != 0
    lr_address = tl.load(lr_at + arena)
    # A learning rate is rounded to float32 wherever it comes from, so that numbers and device values agree.
    lr = tl.load(a).to(tl.float32)
    lr = tl.where(lr_address != 0, _floats(lr_address, lr_address != 0), lr).to(tl.float64)
    b1, b2, eps, decay = tl.load(a + 1), tl.load(a + 2), tl.load(a + 5), tl.load(a + 6)
    step_at = tl.load(row + 3)
    t = _floats(step_at, True) + 1
    sqrt_n = tl.sqrt(tl.load(row + 7).to(tl.float64))
    if SKIPS:
        may_skip = tl.load(a + 15) != 0
        u_at, l_at, age_at = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
        previous, known = _floats(u_at, may_skip).to(tl.float64), _floats(l_at, may_skip).to(tl.float64)
        age = _floats(age_at, may_skip)
    if EARLY and not DRAFT:
        was_early, drafted = tl.load(turns + i) == 1, tl.load(out)

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
    taken = i >= 0
    if GUARD:
        value = tl.load(loss).to(tl.float32)
        taken = (tl.abs(norm) < float("inf")) & (tl.abs(value) < float("inf"))
    if FLAG:
        taken = taken & (tl.load(found_inf) == 0)
    if not DRAFT and i == 0:
        tl.store(norm_out, norm)
        tl.store(applied_out, tl.where(taken, 1, 0).to(tl.uint8))
        tl.store(control, _factor(tl.load(arenas + clip_arena * ARENA_COLUMNS + 11), norm), mask=taken)
        tl.store(control + 1, norm, mask=taken)
        tl.store(control + 3, 0.0)  # unless the measuring pass follows and says otherwise
        tl.store(tickets + tl.arange(0, TICKETS), tl.zeros([TICKETS], tl.int32))
    live = has_grad & taken

    radius, floor, drift, refresh = tl.load(a + 7), tl.load(a + 8), tl.load(a + 9), tl.load(a + 10)
    factor = _factor(tl.load(a + 11), norm)
    if not DRAFT:
        _store_floats(step_at, t, live)
    t64 = t.to(tl.float64)
    bias1, bias2 = 1 - tl.exp(t64 * tl.load(a + 3)), 1 - tl.exp(t64 * tl.load(a + 4))

    nesterov = tl.load(a + 18) != 0
    ahead = b1 * bias1 / ((1 - b1) + b1 * bias1)  # norm_skip.look_ahead
    trust = radius > 0
    skip = radius != radius
    bound = 0.0 * lr
    if SKIPS:
        # norm_skip.update_norm_bound and may_skip; credit is off on this path.
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

    tl.store(out, factor)
    tl.store(out + 1, tl.load(a + 12).to(tl.float32))
    tl.store(out + 2, (1 - b1).to(tl.float32))
    tl.store(out + 3, b2.to(tl.float32))
    tl.store(out + 4, (1 - b2).to(tl.float32))
    # u = m / (sqrt(v) gain + shift); Nesterov's (lead m + g) / (sqrt(v) gain + shift), both over 1 - b1.
    gain, over = bias1 / tl.sqrt(bias2), tl.where(nesterov, 1 - b1, 1.0)
    tl.store(out + 5, (gain / over).to(tl.float32))
    tl.store(out + 6, (eps * bias1 / over).to(tl.float32))
    tl.store(out + 12, (ahead / (1 - b1)).to(tl.float32))
    tl.store(out + 13, gain.to(tl.float32))
    # On a sphere u alone is measured; what θ is multiplied by then follows (`_hold_to_region`).
    sphere = tl.load(a + 17) > 0
    tl.store(out + 7, tl.where(sphere, 0.0, decay).to(tl.float32))
    tl.store(out + 8, lr.to(tl.float32))
    tl.store(out + 9, t)
    bound = bound.to(tl.float32)
    tl.store(out + 10, bound)
    measured = (trust & (not skip)) | sphere
    tl.store(out + 11, tl.where(live, tl.where(measured, 2.0, 1.0), 0.0))
    if DRAFT:
        expected = tl.load(out + 14) >= PATIENCE
        tl.store(turns + i, tl.where(live & measured & (tl.load(a + 19) != 0) & expected, 1, 0))
    else:
        if taken:
            # A skipped tensor keeps the ratio last measured; for one that is measured, see `_hold_to_region`.
            tl.store(stats + i * 4, tl.where(live & skip, 1.0, 0.0))
            tl.store(stats + i * 4 + 1, 0.0)
            tl.store(stats + i * 4 + 2, 0.0)
            tl.store(stats + i * 4 + 3, 0.0, mask=not skip)
        turn = tl.where(live & measured, 2, 0)
        if EARLY:
            change = factor / drafted
            # K √n of docs/c3o.md, "Before the norm is known".
            most = (1 - b1) / bias1 * tl.sqrt(bias2 / (1 - b2)) * tl.where(nesterov, 1 + ahead, 1.0)
            most = (most * sqrt_n).to(tl.float32)
            tl.store(out + 15, change)
            tl.store(out + 16, most)
            if was_early and live:
                first, count = tl.load(span + 2 * i), tl.load(span + 2 * i + 1)
                d_square = _total(partials, first, count, LANES)
                p_square = _total(partials + n_chunks, first, count, LANES)
                if _holds(tl.sqrt(d_square), tl.sqrt(p_square), lr, sqrt_n, factor, change, most, a):
                    turn = 0
                    tl.store(out + 14, tl.minimum(tl.load(out + 14) + 1, PATIENCE))
                    _hold_to_region(
                        i, a, row, out, stats, partials, n_chunks, first, count, d_square, p_square, lr, bound, sqrt_n,
                        SPHERE, PLAIN, SLACK, LANES,
                    )  # fmt: skip
        tl.store(turns + i, turn)


@triton.jit(do_not_specialize=["all_chunks"])
def _trust_kernel(
    partials, all_chunks, arenas, tensors, arena_of, span, plan, turns, stats,
    EARLY: tl.constexpr, PATIENCE: tl.constexpr, SPHERE: tl.constexpr, PLAIN: tl.constexpr, COLUMNS: tl.constexpr,
    ARENA_COLUMNS: tl.constexpr, PLAN: tl.constexpr, SLACK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`_hold_to_region` of one tensor that was measured after the plan."""
    i = tl.program_id(0)
    if tl.load(turns + i) == 2:
        row = plan + i * PLAN
        first, count = tl.load(span + 2 * i), tl.load(span + 2 * i + 1)
        d_square = _total(partials, first, count, LANES)
        p_square = _total(partials + all_chunks, first, count, LANES)
        a = arenas + tl.load(arena_of + i) * ARENA_COLUMNS
        tensor = tensors + i * COLUMNS
        lr = tl.load(row + 8).to(tl.float64)
        sqrt_n = tl.sqrt(tl.load(tensor + 7).to(tl.float64))
        if EARLY:  # would a guess have been right?
            factor, change, most = tl.load(row), tl.load(row + 15), tl.load(row + 16)
            right = _holds(tl.sqrt(d_square), tl.sqrt(p_square), lr, sqrt_n, factor, change, most, a)
            tl.store(row + 14, tl.where(right, tl.minimum(tl.load(row + 14) + 1, PATIENCE), 0.0))
        _hold_to_region(
            i, a, tensor, row, stats, partials, all_chunks, first, count, d_square, p_square, lr, tl.load(row + 10),
            sqrt_n, SPHERE, PLAIN, SLACK, LANES,
        )  # fmt: skip


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


@triton.jit
def _summarise(stats, control, out, n_tensors, buckets, clipped):
    """The metrics of `C3O.metrics_tensor`, in its order."""
    LANES: tl.constexpr = 1024
    # Counts are exact. Ratios are added in float64: the layout's order of addition hardly ever shows in float32.
    skipped, exact = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    capped, ratio = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float64)
    for at in range(0, n_tensors, LANES):
        i = at + tl.arange(0, LANES)
        row = stats + i * 4
        skipped += tl.load(row, mask=i < n_tensors, other=0.0)
        exact += tl.load(row + 1, mask=i < n_tensors, other=0.0)
        capped += tl.load(row + 2, mask=i < n_tensors, other=0.0)
        ratio += tl.load(row + 3, mask=i < n_tensors, other=0.0).to(tl.float64)
    trusted = tl.maximum(tl.sum(skipped) + tl.sum(exact), 1.0)
    tl.store(out, tl.sum(skipped))
    tl.store(out + 1, tl.sum(exact))
    tl.store(out + 2, tl.sum(capped))
    tl.store(out + 3, (tl.sum(ratio) / trusted).to(tl.float32))
    tl.store(out + 4, tl.load(control))
    tl.store(out + 5, buckets.to(tl.float32))
    tl.store(out + 6, clipped.to(tl.float32))
