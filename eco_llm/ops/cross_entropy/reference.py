"""Linear + cross-entropy with all logits at once: the obvious twin of the chunked form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eco_llm.ops.products import linear


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """Shapes as in `eco_llm.ops.cross_entropy.linear_cross_entropy`; honours autocast."""
    logits = linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if reduction == "none":
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    total = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else total
