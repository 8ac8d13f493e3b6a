"""The SSD kernels. What they compute and why in this order: README.md beside this file, "The Triton kernels".

Shape legend: L = BLOCK tokens (one tile), a chunk is SUB tiles (in backward one); P channels of a head, N state size;
all sums float32. "Heads" here are slices of P ≤ 64 channels: a wider head is SPLIT of them, which share dt, A and D.
Scratch: dt and cum [B, H, Tp], the step sizes and the inclusive sums of dt·A from the start of their chunk (Tp is T
rounded up to whole chunks; dt = 0 past T); states [B, chunks, heads, N, P], the state that enters each chunk.
Offsets that grow with B·T are 64-bit. Decays are made by `_power`: `exp` takes five instructions, for it scales its
argument, and again where the result is under the smallest normal number.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(v):
    """log(1 + e^v), accurate also where e^v is far under 1 (log1p by Goldberg's quotient)."""
    small = tl.exp(-tl.abs(v))
    one_plus = 1.0 + small
    log1p = tl.where(one_plus == 1.0, small, tl.log(one_plus) * (small / (one_plus - 1.0)))
    return tl.maximum(v, 0.0) + log1p


@triton.jit
def _power(x):
    """e^x in two instructions. x, a difference of large sums, is scaled after they were subtracted, or the rounding of
    each would show.
    """
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _rates(A, h, H, OF_LOGS: tl.constexpr):
    """A [H] float32, or −exp of what is given."""
    value = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32)
    if OF_LOGS:
        value = -tl.exp(value)
    return value


@triton.jit
def decay_kernel(
    raw, bias, A, dt_out, cum_out, T, H, Tp, raw_sb, raw_st,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, OF_LOGS: tl.constexpr,
):  # fmt: skip
    """dt (after softplus, if asked) and cum, from [B, T, H] to [B, H, Tp]. Grid: chunk, batch."""
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    h = tl.arange(0, HEADS)
    inside = (t < T)[:, None] & (h < H)[None, :]
    v = tl.load(raw + b * raw_sb + t.to(tl.int64)[:, None] * raw_st + h[None, :], mask=inside, other=0.0).to(tl.float32)
    if SOFTPLUS:
        v = _softplus(v + tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32)[None, :])
    v = tl.where(inside, v, 0.0)
    cum = tl.cumsum(v * _rates(A, h, H, OF_LOGS)[None, :], 0)
    to = (b * H + h.to(tl.int64))[None, :] * Tp + t[:, None]
    real = (h < H)[None, :] & (t < Tp)[:, None]
    tl.store(dt_out + to, v, mask=real)
    tl.store(cum_out + to, cum, mask=real)


