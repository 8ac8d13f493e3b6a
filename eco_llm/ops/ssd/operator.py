"""The SSD kernels as one differentiable operator, opaque to torch.compile. Triton is imported at the first call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eco_llm.ops.opaque import operator

__all__ = ["ssd_triton", "unsupported_by_triton"]


def unsupported_by_triton(dtype: torch.dtype, width: int, state: int) -> str | None:
    """Why the kernels do not take heads of `width` channels with `state` numbers each; None if they do."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if width % 64:
        # For slices of 16 or 32 channels Triton 3.6 compiles bf16 products with a state [N, P] wrongly on Hopper: wrong
        # values in `output_kernel`, an invalid address in `gradient_kernel` (docs/LOG.md). What is served was checked.
        return f"a head width of {width} is no multiple of 64"
    if state not in (16, 32, 64, 128):
        return f"a state size of {state} is not 16, 32, 64 or 128"
    return None


def tile_and_chunk(chunk_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """(tokens in a tile, tokens in a chunk) that the kernels use.

    Float32 tiles are 32 tokens, others 64, which keeps every kernel under 99 KB of shared memory. A chunk is a power of
    two of at least a tile and at most 256; `chunk_size` is rounded down to one.
    """
    tile = 32 if dtype == torch.float32 else 64
    return tile, max(tile, 1 << (min(chunk_size, 256).bit_length() - 1))


def padded_length(time: int, chunk_size: int, dtype: torch.dtype) -> int:
    """`time` rounded up to whole chunks."""
    _, chunk = tile_and_chunk(chunk_size, dtype)
    return -(-time // chunk) * chunk


def ssd_triton(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Shapes as in `eco_llm.ops.ssd.ssd`: (y, final state [B, H, P, N] float32)."""
    x, B, C = (t if t.stride(-1) == 1 and t.stride(-2) == t.shape[-1] else t.contiguous() for t in (x, B, C))
    result: tuple[Tensor, Tensor] = _ssd(x, dt.float(), A, B, C, D, initial_state, chunk)
    return result


@operator("ssd")
def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    from eco_llm.ops.ssd import triton as kernels

    s = kernels.shape_of(x, B, chunk)
    y, final = kernels.forward(x, kernels.decays(dt, None, A, s), B, C, D, s, initial=initial, final=True)
    assert final is not None
    return y, final


@_ssd.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = x.shape
    return x.new_empty(x.shape), x.new_empty(batch, heads, width, B.shape[-1], dtype=torch.float32)


@operator("ssd_backward")
def _ssd_backward(
    dy: Tensor, d_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    initial: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from eco_llm.ops.ssd import triton as kernels

    s = kernels.shape_of(x, B, chunk)
    d_dt = torch.empty_like(dt, memory_format=torch.contiguous_format)
    packed = dy if dy.stride(-1) == 1 and dy.stride(-2) == dy.shape[-1] else dy.contiguous()
    g = kernels.backward(packed, x, dt, None, A, B, C, D, s, initial=initial, d_final=d_final, d_raw=d_dt)
    d_initial = x.new_empty(0, dtype=torch.float32) if g.d_initial is None else g.d_initial
    return g.dx, d_dt, g.partial.sum(0), g.d_bc.sum(0), d_initial


@_ssd_backward.register_fake
def _(
    dy: Tensor, d_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    initial: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, time, heads, _ = x.shape
    f32 = torch.float32
    return (
        x.new_empty(x.shape), dt.new_empty(dt.shape), A.new_empty(3, heads, dtype=f32),
        x.new_empty(batch, time, 2 * B.shape[2] * B.shape[3], dtype=f32),
        x.new_empty((0,) if initial is None else initial.shape, dtype=f32),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, initial = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, d_dt, small, d_bc, d_initial = _ssd_backward(dy, d_final, x, dt, A, B, C, D, initial, ctx.chunk)
    dB, dC = (part.reshape(B.shape).to(B.dtype) for part in d_bc.chunk(2, dim=-1))
    dA, _, dD = small.unbind()
    return (
        dx, d_dt, dA.to(A.dtype), dB, dC, None if D is None else dD.to(D.dtype),
        None if initial is None else d_initial.to(initial.dtype), None,
    )  # fmt: skip


_ssd.register_autograd(_differentiate, setup_context=_save)
