"""SwiGLU as Triton kernels between cuBLAS products. Maths and bytes: README.md beside this file.

Everything between the products is contiguous, so the kernels run over the [rows, F] elements of h as one flat range:
no lane is idle whatever F is. An element's gate lies `row · F` elements further on in a [rows, 2F] array. F is a
constant of the kernel, from whose powers of two the compiler sees how wide it may load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eco_llm.ops.products import cast_weight, weight_gradient
from eco_llm.ops.sigmoid import sigmoid

_BLOCK = 1024  # elements of h a program
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


def mlp_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(result [B, T, D], a [B·T, 2F], and gate_up and down in the type of x, empty where they had it already)."""
    w_gate_up, gate_up_copy = cast_weight(gate_up, x)
    w_down, down_copy = cast_weight(down, x)
    a = x.flatten(0, 1) @ w_gate_up.t()
    y = silu_mul_forward(a) @ w_down.t()
    return y.view(x.shape), a, gate_up_copy, down_copy


def mlp_backward(
    dy: Tensor, x: Tensor, a: Tensor, gate_up: Tensor, down: Tensor, gate_up_dtype: torch.dtype, down_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [B, T, D], gate_up and down.

    Args:
        dy: [B, T, D], the gradient of the result.
        x: [B, T, D].
        a: [B·T, 2F], x · gate_upᵀ as forward left it.
        gate_up, down: the weights in the type of x.
        gate_up_dtype, down_dtype: of their gradients.
    """
    dy = dy.reshape(-1, dy.shape[-1])
    dh = dy @ down
    da = silu_mul_backward(a, dh)
    d_down = weight_gradient(dy, dh, down_dtype)  # dh is h now
    del dh
    d_gate_up = weight_gradient(da, x.flatten(0, 1), gate_up_dtype)
    return (da @ gate_up).view(x.shape), d_gate_up, d_down
