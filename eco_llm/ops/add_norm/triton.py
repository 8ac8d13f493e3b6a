# Kernels build tuples of tiles by `+`, for they know no unpacking, and rebind a name with another number of them.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, no-untyped-def, var-annotated"
"""Residual sum and RMSNorm as Triton kernels. Maths and bytes: README.md beside this file.

What a program has of a row stays in registers, in chunks of four channels a thread whatever the type, so that
everything is read once and nothing changes threads where float32 meets bfloat16. Forward takes `ROWS` rows at a time,
up to 768 channels each in one warp, whose sums are shuffles. Backward takes one row in all its warps: a thread then has
the same channels of every row, and its share of dWeight needs no exchange, in a persistent grid that leaves one sum a
program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eco_llm.ops.add_norm import MAX_TRITON_CHANNELS
from eco_llm.ops.partials import sum_partials
from eco_llm.ops.rows import load_row, programs_for, store_chunk

_CHUNKS = 6  # of a row at most, in forward
_CHANNELS_OF_A_WARP = 128  # in a chunk: four a thread, 16 bytes of float32
_FORWARD_WARPS, _BACKWARD_WARPS = 4, 4
_RESIDENT_WARPS = 32  # of backward on a multiprocessor: more would leave more partial sums, fewer would wait longer


@triton.jit
def _load(pointer, k: tl.constexpr, live, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Chunk k of ROWS rows, in its own type; 0 beyond C and in rows that are not live."""
    columns = k * CHUNK + tl.arange(0, CHUNK)[None, :]
    here = pointer + (tl.arange(0, ROWS)[:, None] * C + columns)
    inside = live
    if (k + 1) * CHUNK > C:
        inside = live & (columns < C)
    return tl.load(here, mask=inside, other=0.0)


