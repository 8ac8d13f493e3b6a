# Kernels build tuples of tiles by `+`, for they know no unpacking.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""The residual stream's addition and RMSNorm as Triton kernels that write and read codes. Maths: README.md.

A program owns a row (a token) at a time, which stays in registers between the sum over it and its use. Backward is a
persistent grid: a program keeps its share of the weight's gradient in registers over all its rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eco_llm.ops.add_norm import MAX_TRITON_CHANNELS
from eco_llm.ops.partials import sum_partials
from eco_llm.ops.quantize import reference as numbers
from eco_llm.ops.quantize.triton import narrowed, signed_keys, step_keys
from eco_llm.ops.rows import load_row, load_row_of_codes, programs_for, row_shape, store_chunk, store_codes

_FORWARD_CHANNELS, _BACKWARD_CHANNELS = 8, 4  # a thread and chunk, at most
_BACKWARD_WARPS = 20  # on a multiprocessor at a time: 96 registers a thread, by ptxas for compute capability 9.0


@triton.jit(do_not_specialize=["key0", "key1"])
def residual_norm_kernel(
    x, y, weight, total, u, inverses, codes, scales, step, key0, key1, eps,
    C: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, ADD: tl.constexpr,
    BITS: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """ADD: x + y is written to `total`; else neither y nor total is touched."""
    row = tl.program_id(0)
    here = row.to(tl.int64) * C
    now = load_row(x + here, C, CHUNK, N)
    if ADD:
        added = load_row(y + here, C, CHUNK, N)
        summed = ()
        for k in tl.static_range(N):
            summed = summed + (now[k] + added[k].to(tl.float32),)
            store_chunk(total + here, summed[k], k, C, CHUNK)
        now = summed
    gain = load_row(weight, C, CHUNK, N)
    squares = tl.zeros((CHUNK,), tl.float32)
    for k in tl.static_range(N):
        squares += now[k] * now[k]
    inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / C + eps)
    tl.store(inverses + row, inverse)
    key0, key1 = step_keys(step, key0, key1)
    for k in tl.static_range(N):
        value = narrowed(now[k] * inverse * gain[k], u.dtype.element_ty)
        store_chunk(u + here, value, k, C, CHUNK)
        store_codes(codes, scales, value, row, k, key0, key1, C, CHUNK, BITS, SLOPE)


