"""Which implementation serves a model's own ops, for people."""

from __future__ import annotations

import torch

from eco_llm.config import SigmaConfig
from eco_llm.ops.backend import Kernels, kernels_for
from eco_llm.ops.mamba_mixer import unsupported
from eco_llm.ops.onednn import products_by

__all__ = ["Kernels", "serving_kernels"]


def serving_kernels(shape: SigmaConfig, device: torch.device, compute_dtype: torch.dtype) -> Kernels:
    """The Triton kernels, or the reference and why; on a CPU also whose float32 products."""
    serving = kernels_for(device)
    if serving.name == "triton" and "mamba" in shape.mixer_pattern:
        reason = unsupported(compute_dtype, shape.mamba_inner_dim, shape.mamba_head_dim, shape.mamba_state_dim)
        if reason is not None:
            return Kernels("reference", f"the Mamba mixer's do not take this shape: {reason}")
    if device.type == "cpu" and compute_dtype == torch.float32:
        products = products_by()
        return Kernels(serving.name, f"{serving.why}; float32 products by {products.name}: {products.why}")
    return serving
