"""Linear + cross-entropy that holds the logits of one chunk of tokens at a time.

The gradient of a summed cross-entropy with respect to its logits, softmax − one-hot, is known as soon as the
logits are. So the forward pass multiplies it straight into dHidden and dWeight, drops the logits, and the
backward pass only scales ("Liger kernels", arXiv 2410.10989, section 3.2). One matrix product of logits, where
recomputing them in backward needs two.

Shape legend: M tokens, m tokens in a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.ops.onednn import matmul
from eco_llm.ops.products import product, product_into


def chunk_losses(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [m] (0 where `ignored`) and log-probabilities [m, V] of one chunk."""
    log_p = torch.log_softmax(product(hidden, weight.t()), dim=-1)
    safe = targets.masked_fill(ignored, 0)
    return -log_p.gather(1, safe[:, None])[:, 0].masked_fill(ignored, 0.0), log_p


def gradient_dtype(weight: Tensor, tokens: int, chunk_tokens: int, compute_dtype: torch.dtype) -> torch.dtype:
    """The type that dWeight is summed in: at least float32, but where one product makes it whole, bf16 for bf16."""
    if weight.dtype == compute_dtype == torch.bfloat16 and tokens <= chunk_tokens:
        return torch.bfloat16
    return torch.promote_types(compute_dtype, torch.float32)


class SummedLinearCrossEntropy(torch.autograd.Function):
    """Σ over tokens of −log softmax(hidden · weightᵀ)[target]; gradients are made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [M, D]
        weight: Tensor,  # [V, D]
        targets: Tensor,  # [M]
        ignore_index: int,
        chunk_tokens: int,
        compute_dtype: torch.dtype,
        with_grad: bool,
    ) -> Tensor:
        wide = torch.promote_types(compute_dtype, torch.float32)
        h, w = hidden.to(compute_dtype), weight.to(compute_dtype)  # once, not once a chunk
        total = torch.zeros((), dtype=wide, device=hidden.device)
        want_hidden, want_weight = (with_grad and need for need in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(h, memory_format=torch.contiguous_format) if want_hidden else None
        sums = gradient_dtype(weight, hidden.shape[0], chunk_tokens, compute_dtype)
        d_weight = torch.zeros_like(weight, dtype=sums) if want_weight else None

        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            ignored = targets[part] == ignore_index
            losses, log_p = chunk_losses(h[part], w, targets[part], ignored)
            total += losses.sum()
            if not (want_hidden or want_weight):
                continue
            # dLogits = softmax − one-hot, in the buffer of log_p. Rows of ignored tokens are dropped on the
            # narrow side, [m, D], instead of being zeroed over [m, V].
            kept = (~ignored).to(compute_dtype)[:, None]
            d_logits = log_p.exp_()
            target_column = targets[part].masked_fill(ignored, 0)[:, None]
            d_logits.scatter_add_(1, target_column, d_logits.new_full((), -1.0).expand_as(target_column))
            d_logits = d_logits.to(compute_dtype)
            if d_hidden is not None:
                d_hidden[part] = matmul(d_logits, w) * kept
            if d_weight is not None and d_weight.dtype == torch.bfloat16:
                product_into(d_weight, d_logits.t(), h[part] * kept)
            elif d_weight is not None:
                d_weight += product(d_logits.t(), h[part] * kept)
        if d_weight is not None and weight.dtype == torch.bfloat16:
            d_weight = d_weight.to(torch.bfloat16)  # here, so that not 4 bytes but 2 wait for backward

        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable  # second derivatives through gradients made in forward would silently miss terms
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        d_hidden, d_weight = ctx.saved_tensors
        # Not in place: a retained graph may come here twice.
        return (
            None if d_hidden is None else d_hidden.to(ctx.dtypes[0]) * grad,
            None if d_weight is None else (d_weight * grad).to(ctx.dtypes[1]),
            *(None,) * 5,
        )


def linear_cross_entropy_chunked(
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
        h, w = hidden.to(compute_dtype), weight.to(compute_dtype)
        parts = zip(h.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
        return torch.cat([chunk_losses(a, w, t, t == ignore_index)[0] for a, t in parts])
    total = SummedLinearCrossEntropy.apply(
        hidden, weight, targets, ignore_index, chunk_tokens, compute_dtype, with_grad
    )
    return total / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else total