@triton.jit
def _walk(
    value, key, dt, cum, states, first, last, b, head, T, heads, tiles, value_sb, value_st, key_sb, key_st, n0, column,
    P: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr,
    ROWS: tl.constexpr, REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """state <- decay · state + keyᵀ (weight · value) over the tiles of one head, leaving the state that enters (in the
    direction walked) each chunk in `states`; its ROWS from n0 and COLUMNS from `column`. Forward: key B, value x,
    weight dt·e^(end − cum). Reverse: the state's gradient, key C, value dy, weight e^(cum − start).
    """
    n, p, row = n0 + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    in_state = p[None, :] + n[:, None] * P
    public = p[None, :] * N + n[:, None]  # the caller's states are [P, N]
    base = (b * heads + head) * N * P
    state = tl.zeros((ROWS, COLUMNS), tl.float32)
    if HAS_FIRST:
        state = tl.load(first + base + public).to(tl.float32)
    tile = tiles - 1 if REVERSE else tiles * 0
    for _ in range(tiles):
        boundary = (tile + 1) % SUB == 0 if REVERSE else tile % SUB == 0
        if boundary:
            where = ((b * (tiles // SUB) + tile // SUB) * heads + head) * N * P
            tl.store(states + where + in_state, state.to(states.dtype.element_ty))
        start = tile.to(tl.int64) * BLOCK
        inside = (start + row < T)[:, None]
        v = tl.load(
            value + start * value_st + row[:, None] * value_st + head * P + p[None, :],
            mask=inside, other=0.0,
        )  # fmt: skip
        k = tl.load(key + start * key_st + row[:, None] * key_st + n[None, :], mask=inside, other=0.0)
        c = tl.load(cum + start + row)
        end = tl.load(cum + start + BLOCK - 1)
        before = 0.0
        if SUB > 1:
            before = tl.load(cum + start - 1, mask=tile % SUB != 0, other=0.0)
        if REVERSE:
            weight = _power(c - before)
        else:
            weight = tl.load(dt + start + row) * _power(end - c)
        weighted = (v.to(tl.float32) * weight[:, None]).to(k.dtype)
        state = tl.dot(tl.trans(k), weighted, state * _power(end - before), input_precision=PRECISION)
        tile += -1 if REVERSE else 1
    if HAS_LAST:
        tl.store(last + base + public, state)


@triton.jit
def walk_kernel(
    x, B, dy, C, dt, cum, states, d_states, initial, final, d_final, d_initial,
    T, Tp, heads, tiles, x_sb, x_st, B_sb, B_st, dy_sb, dy_st, C_sb, C_st,
    P: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SUB: tl.constexpr, SPLIT: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr, HAS_D_FINAL: tl.constexpr, HAS_D_INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: parts of the state, batch · heads, directions (1: forward; 2: forward and the gradient's reverse)."""
    column, n0 = tl.program_id(0) % (P // COLUMNS) * COLUMNS, tl.program_id(0) // (P // COLUMNS) * ROWS
    b, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    group = head // HEADS_PER_GROUP
    of_head = (b * (heads // SPLIT) + head // SPLIT) * Tp
    if tl.program_id(2) == 0:
        _walk(
            x + b * x_sb, B + b * B_sb + group * N, dt + of_head, cum + of_head, states, initial, final,
            b, head, T, heads, tiles, x_sb, x_st, B_sb, B_st, n0, column,
            P, N, COLUMNS, BLOCK, SUB, ROWS, False, HAS_INITIAL, HAS_FINAL, PRECISION,
        )  # fmt: skip
    else:
        _walk(
            dy + b * dy_sb, C + b * C_sb + group * N, dt + of_head, cum + of_head, d_states, d_final, d_initial,
            b, head, T, heads, tiles, dy_sb, dy_st, C_sb, C_st, n0, column,
            P, N, COLUMNS, BLOCK, SUB, ROWS, True, HAS_D_FINAL, HAS_D_INITIAL, PRECISION,
        )  # fmt: skip


@triton.jit
def output_kernel(
    x, B, C, dt, cum, states, D, y, T, Tp, heads, tiles, x_sb, x_st, B_sb, B_st, C_sb, C_st, y_sb, y_st,
    P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr, SPLIT: tl.constexpr,
    HEADS: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, HAS_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one tile for HEADS heads, which share the scores C·B. Grid: tile, heads / HEADS, batch."""
    tile, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * HEADS
    group = head // HEADS_PER_GROUP
    row, n, p = tl.arange(0, BLOCK), tl.arange(0, N), tl.arange(0, P)
    start = tile.to(tl.int64) * BLOCK
    inside = (start + row < T)[:, None]
    x += b * x_sb + p[None, :]
    B += b * B_sb + group * N + n[None, :]
    y += b * y_sb + start * y_st + p[None, :]
    c_tile = tl.load(C + b * C_sb + group * N + (start + row)[:, None] * C_st + n[None, :], mask=inside, other=0.0)
    b_tile = tl.load(B + (start + row)[:, None] * B_st, mask=inside, other=0.0)
    scores = tl.dot(c_tile, tl.trans(b_tile), input_precision=PRECISION)
    causal = row[:, None] >= row[None, :]
    for _ in range(HEADS):
        of_head = (b * (heads // SPLIT) + head // SPLIT) * Tp
        cum_t = tl.load(cum + of_head + start + row)
        dt_t = tl.load(dt + of_head + start + row)
        entering = tl.load(
            states + ((b * (tiles // SUB) + tile // SUB) * heads + head) * N * P + n[:, None] * P + p[None, :]
        )
        x_tile = tl.load(x + (start + row)[:, None] * x_st + head * P, mask=inside, other=0.0)
        out = tl.dot(c_tile, entering, input_precision=PRECISION) * _power(cum_t)[:, None]
        decay = _power(tl.where(causal, cum_t[:, None] - cum_t[None, :], float("-inf")))
        weights = (scores * decay * dt_t[None, :]).to(x_tile.dtype)
        out = tl.dot(weights, x_tile, out, input_precision=PRECISION)
        if SUB > 1:
            first = tile.to(tl.int64) // SUB * SUB * BLOCK
            for _j in range(tile % SUB):  # earlier tiles of the chunk
                real = (first + row < T)[:, None]
                b_j = tl.load(B + (first + row)[:, None] * B_st, mask=real, other=0.0)
                x_j = tl.load(x + (first + row)[:, None] * x_st + head * P, mask=real, other=0.0)
                decay_j = _power(cum_t[:, None] - tl.load(cum + of_head + first + row)[None, :])
                decay_j *= tl.load(dt + of_head + first + row)[None, :]
                weights_j = tl.dot(c_tile, tl.trans(b_j), input_precision=PRECISION) * decay_j
                out = tl.dot(weights_j.to(x_j.dtype), x_j, out, input_precision=PRECISION)
                first += BLOCK
        if HAS_D:
            out += tl.load(D + head // SPLIT).to(tl.float32) * x_tile.to(tl.float32)
        tl.store(y + row[:, None] * y_st + head * P, out.to(y.dtype.element_ty), mask=inside)
        head += 1


@triton.jit
def _source_gradients(
    x, B, C, dy, dt, cum, states, d_states, D, dx, d_b_out, col_out, state_out, carry_out, d_skip, tile, b, head,
    T, Tp, heads, tiles, x_st, B_st, C_st, dy_st, dx_st, width,
    P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr,
    HAS_D: tl.constexpr, PRECISION: tl.constexpr, WANT_X: tl.constexpr,
):  # fmt: skip
    """The tile's tokens as sources s of later outputs t: dx or dB, and a sum a token each; beside dx exp(c_end) ⟨H, G⟩.
    Matrices are [s, t].

    Here and below, what is wide (64 bits) is added to the pointer, and what differs by lane is narrow: registers are
    what these kernels lack.
    """
    row, n, p = tl.arange(0, BLOCK), tl.arange(0, N), tl.arange(0, P)
    start = tile.to(tl.int64) * BLOCK
    inside = (row < (T - start).to(tl.int32))[:, None]
    c_tile = tl.load((C + start * C_st) + (row[:, None] * C_st + n[None, :]), mask=inside, other=0.0)
    b_tile = tl.load((B + start * B_st) + (row[:, None] * B_st + n[None, :]), mask=inside, other=0.0)
    scores = tl.dot(b_tile, tl.trans(c_tile), input_precision=PRECISION)
    if not WANT_X:
        d_b = tl.zeros((BLOCK, N), tl.float32)
    causal = row[:, None] <= row[None, :]
    for _ in range(HEADS):
        of_head = (b * (heads // SPLIT) + head // SPLIT) * Tp + start
        cum_s = tl.load((cum + of_head) + row)
        dt_s = tl.load((dt + of_head) + row)
        end = tl.load(cum + of_head + BLOCK - 1)
        to_end = _power(end - cum_s)
        x_tile = tl.load((x + start * x_st + head * P) + (row[:, None] * x_st + p[None, :]), mask=inside, other=0.0)
        dy_tile = tl.load((dy + start * dy_st + head * P) + (row[:, None] * dy_st + p[None, :]), mask=inside, other=0.0)
        at = ((b * tiles + tile) * heads + head) * N * P
        d_leaving = tl.load((d_states + at) + (n[:, None] * P + p[None, :]))
        vector = (b * heads + head) * Tp + start + row
        decay = _power(tl.where(causal, cum_s[None, :] - cum_s[:, None], float("-inf")))
        if WANT_X:
            entering = tl.load((states + at) + (n[:, None] * P + p[None, :])).to(tl.float32)
            carry = tl.sum(entering * d_leaving.to(tl.float32)) * _power(end)
            tl.store(carry_out + (b * tiles + tile) * heads + head, carry)
            # Outputs after this tile, through the state that leaves it, then those of the tile.
            d_x = tl.dot(b_tile, d_leaving, input_precision=PRECISION) * to_end[:, None]
            x_wide = x_tile.to(tl.float32)
            tl.store(state_out + vector, tl.sum(x_wide * d_x, 1))
            d_x = tl.dot((scores * decay).to(x_tile.dtype), dy_tile, d_x, input_precision=PRECISION) * dt_s[:, None]
            if HAS_D:
                d_x += tl.load(D + head // SPLIT).to(tl.float32) * dy_tile.to(tl.float32)
            to = (dx + start * dx_st + head * P) + (row[:, None] * dx_st + p[None, :])
            tl.store(to, d_x.to(dx.dtype.element_ty), mask=inside)
        else:
            products = tl.dot(x_tile, tl.trans(dy_tile), input_precision=PRECISION) * decay  # dy_t · x_s
            tl.store(col_out + vector, tl.sum(products * scores, 1))
            if HAS_D:  # no decay on the diagonal
                diagonal = tl.where(row[:, None] == row[None, :], products, 0.0)
                tl.store(d_skip + (b * tiles + tile) * heads + head, tl.sum(diagonal))
            d_b = tl.dot((products * dt_s[:, None]).to(x_tile.dtype), c_tile, d_b, input_precision=PRECISION)
            x_wide = x_tile.to(tl.float32) * (to_end * dt_s)[:, None]
            d_b = tl.dot(x_wide.to(x_tile.dtype), tl.trans(d_leaving), d_b, input_precision=PRECISION)
        head += 1
    if not WANT_X:
        tl.store((d_b_out + start * width) + (row[:, None] * width + n[None, :]), d_b, mask=inside)


@triton.jit
def _output_gradients(
    x, B, C, dy, dt, cum, states, d_c_out, row_out, tile, b, head,
    T, Tp, heads, tiles, x_st, B_st, C_st, dy_st, width,
    P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile's tokens as outputs t of earlier sources s: dC, and a sum a token. Matrices are [t, s]."""
    row, n, p = tl.arange(0, BLOCK), tl.arange(0, N), tl.arange(0, P)
    start = tile.to(tl.int64) * BLOCK
    inside = (row < (T - start).to(tl.int32))[:, None]
    c_tile = tl.load((C + start * C_st) + (row[:, None] * C_st + n[None, :]), mask=inside, other=0.0)
    b_tile = tl.load((B + start * B_st) + (row[:, None] * B_st + n[None, :]), mask=inside, other=0.0)
    scores = tl.dot(c_tile, tl.trans(b_tile), input_precision=PRECISION)
    causal = row[:, None] >= row[None, :]
    d_c = tl.zeros((BLOCK, N), tl.float32)
    for _ in range(HEADS):
        of_head = (b * (heads // SPLIT) + head // SPLIT) * Tp + start
        cum_t = tl.load((cum + of_head) + row)
        dt_t = tl.load((dt + of_head) + row)
        x_tile = tl.load((x + start * x_st + head * P) + (row[:, None] * x_st + p[None, :]), mask=inside, other=0.0)
        dy_tile = tl.load((dy + start * dy_st + head * P) + (row[:, None] * dy_st + p[None, :]), mask=inside, other=0.0)
        chunk_head = (b * tiles + tile) * heads + head
        entering = tl.load((states + chunk_head * N * P) + (n[:, None] * P + p[None, :]))

        # Sources of the same tile, then those before it, through the state that enters it.
        decay = _power(tl.where(causal, cum_t[:, None] - cum_t[None, :], float("-inf"))) * dt_t[None, :]
        products = tl.dot(dy_tile, tl.trans(x_tile), input_precision=PRECISION) * decay
        # Of the very numbers whose sums over t are `col`: what both count twice must cancel (`finish_kernel`).
        row_sum = tl.sum(products * scores, 1)
        d_c = tl.dot(products.to(x_tile.dtype), b_tile, d_c, input_precision=PRECISION)
        dy_wide = dy_tile.to(tl.float32) * _power(cum_t)[:, None]
        row_sum += tl.sum(tl.dot(c_tile, entering, input_precision=PRECISION) * dy_wide, 1)
        d_c = tl.dot(dy_wide.to(dy_tile.dtype), tl.trans(entering), d_c, input_precision=PRECISION)
        tl.store(row_out + (b * heads + head) * Tp + start + row, row_sum)
        head += 1
    tl.store((d_c_out + start * width) + (row[:, None] * width + n[None, :]), d_c, mask=inside)


@triton.jit
def gradient_kernel(
    x, B, C, dy, dt, cum, states, d_states, D, dx, d_bc, row_out, col_out, state_out, carry_out, d_skip,
    T, Tp, heads, tiles, batch, groups, x_sb, x_st, B_sb, B_st, C_sb, C_st, dy_sb, dy_st, dx_sb, dx_st,
    P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr, HAS_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile, which is a chunk, for HEADS heads. dx, dB and dC are for three programs: the registers of
    one hold no more. They are neighbours, for most of what they read is the same. Grid: tile · 3, heads / HEADS, batch.

    Writes dx; this program's share of dB or dC into d_bc [shares, batch, T, 2·groups·N]; and what the gradient of the
    log-decays is made of (see `finish_kernel`): row_out, col_out, state_out [B, heads, Tp], carry_out and d_skip
    [B, tiles, heads].
    """
    tile, role, b = tl.program_id(0) // 3, tl.program_id(0) % 3, tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * HEADS
    group = head // HEADS_PER_GROUP
    share = (head % HEADS_PER_GROUP) // HEADS
    width = 2 * groups * N
    x += b * x_sb
    dy += b * dy_sb
    dx += b * dx_sb
    B += b * B_sb + group * N
    C += b * C_sb + group * N
    d_bc += (share * batch + b) * T * width + group * N
    if role == 0:
        _source_gradients(
            x, B, C, dy, dt, cum, states, d_states, D, dx, d_bc, col_out, state_out, carry_out, d_skip, tile, b, head,
            T, Tp, heads, tiles, x_st, B_st, C_st, dy_st, dx_st, width,
            P, N, BLOCK, SPLIT, HEADS, HAS_D, PRECISION, True,
        )  # fmt: skip
    elif role == 1:
        _source_gradients(
            x, B, C, dy, dt, cum, states, d_states, D, dx, d_bc, col_out, state_out, carry_out, d_skip, tile, b, head,
            T, Tp, heads, tiles, x_st, B_st, C_st, dy_st, dx_st, width,
            P, N, BLOCK, SPLIT, HEADS, HAS_D, PRECISION, False,
        )  # fmt: skip
    else:
        _output_gradients(
            x, B, C, dy, dt, cum, states, d_bc + groups * N, row_out, tile, b, head,
            T, Tp, heads, tiles, x_st, B_st, C_st, dy_st, width, P, N, BLOCK, SPLIT, HEADS, PRECISION,
        )  # fmt: skip


@triton.jit
def finish_kernel(
    raw, bias, A, dt, row_in, col_in, state_in, carry_in, d_skip, d_raw, partial,
    T, H, Tp, chunks, raw_sb, raw_st, d_raw_sb, d_raw_st,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, OF_LOGS: tl.constexpr,
):  # fmt: skip
    """Gradient of dt [B, T, H], and this chunk's share of those of A, dt's bias and D: partial [B · chunks, 3, H].
    Grid: chunk, batch.

    The log-decay of token t acts on every pair (output ≥ t, source < t): outputs at or after t, less sources at or
    after t, plus what earlier sources and the entering state send on through the state that leaves.
    """
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    h = tl.arange(0, HEADS)
    real = (h < H)[None, :] & (t < Tp)[:, None]
    step = tl.load(dt + (b * H + h.to(tl.int64))[None, :] * Tp + t[:, None], mask=real, other=0.0)
    outputs = tl.zeros((CHUNK, HEADS), tl.float32)
    sources = tl.zeros((CHUNK, HEADS), tl.float32)
    by_state = tl.zeros((CHUNK, HEADS), tl.float32)
    carry = tl.zeros((HEADS,), tl.float32)
    skip = tl.zeros((HEADS,), tl.float32)
    for part in range(SPLIT):
        head = h.to(tl.int64) * SPLIT + part
        at = (b * H * SPLIT + head)[None, :] * Tp + t[:, None]
        outputs += tl.load(row_in + at, mask=real, other=0.0)
        sources += tl.load(col_in + at, mask=real, other=0.0)
        by_state += tl.load(state_in + at, mask=real, other=0.0)
        carry += tl.load(carry_in + (b * chunks + chunk) * H * SPLIT + head, mask=h < H, other=0.0)
        if HAS_D:
            skip += tl.load(d_skip + (b * chunks + chunk) * H * SPLIT + head, mask=h < H, other=0.0)
    through = step * by_state
    inner = outputs - step * sources
    # Sums at or after t, and strictly before t.
    d_log = tl.sum(inner, 0)[None, :] - tl.cumsum(inner, 0) + inner + tl.cumsum(through, 0) - through + carry[None, :]
    rate = _rates(A, h, H, OF_LOGS)
    d_step = sources + by_state + rate[None, :] * d_log
    d_rate = tl.sum(step * d_log, 0)
    if OF_LOGS:
        d_rate *= rate
    inside = (t < T)[:, None] & (h < H)[None, :]
    if SOFTPLUS:
        v = tl.load(raw + b * raw_sb + t.to(tl.int64)[:, None] * raw_st + h[None, :], mask=inside, other=0.0)
        v = v.to(tl.float32) + tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        d_step = d_step / (1.0 + tl.exp(-v))
    d_step = tl.where(inside, d_step, 0.0)
    to = d_raw + b * d_raw_sb + t.to(tl.int64)[:, None] * d_raw_st + h[None, :]
    tl.store(to, d_step.to(d_raw.dtype.element_ty), mask=inside)
    share = (b * chunks + chunk) * 3 * H + h
    tl.store(partial + share, d_rate, mask=h < H)
    tl.store(partial + H + share, tl.sum(d_step, 0), mask=h < H)
    if HAS_D:
        tl.store(partial + 2 * H + share, skip, mask=h < H)
