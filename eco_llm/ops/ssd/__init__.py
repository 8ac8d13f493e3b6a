"""State-space duality (SSD): the Mamba-2 sequence operator. Maths: README.md beside this file."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.ssd.chunked import ssd_chunked
from eco_llm.ops.ssd.operator import ssd_triton, unsupported_by_triton
from eco_llm.ops.ssd.policy import choose_chunk
from eco_llm.ops.ssd.reference import ssd_recurrent, ssd_step

__all__ = ["choose_chunk", "ssd", "ssd_step", "unsupported_by_triton"]

Backend = Literal["auto", "recurrent", "chunked", "triton"]


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    chunk_size: int,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    chunk_size: int,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    chunk_size: int,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = C_t·h_t + D·x_t with h_t = exp(dt_t·A)·h_{t-1} + dt_t·B_t ⊗ x_t (arXiv 2405.21060).

    Args:
        x: [B, T, H, P], T ≥ 1.
        dt: [B, T, H], step sizes ≥ 0 (after softplus; 0 is the identity step).
        A: [H], negative decay rates.
        B, C: [B, T, G, N] in the type of x; H must divide by G, head h uses group h // (H / G).
        D: [H], the skip from x, or None.
        chunk_size: tokens a chunk of the chunked form; T need not divide by it. The result does not depend
            on it beyond rounding.
        initial_state: h before the first token, [B, H, P, N], or None for zeros.
        return_final_state: also return h after the last token.
        backend: `recurrent` is the time-step loop, the slow judge; `chunked` the matrix form in PyTorch's ops; `triton`
            the same form as CUDA kernels (`chunk_size` rounded down to a power of two from 64, float32 32, to 256);
            `auto` is `triton` where it serves (`unsupported_by_triton`), else `chunked`.

    Returns:
        y [B, T, H, P] in the type of x; with `return_final_state` the pair (y, h [B, H, P, N]). Decays and states
        are float32 (float64 for float64 x) whatever the input type, also inside a surrounding autocast.

    Raises:
        ValueError: shapes that do not fit together, an unknown backend or one that does not serve the input, a chunk
            below 1.
    """
    batch, time, heads, width = x.shape
    groups, state_size = B.shape[2:]
    if time < 1 or heads % groups:
        raise ValueError(f"need T ≥ 1 and heads divisible by groups, got T={time}, H={heads}, G={groups}")
    # Broadcasting would accept some of these and compute something else.
    expected = {
        "dt": (dt, (batch, time, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, time, groups, state_size)),
        "C": (C, (batch, time, groups, state_size)),
        "D": (D, (heads,)),
        "initial_state": (initial_state, (batch, heads, width, state_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

    # A surrounding autocast would run the decay path's products in bf16.
    with torch.autocast(x.device.type, enabled=False):
        reason = unsupported_by_triton(x.dtype, width, state_size)
        if backend == "triton" and reason:
            raise ValueError(f"the Triton SSD does not serve this input: {reason}")
        if backend == "triton" or (backend == "auto" and reason is None and uses_triton(x)):
            y, state = ssd_triton(x, dt, A, B, C, D, initial_state, chunk_size)
        elif backend in ("auto", "chunked"):
            y, state = ssd_chunked(x, dt, A, B, C, D, initial_state, chunk_size)
        elif backend == "recurrent":
            wide = torch.promote_types(x.dtype, torch.float32)
            if initial_state is None:
                initial_state = torch.zeros(batch, heads, width, state_size, dtype=wide, device=x.device)
            y, state = ssd_recurrent(x, dt, A, B, C, D, initial_state)
        else:
            raise ValueError(f"unknown SSD backend {backend!r}; known: auto, recurrent, chunked, triton")
    return (y, state) if return_final_state else y
