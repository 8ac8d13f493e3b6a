"""SwiGLU as Triton kernels between cuBLAS products. Maths and bytes: README.md beside this file.

Everything between the products is contiguous, so the kernels run over the [rows, F] elements of h as one flat range:
no lane is idle whatever F is. An element's gate lies `row · F` elements further on in a [rows, 2F] array. F is a
constant of the kernel, from whose powers of two the compiler sees how wide it may load.

Where a is kept as codes, kernels run over groups of 64 elements of h instead; those of its gates lie F / 64 groups of a
before those of its ups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eco_llm.ops.products import cast_weight, weight_gradient
from eco_llm.ops.quantize import reference as numbers
from eco_llm.ops.quantize.triton import GROUP, from_codes, signed_keys, step_keys, store_scales, to_codes
from eco_llm.ops.sigmoid import sigmoid

_BLOCK = 1024  # elements of h a program
_TO_CODES = {8: 32, 4: 16}  # groups of h a program, by bits: a thread stores 16 codes of 8 bits in one access
_FROM_CODES = 16
_WARPS = 4


@triton.jit
def _tile(rows, F: tl.constexpr, BLOCK: tl.constexpr):
    """(first element of h, this program's elements from there, those elements' gates from there, mask)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_row = start // F
    lanes = tl.arange(0, BLOCK)
    # Rows inside the tile count in 32 bits: a 64-bit division for every element would cost more than the loads.
    further = ((start - first_row * F).to(tl.int32) + lanes) // F
    return start, lanes, first_row * F + (lanes + further * F), lanes < rows.to(tl.int64) * F - start


