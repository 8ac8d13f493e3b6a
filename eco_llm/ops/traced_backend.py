"""`eco_llm.ops.backend` for code under `torch.compile`; apart from it, because these decorators import the compiler."""

from __future__ import annotations

import torch

from eco_llm.ops.backend import kernels_for
from eco_llm.ops.onednn import products_by


@torch.compiler.assume_constant_result  # the compiler need not look inside
def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels serve `device`."""
    return kernels_for(device).name == "triton"


@torch.compiler.assume_constant_result
def has_onednn() -> bool:
    """Whether float32 products on the CPU are oneDNN's."""
    return products_by().name == "onednn"
