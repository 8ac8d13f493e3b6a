# mypy: allow-untyped-defs
# (Triton reads the annotations of its kernels, so they can carry none of ours; every other function here has them.)
"""Linear + cross-entropy for CUDA: cuBLAS for the three products, one kernel for everything between them.

Bytes for each of a chunk's m·V logits (half-precision products): 4 written by the first product, 4 read by the kernel
(and read again, mostly out of L2), 2 written, 2 read by each of the two gradient products. The eager form of
`chunked.py` moves 30 or more. Memory: m·V·4 bytes for one chunk; the gradient of the logits overwrites them.

Shape legend: M tokens, m tokens in a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.ops.cross_entropy.chunked import gradient_dtype
from eco_llm.ops.products import product_into


@triton.jit
def _row_kernel(
    logits, d_logits, targets, losses, count,
    V, row_stride, d_row_stride, ignore_index,
    DIVIDE: tl.constexpr, WITH_GRAD: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of one token, and (softmax − one-hot) / count (count is 1 without DIVIDE), 0 for an ignored token.

    Grid: one program a row. `d_logits` may be the upper part of the same row: element i of the narrow gradient at
    byte (4 − w)·V + w·i of the row's 4·V bytes, w its width. Nothing unread is overwritten:

    - Blocks are rewritten from the last to the first. Block k writes from byte (4 − w)·V + w·B·k on; what later
      blocks (0 … k−1) have yet to read ends at byte 4·B·k. As B·k < V, (4 − w)·V + w·B·k ≥ 4·B·k.
    - Inside a block, and between warps that run at different speed, the barrier before each store stands: every warp
      has read block k, hence all of k, k+1, …, before any warp writes block k.
    - The target's logit is read before the first barrier. Rows never share bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    d_logits += row * d_row_stride
    lanes = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    kept = target != ignore_index
    # A target outside the vocabulary gives NaN: loud, and no host sync.
    at_target = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan"))

    if WHOLE_ROW:  # the row stays in registers
        z = tl.load(logits + lanes, mask=lanes < V, other=float("-inf"))
        top = tl.max(z, 0)
        powers = tl.exp(z - top)
        mass = tl.sum(powers, 0)
    else:
        top = float("-inf")
        partial = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            # Every logit is read once more, what takes its place is not: 240 → 230 µs for 2048 rows of 50304 (H200).
            z = tl.load(
                logits + start + lanes, mask=start + lanes < V, other=float("-inf"), eviction_policy="evict_last"
            )
            new_top = tl.maximum(top, tl.max(z, 0))
            partial = partial * tl.exp(top - new_top) + tl.exp(z - new_top)
            top = new_top
        mass = tl.sum(partial, 0)
    # In this order a loss of 20000 keeps its digits, and one near 0 does not cancel against the maximum.
    tl.store(losses + row, tl.where(kept, (top - at_target) + tl.log(mass), 0.0))

    if WITH_GRAD:
        one = 1.0
        if DIVIDE:
            one = 1.0 / tl.load(count)
        scale = one / mass
        if WHOLE_ROW:
            gradient = powers * scale - tl.where(lanes == target, one, 0.0)
            gradient = tl.where(kept, gradient, 0.0).to(d_logits.dtype.element_ty)
            tl.debug_barrier()
            tl.store(d_logits + lanes, gradient, mask=lanes < V)
        else:
            blocks = tl.cdiv(V, BLOCK)
            for i in range(0, blocks):
                columns = (blocks - 1 - i) * BLOCK + lanes  # the blocks read last are the likeliest still in L2
                z = tl.load(logits + columns, mask=columns < V, other=float("-inf"), eviction_policy="evict_first")
                gradient = tl.exp(z - top) * scale - tl.where(columns == target, one, 0.0)
                gradient = tl.where(kept, gradient, 0.0).to(d_logits.dtype.element_ty)
                tl.debug_barrier()
                tl.store(d_logits + columns, gradient, mask=columns < V, eviction_policy="evict_first")


@triton.jit
def _scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    """x *= factor in place, [n]; costs a launch and no traffic if factor is 1. Grid: any number of programs."""
    by = tl.load(factor)
    if by != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(x + at, mask=at < n)
            tl.store(x + at, (value.to(tl.float32) * by).to(x.dtype.element_ty), mask=at < n)


def row_block(vocab: int) -> tuple[int, int]:
    """(logits in a block, warps) of the row kernel; a block that holds the vocabulary keeps the row in registers."""
    if vocab <= 4096:
        return max(256, triton.next_power_of_2(vocab)), 4
    return 8192, 16


def losses_and_gradient(
    logits: Tensor,  # [m, V] float32, overwritten if compute_dtype is given
    targets: Tensor,  # [m]
    losses: Tensor,  # [m] float32, written
    ignore_index: int,
    count: Tensor | None = None,  # 0-dim: tokens that count, for their mean
    compute_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Write the losses; with `compute_dtype`, return dLogits [m, V] of that type, in the storage of `logits`."""
    rows, vocab = logits.shape
    d_logits = logits
    if compute_dtype is not None and compute_dtype != torch.float32:
        d_logits = logits.view(compute_dtype)[:, vocab:]
    block, warps = row_block(vocab)
    if rows:
        _row_kernel[(rows,)](
            logits, d_logits, targets, losses, losses if count is None else count,
            vocab, logits.stride(0), d_logits.stride(0), ignore_index,
            DIVIDE=count is not None, WITH_GRAD=compute_dtype is not None, WHOLE_ROW=block >= vocab, BLOCK=block,
            num_warps=warps,
        )  # fmt: skip
    return None if compute_dtype is None else d_logits


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor, a 0-dim float32 tensor, in place; free where the factor is 1. `x` is contiguous."""
    if x.numel():
        _scale_kernel[(min(triton.cdiv(x.numel(), 4096), 1024),)](x, factor, x.numel(), BLOCK=4096, num_warps=8)
    return x


class SummedLinearCrossEntropyTriton(torch.autograd.Function):
    """Σ over tokens of −log softmax(hidden · weightᵀ)[target], over `count` if given; gradients are made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [M, D]
        weight: Tensor,  # [V, D]
        targets: Tensor,  # [M]
        count: Tensor | None,
        ignore_index: int,
        chunk_tokens: int,
        compute_dtype: torch.dtype,
        with_grad: bool,
    ) -> Tensor:
        want_hidden, want_weight = (with_grad and need for need in ctx.needs_input_grad[:2])
        losses, d_hidden, d_weight = _walk(
            hidden, weight, targets, count, ignore_index, chunk_tokens, compute_dtype, want_hidden, want_weight
        )
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        total = losses.sum()
        return total if count is None else total / count

    @staticmethod
    @once_differentiable  # second derivatives through gradients made in forward would silently miss terms
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        # Outside a retained graph nobody reads the saved gradients again, so they are scaled where they lie.
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        gradients = (
            None if saved is None else (saved * grad if retained else scale_(saved, grad)).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, *(None,) * 6)


