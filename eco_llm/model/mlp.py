"""SwiGLU: the channel-mixing half of a block (arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from eco_llm.config import SigmaConfig


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)). Gate and up are one matrix, hence one product: rows 0…F−1 gate, F…2F−1 up."""

    def __init__(self, config: SigmaConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.mlp_dim, bias=False)
        self.down = nn.Linear(config.mlp_dim, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