@triton.jit
def _store(pointer, value, k: tl.constexpr, live, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    columns = k * CHUNK + tl.arange(0, CHUNK)[None, :]
    here = pointer + (tl.arange(0, ROWS)[:, None] * C + columns)
    inside = live
    if (k + 1) * CHUNK > C:
        inside = live & (columns < C)
    tl.store(here, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _load_weight(weight, k: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Chunk k of the weight beside each row, read as rows are: read once, it would change threads before its use."""
    columns = k * CHUNK + tl.arange(0, CHUNK)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    return tl.load(weight + columns, mask=columns < C, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def add_norm_forward_kernel(
    x, delta, weight, total, normed, eps, rows,
    C: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_TOTAL: tl.constexpr,
):  # fmt: skip
    """HAS_TOTAL: the sum is written too."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    live = (first + tl.arange(0, ROWS) < rows)[:, None]
    x += first * C
    delta += first * C
    total += first * C
    normed += first * C
    now = ()
    for k in tl.static_range(N):
        value = _load(x, k, live, C, CHUNK, ROWS).to(tl.float32)
        if HAS_DELTA:
            value += _load(delta, k, live, C, CHUNK, ROWS).to(tl.float32)
        now = now + (value,)
    squares = tl.zeros((ROWS, CHUNK), tl.float32)
    for k in tl.static_range(N):
        if HAS_TOTAL:
            _store(total, now[k], k, live, C, CHUNK, ROWS)
        squares += now[k] * now[k]
    inverse = (1.0 / tl.sqrt(tl.sum(squares, axis=1) / C + eps))[:, None]
    for k in tl.static_range(N):
        _store(normed, now[k] * inverse * _load_weight(weight, k, C, CHUNK, ROWS), k, live, C, CHUNK, ROWS)


@triton.jit
def _sums(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit(do_not_specialize=["rows"])
def add_norm_backward_kernel(
    d_total, other, beside, d_normed, x, delta, weight, dx, narrowed, partials, eps, rows,
    C: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, HAS_D_TOTAL: tl.constexpr, HAS_OTHER: tl.constexpr,
    HAS_BESIDE: tl.constexpr, HAS_DELTA: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """HAS_DELTA: x + delta is the sum, else x is. NARROW: dx is written a second time, in the type of `narrowed`.
    HAS_OTHER: dx, rounded to the type of x, gets `other` added before d_total. HAS_BESIDE: `narrowed` gets `beside`
    added, after dx was rounded to its type.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, CHUNK)
    d_scale = ()
    for _ in tl.static_range(N):
        d_scale = d_scale + (tl.zeros((CHUNK,), tl.float32),)
    for row in range(program, rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * C
        # All reads first: they wait for memory together.
        gradient = load_row(d_normed + at, C, CHUNK, N)
        now = load_row(x + at, C, CHUNK, N)
        if HAS_DELTA:
            added = load_row(delta + at, C, CHUNK, N)
        if HAS_D_TOTAL:
            passing = load_row(d_total + at, C, CHUNK, N)
        if HAS_OTHER:
            sent = load_row(other + at, C, CHUNK, N)
        if HAS_BESIDE:
            received_beside = load_row(beside + at, C, CHUNK, N)
        total = ()
        for k in tl.static_range(N):
            value = now[k].to(tl.float32)
            if HAS_DELTA:
                value += added[k].to(tl.float32)
            total = total + (value,)
        now = total
        squares = tl.zeros((CHUNK,), tl.float32)
        products = tl.zeros((CHUNK,), tl.float32)
        for k in tl.static_range(N):
            scale = tl.load(weight + k * CHUNK + columns, mask=k * CHUNK + columns < C, other=0.0)
            squares += now[k] * now[k]
            products += now[k] * (scale * gradient[k].to(tl.float32))
        square, product = tl.reduce((squares, products), 0, _sums)  # in one exchange between the warps
        # ds = inverse (w dn − n mean(n w dn)) with n = s · inverse
        inverse = 1.0 / tl.sqrt(square / C + eps)
        mean = product / C * inverse
        summed = ()
        for k in tl.static_range(N):
            # Read again: the weight lies in the fastest cache, and registers limit the programs.
            scale = tl.load(weight + k * CHUNK + columns, mask=k * CHUNK + columns < C, other=0.0)
            normal = now[k] * inverse
            received = gradient[k].to(tl.float32)
            ds = scale * received - normal * mean
            if HAS_OTHER or HAS_BESIDE:
                # The bits of the sums that these take the place of: the product is rounded before anything is added.
                ds = tl.fma(ds, inverse, 0.0)
            else:
                ds = inverse * ds
            if HAS_OTHER:
                ds = ds.to(x.dtype.element_ty).to(tl.float32) + sent[k].to(tl.float32)
            if HAS_D_TOTAL:
                ds += passing[k]
            store_chunk(dx + at, ds, k, C, CHUNK)
            if HAS_BESIDE:
                ds = ds.to(narrowed.dtype.element_ty).to(tl.float32) + received_beside[k].to(tl.float32)
            if NARROW:
                store_chunk(narrowed + at, ds, k, C, CHUNK)
            summed = summed + (d_scale[k] + received * normal,)
        d_scale = summed
    partials += program.to(tl.int64) * C
    for k in tl.static_range(N):
        store_chunk(partials, d_scale[k], k, C, CHUNK)


def _forward_shape(channels: int) -> dict[str, int]:
    """How a program cuts rows of so many channels: of `_FORWARD_WARPS` warps, or as many as a row needs."""
    chunk = max(_CHANNELS_OF_A_WARP, triton.next_power_of_2(triton.cdiv(channels, _CHUNKS)))
    of_a_row = chunk // _CHANNELS_OF_A_WARP
    warps = max(_FORWARD_WARPS, of_a_row)
    return {
        "C": channels, "CHUNK": chunk, "N": triton.cdiv(channels, chunk), "ROWS": warps // of_a_row,
        "num_warps": warps, "num_stages": 1,
    }  # fmt: skip


def _backward_shape(channels: int) -> dict[str, int]:
    """A row lies in four warps, or in as many more as leave a thread at most 16 of its channels."""
    warps = _BACKWARD_WARPS
    while channels > 4 * _CHANNELS_OF_A_WARP * warps:
        warps *= 2
    chunk = _CHANNELS_OF_A_WARP * warps
    return {"C": channels, "CHUNK": chunk, "N": triton.cdiv(channels, chunk), "num_warps": warps, "num_stages": 1}


def _check(x: Tensor, weight: Tensor, types: tuple[torch.dtype, ...], **others: Tensor | None) -> None:
    if x.ndim != 3 or weight.shape != x.shape[2:] or not 1 <= x.shape[2] <= MAX_TRITON_CHANNELS:
        raise ValueError(
            f"need x [B, T, D ≤ {MAX_TRITON_CHANNELS}], weight [D], got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    if x.dtype not in types or weight.dtype != torch.float32:
        raise ValueError(f"need x in {' or '.join(map(str, types))}, weight in float32, got {x.dtype}, {weight.dtype}")
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError("need x and weight contiguous")
    for name, other in others.items():
        if other is not None and (other.shape != x.shape or not other.is_contiguous()):
            raise ValueError(f"need {name} of the shape of x, {tuple(x.shape)}, contiguous, got {tuple(other.shape)}")


def add_norm_forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """s = x + delta, or a copy of x, and its RMSNorm.

    Args:
        x: [B, T, D] float32, contiguous, D ≤ 8192.
        delta: [B, T, D], contiguous, float32 or bfloat16; or None.
        weight: [D] float32.
        eps: added to the mean square.
        dtype: of the norm, float32 or bfloat16.

    Returns:
        (s [B, T, D] float32, the norm [B, T, D]), contiguous.

    Raises:
        ValueError: shapes, types or strides that do not fit.
    """
    _check(x, weight, (torch.float32,), delta=delta)
    total, normed = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    _forward(x, delta, weight, total, normed, eps)
    return total, normed


def norm_forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The norm alone of `add_norm_forward`, and the same; x may be bfloat16 too, delta None is 0."""
    _check(x, weight, (torch.float32, torch.bfloat16), delta=delta)
    normed = torch.empty_like(x, dtype=dtype)
    _forward(x, delta, weight, None, normed, eps)
    return normed


def _forward(x: Tensor, delta: Tensor | None, weight: Tensor, total: Tensor | None, normed: Tensor, eps: float) -> None:
    if x.numel() == 0:
        return
    rows, shape = x.shape[0] * x.shape[1], _forward_shape(x.shape[2])
    add_norm_forward_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
        x, x if delta is None else delta, weight, normed if total is None else total, normed, eps, rows,
        HAS_DELTA=delta is not None, HAS_TOTAL=total is not None, **shape,
    )  # fmt: skip


def add_norm_backward(
    d_total: Tensor | None, d_normed: Tensor, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float,
    narrow: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of `add_norm_forward`; statistics are computed again. Deterministic.

    Args:
        d_total: [B, T, D] float32, the gradient of s but for what comes through the norm; None: zero.
        d_normed: [B, T, D], the gradient of the norm.
        x, delta, weight, eps: as in `add_norm_forward` or `norm_forward`; delta None if x is s.
        narrow: the type that the gradient of delta is wanted in.

    All [B, T, D] are contiguous.

    Returns:
        (that of x [B, T, D] in its type, the same in `narrow`, None where that is its type, dweight [D] float32).

    Raises:
        ValueError: shapes, types or strides that do not fit.
    """
    _check(x, weight, (torch.float32, torch.bfloat16), d_total=d_total, d_normed=d_normed, delta=delta)
    dx = torch.empty_like(x)
    narrowed = None if narrow == x.dtype else torch.empty_like(x, dtype=narrow)
    return dx, narrowed, _backward(d_normed, x, delta, weight, eps, dx, narrowed, d_total=d_total)


def norm_backward_beside(
    d_normed: Tensor, x: Tensor, delta: Tensor, weight: Tensor, eps: float, beside: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `norm_forward` of x + delta, `beside` being what else delta's gradient gets. Deterministic.

    Args:
        d_normed, x, delta, weight, eps: as for `add_norm_backward`.
        beside: [B, T, D] in the type of delta, contiguous.

    Returns:
        (that of x [B, T, D] in its type, that of delta [B, T, D] in its own, dweight [D] float32): the bits of
        `add_norm_backward` and a sum in the type of delta after it.

    Raises:
        ValueError: shapes, types or strides that do not fit.
    """
    _check(x, weight, (torch.float32, torch.bfloat16), d_normed=d_normed, delta=delta, beside=beside)
    if beside.dtype != delta.dtype:
        raise ValueError(f"need beside in the type of delta, {delta.dtype}, got {beside.dtype}")
    dx, d_delta = torch.empty_like(x), torch.empty_like(delta)
    return dx, d_delta, _backward(d_normed, x, delta, weight, eps, dx, d_delta, beside=beside)


def norm_backward_added(
    d_normed: Tensor, x: Tensor, weight: Tensor, eps: float, total: Tensor, other: Tensor, narrow: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`add_up(total, other, the gradient of x, narrow)`, without that gradient in memory. Deterministic.

    Args:
        d_normed, x, weight, eps: as for `add_norm_backward`, without delta.
        total: [B, T, D] float32.
        other: [B, T, D], float32 or bfloat16.
        narrow: of the second result.

    All [B, T, D] are contiguous.

    Returns:
        (the sum [B, T, D] float32, the same in `narrow`, None where that is float32, dweight [D] float32).

    Raises:
        ValueError: shapes, types or strides that do not fit.
    """
    _check(x, weight, (torch.float32, torch.bfloat16), d_normed=d_normed, total=total, other=other)
    if total.dtype != torch.float32:
        raise ValueError(f"need a float32 total, got {total.dtype}")
    added = torch.empty_like(total)
    narrowed = None if narrow == total.dtype else torch.empty_like(total, dtype=narrow)
    d_weight = _backward(d_normed, x, None, weight, eps, added, narrowed, d_total=total, other=other)
    return added, narrowed, d_weight


def _backward(
    d_normed: Tensor, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dx: Tensor, narrowed: Tensor | None,
    *, d_total: Tensor | None = None, other: Tensor | None = None, beside: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dweight [D]; dx and narrowed are written."""
    if x.numel() == 0:
        return torch.zeros_like(weight)
    channels = x.shape[2]
    rows, shape = x.shape[0] * x.shape[1], _backward_shape(channels)
    programs = programs_for(rows, shape["num_warps"], _RESIDENT_WARPS, x.device)
    partials = torch.empty((programs, channels), dtype=torch.float32, device=x.device)
    given = [x if t is None else t for t in (d_total, other, beside)]
    add_norm_backward_kernel[(programs,)](
        *given, d_normed, x, x if delta is None else delta, weight, dx, dx if narrowed is None else narrowed, partials,
        eps, rows, HAS_D_TOTAL=d_total is not None, HAS_OTHER=other is not None, HAS_BESIDE=beside is not None,
        HAS_DELTA=delta is not None, NARROW=narrowed is not None, **shape,
    )  # fmt: skip
    return sum_partials(partials)[0]