def _walk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    count: Tensor | None,
    ignore_index: int,
    chunk_tokens: int,
    compute_dtype: torch.dtype,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses [M] and the gradients that are wanted, chunk by chunk: dHidden [M, D], dWeight [V, D] float32 (bf16 for a
    bf16 weight).
    """
    h, w = hidden.to(compute_dtype), weight.to(compute_dtype)  # once, not once a chunk
    targets = targets.contiguous()
    tokens, vocab = h.shape[0], w.shape[0]
    want_any = want_hidden or want_weight
    logits = h.new_empty((min(chunk_tokens, tokens), vocab), dtype=torch.float32)  # one buffer for all chunks
    losses = h.new_empty(tokens, dtype=torch.float32)
    d_hidden = h.new_empty(h.shape) if want_hidden else None
    sums = gradient_dtype(weight, tokens, chunk_tokens, compute_dtype)
    d_weight = h.new_empty(w.shape, dtype=sums) if want_weight else None
    if d_weight is not None and not tokens:
        d_weight.zero_()
    for start in range(0, tokens, chunk_tokens):
        part = slice(start, start + chunk_tokens)
        z = logits[: h[part].shape[0]]
        product_into(z, h[part], w.t())
        d_logits = losses_and_gradient(
            z, targets[part], losses[part], ignore_index, count, compute_dtype if want_any else None
        )
        if d_logits is None:
            continue
        if d_hidden is not None:
            product_into(d_hidden[part], d_logits, w)
        if d_weight is not None:
            product_into(d_weight, d_logits.t(), h[part], add=start > 0)  # the first chunk writes: no zero-fill
    if d_weight is not None and weight.dtype == torch.bfloat16:
        d_weight = d_weight.to(torch.bfloat16)  # here, so that not 4 bytes but 2 wait for backward
    return losses, d_hidden, d_weight


def linear_cross_entropy_triton(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    chunk_tokens: int,
    compute_dtype: torch.dtype,
) -> Tensor:
    """Shapes as in `eco_llm.ops.cross_entropy.linear_cross_entropy`; runs with autocast off."""
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if reduction == "none":
        if with_grad:
            raise ValueError('reduction="none" has no gradient; call it under torch.no_grad()')
        return _walk(hidden, weight, targets, None, ignore_index, chunk_tokens, compute_dtype, False, False)[0]
    count = (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else None
    # Division inside leaves an incoming gradient of 1 where the loss is the root, which costs backward nothing.
    # float16 has no exponents to spare for it: gradients over a count of thousands would vanish.
    inside = count if compute_dtype != torch.float16 else None
    total = SummedLinearCrossEntropyTriton.apply(
        hidden, weight, targets, inside, ignore_index, chunk_tokens, compute_dtype, with_grad
    )
    return total if count is None or inside is not None else total / count
