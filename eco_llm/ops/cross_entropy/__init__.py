"""Fused linear + cross-entropy. Maths: README.md beside this file."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.cross_entropy.chunked import linear_cross_entropy_chunked
from eco_llm.ops.cross_entropy.reference import linear_cross_entropy_reference
from eco_llm.ops.products import compute_dtype

__all__ = ["linear_cross_entropy"]

Backend = Literal["auto", "reference", "chunked", "triton"]
Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of softmax(hidden · weightᵀ) against `targets`, in nats.

    Products run in the autocast type if autocast is on, else in the type of `hidden`; softmax, sums and dWeight are
    float32 (float64 for float64 products) in every case. No host sync.

    Args:
        hidden: [M, D].
        weight: [V, D], the head; cast once if its type differs.
        targets: [M] int64; `ignore_index` marks tokens that do not count.
        chunk_tokens: tokens whose logits exist at one time; peak memory is about chunk_tokens · V · 10 bytes
            (4 through Triton).
        reduction: `mean` over the tokens that count (0 if none does), their `sum`, or `none`, one value a token
            (0 if ignored). Only the reference gives `none` a gradient.
        backend: `reference` builds all [M, V] logits; `chunked` never does; `triton` is the same with one kernel
            between the products (not for float64); `auto` is `triton` where Triton serves the device, else `chunked`.

    Returns:
        A scalar, or [M] for `none`; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, an unknown backend or reduction, `chunk_tokens` below 1, a gradient
            asked of `none` other than by the reference, float64 asked of Triton.
    """
    if torch.compiler.is_dynamo_compiling():
        from eco_llm.ops.cross_entropy.uncompiled import linear_cross_entropy_uncompiled

        return linear_cross_entropy_uncompiled(
            hidden, weight, targets, chunk_tokens=chunk_tokens, ignore_index=ignore_index, reduction=reduction,
            backend=backend,
        )  # fmt: skip
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"need hidden [M, D] and weight [V, D], got {hidden.shape} and {weight.shape}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"need targets [M] = [{hidden.shape[0]}], got {targets.shape}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; known: mean, sum, none")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if backend == "reference":
        return linear_cross_entropy_reference(hidden, weight, targets, ignore_index, reduction)
    if backend not in ("auto", "chunked", "triton"):
        raise ValueError(f"unknown cross-entropy backend {backend!r}; known: auto, reference, chunked, triton")

    device = hidden.device.type
    dtype = compute_dtype(hidden)
    run = linear_cross_entropy_chunked
    if backend == "triton" or (backend == "auto" and dtype != torch.float64 and uses_triton(hidden)):
        if dtype == torch.float64:
            raise ValueError("the Triton cross-entropy sums in float32; float64 needs backend chunked or reference")
        from eco_llm.ops.cross_entropy.triton import linear_cross_entropy_triton  # an optional package

        run = linear_cross_entropy_triton
    with torch.autocast(device, enabled=False):
        return run(hidden, weight, targets, ignore_index, reduction, chunk_tokens, dtype)