@triton.jit(do_not_specialize=["rows"])
def silu_mul_forward_kernel(a, h, rows, F: tl.constexpr, BLOCK: tl.constexpr):
    start, lanes, gates, inside = _tile(rows, F, BLOCK)
    gate = tl.load(a + start + gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(a + start + gates + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + start + lanes, (gate * sigmoid(gate) * up).to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def silu_mul_backward_kernel(a, dh, da, rows, F: tl.constexpr, BLOCK: tl.constexpr, ALIKE: tl.constexpr):
    """dh becomes h."""
    start, lanes, gates, inside = _tile(rows, F, BLOCK)
    here = dh + start + lanes
    gradient = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(a + start + gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(a + start + gates + F, mask=inside, other=0.0).to(tl.float32)
    if not ALIKE:
        # Accesses of unlike alignment are spread over the threads in unlike ways, so that h may be written by a thread
        # other than the one that read dh. Where all are alike, each thread keeps to its own elements.
        tl.debug_barrier()
    share = sigmoid(gate)
    silu = gate * share
    d_gate = gradient * up * (share + silu * (1.0 - share))
    tl.store(here, (silu * up).to(dh.dtype.element_ty), mask=inside)
    tl.store(da + start + gates, d_gate.to(da.dtype.element_ty), mask=inside)
    tl.store(da + start + gates + F, (gradient * silu).to(da.dtype.element_ty), mask=inside)


@triton.jit
def _group_tile(groups, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """(first group of h, this program's from there, first group of a, those of the gates from there, mask); the middle
    ones [GROUPS, 1]. WIDTH = F / 64.
    """
    start = tl.program_id(0).to(tl.int64) * GROUPS
    first_row = start // WIDTH
    here = tl.arange(0, GROUPS)[:, None]
    further = ((start - first_row * WIDTH).to(tl.int32) + here) // WIDTH
    return start, here, start + first_row * WIDTH, here + further * WIDTH, here < groups.to(tl.int64) - start


@triton.jit
def _quads_of(first, groups, GROUPS: tl.constexpr):
    """uint32 [GROUPS, 16]: a quarter of the indices of elements 0, 4, … of groups [GROUPS, 1] counted from `first`."""
    return (first * (GROUP // 4)).to(tl.uint32) + (groups * (GROUP // 4) + tl.arange(0, GROUP // 4)[None, :]).to(
        tl.uint32
    )


@triton.jit(do_not_specialize=["groups", "key0", "key1"])
def silu_mul_to_codes_kernel(
    a, h, codes, scales, step, key0, key1, groups,
    WIDTH: tl.constexpr, BITS: tl.constexpr, SLOPE: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`silu_mul_forward_kernel` and `quantize_kernel` of a at once; groups of h [rows, F / 64]. LANES: threads that
    share a group.
    """
    key0, key1 = step_keys(step, key0, key1)
    start, here, first, gates, inside = _group_tile(groups, WIDTH, GROUPS)
    ups = gates + WIDTH
    lanes = tl.arange(0, GROUP)[None, :]
    a += first * GROUP
    gate = tl.load(a + gates * GROUP + lanes, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(a + ups * GROUP + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + start * GROUP + here * GROUP + lanes, (gate * sigmoid(gate) * up).to(h.dtype.element_ty), mask=inside)
    BYTES: tl.constexpr = GROUP * BITS // 8
    bytes_of = tl.arange(0, BYTES)[None, :]
    codes += first * BYTES
    scales += first
    packed, scale_bits = to_codes(gate, _quads_of(first, gates, GROUPS), key0, key1, GROUPS, BITS, SLOPE)
    tl.store(codes + gates * BYTES + bytes_of, packed, mask=inside)
    store_scales(scales, gates, scale_bits, inside, LANES)
    packed, scale_bits = to_codes(up, _quads_of(first, ups, GROUPS), key0, key1, GROUPS, BITS, SLOPE)
    tl.store(codes + ups * BYTES + bytes_of, packed, mask=inside)
    store_scales(scales, ups, scale_bits, inside, LANES)


@triton.jit(do_not_specialize=["groups"])
def silu_mul_from_codes_kernel(
    codes, scales, dh, da, groups,
    WIDTH: tl.constexpr, BITS: tl.constexpr, LARGEST: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """`silu_mul_backward_kernel` of what the codes stand for: dh becomes h."""
    start, here, first, gates, inside = _group_tile(groups, WIDTH, GROUPS)
    ups = gates + WIDTH
    lanes = tl.arange(0, GROUP)[None, :]
    BYTES: tl.constexpr = GROUP * BITS // 8
    bytes_of = tl.arange(0, BYTES)[None, :]
    codes += first * BYTES
    scales += first
    mine = dh + start * GROUP + here * GROUP + lanes
    gradient = tl.load(mine, mask=inside, other=0.0).to(tl.float32)
    packed = tl.load(codes + gates * BYTES + bytes_of, mask=inside, other=0)
    scale_bits = tl.load(scales + gates, mask=inside, other=0)
    gate = from_codes(packed, scale_bits, GROUPS, BITS, da.dtype.element_ty, LARGEST).to(tl.float32)
    packed = tl.load(codes + ups * BYTES + bytes_of, mask=inside, other=0)
    scale_bits = tl.load(scales + ups, mask=inside, other=0)
    up = from_codes(packed, scale_bits, GROUPS, BITS, da.dtype.element_ty, LARGEST).to(tl.float32)
    tl.debug_barrier()  # codes and gradients may be spread over the threads in unlike ways: see the kernel above
    share = sigmoid(gate)
    silu = gate * share
    d_gate = gradient * up * (share + silu * (1.0 - share))
    tl.store(mine, (silu * up).to(dh.dtype.element_ty), mask=inside)
    da += first * GROUP
    tl.store(da + gates * GROUP + lanes, d_gate.to(da.dtype.element_ty), mask=inside)
    tl.store(da + ups * GROUP + lanes, (gradient * silu).to(da.dtype.element_ty), mask=inside)


def silu_mul_forward(a: Tensor) -> Tensor:
    """h = silu(gate) · up.

    Args:
        a: [..., 2F], contiguous (else it is copied), float32 or bfloat16: gate, then up.

    Returns:
        [..., F], contiguous, in the type of a.
    """
    a = a.contiguous()
    width = a.shape[-1] // 2
    h = torch.empty((*a.shape[:-1], width), dtype=a.dtype, device=a.device)
    if h.numel():
        grid = (triton.cdiv(h.numel(), _BLOCK),)
        silu_mul_forward_kernel[grid](a, h, h.numel() // width, F=width, BLOCK=_BLOCK, num_warps=_WARPS)
    return h


def silu_mul_backward(a: Tensor, dh: Tensor) -> Tensor:
    """The gradient of a, and h in the place of dh. Deterministic.

    Args:
        a: [rows, 2F], contiguous.
        dh: [rows, F], contiguous, the gradient of h; becomes h.

    Returns:
        [rows, 2F], contiguous, in the type of a.

    Raises:
        ValueError: shapes or strides that do not fit.
    """
    rows, width = dh.shape
    if a.shape != (rows, 2 * width) or not (a.is_contiguous() and dh.is_contiguous()):
        raise ValueError(f"need a [rows, 2F] and dh [rows, F], contiguous, got {tuple(a.shape)}, {tuple(dh.shape)}")
    da = torch.empty_like(a)
    if dh.numel():
        grid = (triton.cdiv(dh.numel(), _BLOCK),)
        alike = width % 8 == 0 and all(t.data_ptr() % 16 == 0 for t in (a, dh, da))
        silu_mul_backward_kernel[grid](a, dh, da, rows, F=width, BLOCK=_BLOCK, ALIKE=alike, num_warps=_WARPS)
    return da


class Codes(NamedTuple):
    """What `quantize` makes of a [rows, 2F]."""

    codes: Tensor
    scales: Tensor
    bits: int


def silu_mul_to_codes(a: Tensor, bits: int, step: Tensor, stream: int) -> tuple[Tensor, Codes]:
    """`silu_mul_forward`, and what `quantize` makes of a, from one reading of a.

    Args:
        a: [rows, 2F], contiguous, F a multiple of 64, fewer than 2^34 elements.
        bits, step, stream: as in `eco_llm.ops.quantize.quantize`.

    Returns:
        (h [rows, F] in the type of a, the codes).

    Raises:
        ValueError: a shape, strides or bits that do not fit.
    """
    rows, width = a.shape[0], a.shape[1] // 2
    if a.shape[1] % (2 * numbers.GROUP) or not a.is_contiguous():
        raise ValueError(f"need a [rows, 2F], contiguous, F a multiple of {numbers.GROUP}, got {tuple(a.shape)}")
    codes, scales = numbers.empty_codes(a.numel(), bits, a)
    h = torch.empty((rows, width), dtype=a.dtype, device=a.device)
    if groups := h.numel() // numbers.GROUP:
        of_program = _TO_CODES[bits]
        silu_mul_to_codes_kernel[(triton.cdiv(groups, of_program),)](
            a, h, codes, scales.view(torch.int16), step, *signed_keys(stream), groups, WIDTH=width // numbers.GROUP,
            BITS=bits, SLOPE=numbers.slope(bits), GROUPS=of_program, LANES=32 * _WARPS // of_program,
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return h, Codes(codes, scales, bits)


def silu_mul_from_codes(a: Codes, dh: Tensor) -> Tensor:
    """`silu_mul_backward` of the a that the codes stand for, which is nowhere written.

    Args:
        a: of `silu_mul_to_codes`.
        dh: [rows, F], contiguous, the gradient of h; becomes h.

    Returns:
        [rows, 2F], contiguous, in the type of dh.

    Raises:
        ValueError: shapes or strides that do not fit.
    """
    rows, width = dh.shape
    codes, scales, bits = a
    if width % numbers.GROUP or codes.numel() * 8 != 2 * dh.numel() * bits or not dh.is_contiguous():
        raise ValueError(f"need dh [rows, F], contiguous, of {codes.numel()} bytes of codes, got {tuple(dh.shape)}")
    da = torch.empty((rows, 2 * width), dtype=dh.dtype, device=dh.device)
    if groups := dh.numel() // numbers.GROUP:
        silu_mul_from_codes_kernel[(triton.cdiv(groups, _FROM_CODES),)](
            codes, scales.view(torch.int16), dh, da, groups, WIDTH=width // numbers.GROUP, BITS=bits,
            LARGEST=torch.finfo(dh.dtype).max, GROUPS=_FROM_CODES, num_warps=_WARPS,
        )  # fmt: skip
    return da


def mlp_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(result [B, T, D], a [B·T, 2F], and gate_up and down in the type of x, empty where they had it already)."""
    w_gate_up, gate_up_copy = cast_weight(gate_up, x)
    w_down, down_copy = cast_weight(down, x)
    a = x.flatten(0, 1) @ w_gate_up.t()
    y = silu_mul_forward(a) @ w_down.t()
    return y.view(x.shape), a, gate_up_copy, down_copy


def mlp_forward_to_codes(
    x: Tensor, gate_up: Tensor, down: Tensor, bits: int, step: Tensor, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`mlp_forward` with (codes, scales) in the place of a, which is gone when this returns."""
    w_gate_up, gate_up_copy = cast_weight(gate_up, x)
    w_down, down_copy = cast_weight(down, x)
    h, a = silu_mul_to_codes(x.flatten(0, 1) @ w_gate_up.t(), bits, step, stream)
    return (h @ w_down.t()).view(x.shape), a.codes, a.scales, gate_up_copy, down_copy


def mlp_forward_foreseen(x: Tensor, gate_up: Tensor, down: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mlp_forward` where the result's gradient dy [B, T, D] is known: (result [B, T, D], the gradient of a [B·T, 2F],
    h [B·T, F], gate_up in the type of x). a itself is gone when this returns.
    """
    w_gate_up, w_down = (cast_weight(w, x)[0] for w in (gate_up, down))
    a = x.flatten(0, 1) @ w_gate_up.t()
    h = dy.reshape(-1, dy.shape[-1]) @ w_down  # its gradient, for now
    da = silu_mul_backward(a, h)
    del a
    return (h @ w_down.t()).view(x.shape), da, h, w_gate_up


def mlp_gradients(
    dy: Tensor, x: Tensor, da: Tensor, h: Tensor, gate_up: Tensor, gate_up_dtype: torch.dtype, down_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of `mlp_backward` after `mlp_forward_foreseen`, whose da, h and gate_up these are."""
    d_down = weight_gradient(dy.reshape(-1, dy.shape[-1]), h, down_dtype)
    d_gate_up = weight_gradient(da, x.flatten(0, 1), gate_up_dtype)
    return (da @ gate_up).view(x.shape), d_gate_up, d_down


def mlp_backward(
    dy: Tensor, x: Tensor | Callable[[Tensor], Tensor], a: Tensor | Codes, gate_up: Tensor, down: Tensor,
    gate_up_dtype: torch.dtype, down_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x [B, T, D], gate_up and down.

    Args:
        dy: [B, T, D], the gradient of the result.
        x: [B, T, D]; or a function that is given the gradient of x and returns x, perhaps in the same place: the
            gradient is its then.
        a: [B·T, 2F], x · gate_upᵀ as forward left it; or codes that stand for it.
        gate_up, down: the weights in the type of x.
        gate_up_dtype, down_dtype: of their gradients.
    """
    shape, dy = dy.shape, dy.reshape(-1, dy.shape[-1])
    dh = dy @ down
    da = silu_mul_from_codes(a, dh) if isinstance(a, Codes) else silu_mul_backward(a, dh)
    d_down = weight_gradient(dy, dh, down_dtype)  # dh is h now
    del dh
    if isinstance(x, Tensor):
        d_gate_up = weight_gradient(da, x.flatten(0, 1), gate_up_dtype)
        return (da @ gate_up).view(shape), d_gate_up, d_down
    d_x = (da @ gate_up).view(shape)
    return d_x, weight_gradient(da, x(d_x).flatten(0, 1), gate_up_dtype), d_down
