"""SwiGLU: the channel-mixing half of a block (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn

from eco_llm.config import SigmaConfig
from eco_llm.model.norm import RMSNorm
from eco_llm.ops.quantize import Keep
from eco_llm.ops.swiglu import swiglu_mlp, swiglu_mlp_foreseen, swiglu_mlp_unread, writes_codes


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)). Gate and up are one matrix, hence one product: rows 0…F−1 gate, F…2F−1 up."""

    def __init__(self, config: SigmaConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.mlp_dim, bias=False)
        self.down = nn.Linear(config.mlp_dim, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D], in the autocast type if autocast is on."""
        return swiglu_mlp(x, self.gate_up.weight, self.down.weight)

    def unread(self, x: Tensor) -> Tensor:
        """`forward` where its value is not read: NaN [B, T, D], with the same gradients."""
        return swiglu_mlp_unread(x, self.gate_up.weight, self.down.weight)

    def foreseen(self, x: Tensor, dy: Tensor) -> Tensor:
        """`forward` of which it is known that its result will receive the gradient dy [B, T, D]."""
        return swiglu_mlp_foreseen(x, self.gate_up.weight, self.down.weight, dy)

    def writes_codes(self, x: Tensor, keep: Keep) -> bool:
        """Whether `coded` serves the stream x [B, T, D]."""
        return writes_codes(x, self.gate_up.weight, self.down.weight, keep)

    def coded(self, x: Tensor, added: Tensor | None, norm: RMSNorm, keep: Keep) -> tuple[Tensor, Tensor]:
        """(x + added, forward of its norm), of which backward has codes: `ops.swiglu.coded`."""
        from eco_llm.ops.swiglu.coded import coded_mlp  # imports Triton

        return coded_mlp(x, added, norm.weight.float(), norm.eps, self.gate_up.weight, self.down.weight, keep=keep)