@triton.jit(do_not_specialize=["rows"])
def residual_norm_backward_kernel(
    d_u, codes, scales, inverses, weight, d_total, d_sum, d_added, partials, rows,
    C: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, ADDED: tl.constexpr,
    BITS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """d_u becomes u: a row is wholly read, by the sum over it, before its first write. ADDED: d_sum is written to
    `d_added` too, in its type.
    """
    first = tl.program_id(0)
    columns = tl.arange(0, CHUNK)
    gain = load_row(weight, C, CHUNK, N)
    over = ()
    d_gain = ()
    for k in tl.static_range(N):
        over = over + (tl.where(tl.abs(gain[k]) < 1.1754944e-38, 0.0, 1.0 / gain[k]),)
        d_gain = d_gain + (tl.zeros((CHUNK,), tl.float32),)
    for row in range(first, rows, tl.num_programs(0)):
        here = tl.cast(row, tl.int64) * C
        gradient = load_row(d_u + here, C, CHUNK, N)
        passing = load_row(d_total + here, C, CHUNK, N)
        value = load_row_of_codes(codes, scales, row, C, CHUNK, N, BITS, d_u.dtype.element_ty, LARGEST)
        inverse = tl.load(inverses + row)
        products = tl.zeros((CHUNK,), tl.float32)
        for k in tl.static_range(N):
            products += value[k].to(tl.float32) * gradient[k].to(tl.float32)
        mean = tl.sum(products, axis=0) / C
        # Codes and gradients may be spread over the threads in unlike ways, and u is written where d_u was read.
        tl.debug_barrier()
        summed = ()
        for k in tl.static_range(N):
            before = value[k].to(tl.float32)
            d = gradient[k].to(tl.float32)
            store_chunk(d_u + here, value[k], k, C, CHUNK)
            # Read again: the weight lies in the fastest cache, and registers limit the programs.
            again = tl.load(weight + k * CHUNK + columns, mask=k * CHUNK + columns < C, other=0.0)
            through = passing[k] + inverse * (again * d - before * over[k] * mean)
            store_chunk(d_sum + here, through, k, C, CHUNK)
            if ADDED:
                store_chunk(d_added + here, through, k, C, CHUNK)
            summed = summed + (d_gain[k] + d * before,)
        d_gain = summed
    for k in tl.static_range(N):
        store_chunk(partials + first.to(tl.int64) * C, d_gain[k] * over[k], k, C, CHUNK)


class Normed(NamedTuple):
    """What `residual_norm_to_codes` returns."""

    total: Tensor
    """[B, T, D] float32, x + y; x itself if there was no y."""
    u: Tensor
    """[B, T, D], its norm."""
    inverse: Tensor
    """[B·T] float32, 1 / rms."""
    codes: Tensor
    """Codes and scales: what `quantize` makes of u."""
    scales: Tensor


def residual_norm_to_codes(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, bits: int, step: Tensor, stream: int
) -> Normed:
    """The addition and the norm, and what `quantize` makes of its result, from one reading. One launch.

    Args:
        x: [B, T, D] float32, contiguous, not empty; D a multiple of 64, at most 8192, fewer than 2^34 elements.
        y: [B, T, D] contiguous, float32 or bfloat16; None adds nothing.
        weight: [D] float32.
        eps: added to the mean square.
        dtype: of u, float32 or bfloat16.
        bits, step, stream: as in `eco_llm.ops.quantize.quantize`.

    Raises:
        ValueError: shapes, types or strides that do not fit.
    """
    _check(x, weight, y)
    channels = x.shape[2]
    rows = x.numel() // channels
    total = x if y is None else torch.empty_like(x)
    u = torch.empty(x.shape, dtype=dtype, device=x.device)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    codes, scales = numbers.empty_codes(u.numel(), bits, u)
    residual_norm_kernel[(rows,)](
        x, x if y is None else y, weight, total, u, inverse, codes, scales.view(torch.int16), step,
        *signed_keys(stream), eps, ADD=y is not None, BITS=bits, SLOPE=numbers.slope(bits),
        **row_shape(channels, _FORWARD_CHANNELS),
    )  # fmt: skip
    return Normed(total, u, inverse, codes, scales)


class NormBackward:
    """The gradient of `residual_norm_to_codes`, from what it left.

    A sub-layer's backward calls it with the gradient of u, and gets u for the gradient of the weight that read it; what
    else comes of it is in the attributes then.

    Args:
        kept: codes and scales, 1 / rms, and the norm's weight.
        bits: of the codes.
        d_total: [B, T, D] float32: what reaches x + y by other ways.
        added: type of the gradient of y; float32 makes no second tensor.
    """

    d_sum: Tensor
    """[B, T, D] float32, of x and of x + y."""
    d_added: Tensor
    """[B, T, D], the same in the type that was asked for."""
    d_weight: Tensor
    """[D] float32."""

    def __init__(
        self, kept: tuple[Tensor, Tensor, Tensor, Tensor], bits: int, d_total: Tensor, added: torch.dtype
    ) -> None:
        self._kept, self._bits, self._d_total, self._added = kept, bits, d_total.contiguous(), added

    def __call__(self, d_u: Tensor) -> Tensor:
        """u as the codes have it, in the place of d_u [B, T, D], contiguous. One launch and a sum; deterministic.

        Raises:
            ValueError: shapes, types or strides that do not fit.
        """
        codes, scales, inverse, weight = self._kept
        _check(self._d_total, weight, d_u)
        channels = d_u.shape[-1]
        rows = d_u.numel() // channels
        self.d_sum = self.d_added = torch.empty_like(self._d_total)
        if self._added != torch.float32:
            self.d_added = torch.empty(d_u.shape, dtype=self._added, device=d_u.device)
        shape = row_shape(channels, _BACKWARD_CHANNELS)
        programs = programs_for(rows, shape["num_warps"], _BACKWARD_WARPS, d_u.device)
        partials = torch.empty((programs, channels), dtype=torch.float32, device=d_u.device)
        residual_norm_backward_kernel[(programs,)](
            d_u, codes, scales.view(torch.int16), inverse, weight, self._d_total, self.d_sum, self.d_added, partials,
            rows, ADDED=self.d_added is not self.d_sum, BITS=self._bits, LARGEST=torch.finfo(d_u.dtype).max, **shape,
        )  # fmt: skip
        (self.d_weight,) = sum_partials(partials)
        return d_u


def _check(x: Tensor, weight: Tensor, other: Tensor | None) -> None:
    fits = x.ndim == 3 and x.numel() and x.shape[2] % numbers.GROUP == 0 and x.shape[2] <= MAX_TRITON_CHANNELS
    if not fits or weight.shape != x.shape[2:]:
        raise ValueError(
            f"need a stream [B, T, D], not empty, D a multiple of {numbers.GROUP} up to {MAX_TRITON_CHANNELS}, and a"
            f" weight [D], got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        raise ValueError(f"need the stream and the weight in float32, got {x.dtype}, {weight.dtype}")
    if other is not None and other.shape != x.shape:
        raise ValueError(f"need a second tensor of the shape of the stream, {tuple(x.shape)}, got {tuple(other.shape)}")
    if not all(t.is_contiguous() for t in (x, weight, *([] if other is None else [other]))):
        raise ValueError("need contiguous tensors")
