"""Mamba-2 mixer (arXiv 2405.21060, section 7; one group of B and C).

Shape legend: B batch, T tokens, D model width, H heads of P channels (H·P = expand·D), N state size, W conv taps.

    z, xBC, dt = split(W_in u)                gate [H·P], conv input [H·P + 2N], step [H]
    x, B, C    = silu(causal_conv(xBC))       depthwise, W taps
    dt         = softplus(dt + dt_bias)       float32
    y          = ssd(x, dt, −exp(A_log), B, C, D)
    out        = W_out norm(y · silu(z))

Parameter names, shapes and order are those of the Mamba-2 reference, so its weights load as they are. Like the
reference, the convolution has a bias; the two projections have none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eco_llm.config import SigmaConfig
from eco_llm.model.linear import Linear
from eco_llm.model.norm import RMSNorm
from eco_llm.ops.mamba_mixer import mamba_mixer, writes_codes
from eco_llm.ops.quantize import Keep
from eco_llm.ops.ssd import choose_chunk, ssd, ssd_step


@dataclass
class MambaCache:
    """What one Mamba layer keeps for generation: a size that does not grow with the text."""

    conv: Tensor  # [B, W − 1, H·P + 2N], the convolution's last inputs
    ssm: Tensor  # [B, H, P, N] float32


class Mamba(nn.Module):
    """Selective state-space mixer; `forward` for training, `extend` for generation with a cache."""

    def __init__(self, config: SigmaConfig) -> None:
        super().__init__()
        self.inner_dim, self.n_heads = config.mamba_inner_dim, config.mamba_n_heads
        self.head_width, self.state_dim = config.mamba_head_dim, config.mamba_state_dim
        self.conv_width, self.chunk = config.mamba_conv_width, config.mamba_chunk
        self.conv_dim = self.inner_dim + 2 * self.state_dim

        self.in_proj = Linear(config.d_model, self.inner_dim + self.conv_dim + self.n_heads)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, self.conv_width, groups=self.conv_dim)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = RMSNorm(self.inner_dim, config.norm_eps)
        self.out_proj = Linear(self.inner_dim, config.d_model)
        self.reset_ssm_parameters()

    @torch.no_grad()
    def reset_ssm_parameters(self) -> None:
        """Rates A uniform in [1, 16], steps dt log-uniform in [1e-3, 1e-1] (the Mamba-2 reference's ranges), D = 1.

        `dt_bias` is the inverse of softplus at dt: dt + log(1 − e^(−dt)).
        """
        self.A_log.uniform_(1.0, 16.0).log_()
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.D.fill_(1.0)

    def forward(self, u: Tensor) -> Tensor:
        """u [B, T, D] -> [B, T, D]."""
        return mamba_mixer(
            u, *self._weights(), state_dim=self.state_dim, eps=self.norm.eps,
            chunk_size=choose_chunk(u.shape[1], self.chunk),
        )  # fmt: skip

    def writes_codes(self, x: Tensor, keep: Keep) -> bool:
        """Whether `coded` serves the stream x [B, T, D]."""
        return writes_codes(x, self.conv1d.weight, self.inner_dim, self.head_width, self.state_dim, keep)

    def coded(self, x: Tensor, added: Tensor | None, norm: RMSNorm, keep: Keep) -> tuple[Tensor, Tensor]:
        """(x + added, forward of its norm), of which backward has codes: `ops.mamba_mixer.coded`."""
        from eco_llm.ops.mamba_mixer.coded import coded_mixer  # imports Triton

        return coded_mixer(
            x, added, norm.weight.float(), norm.eps, *self._weights(), state_dim=self.state_dim, eps=self.norm.eps,
            chunk_size=choose_chunk(x.shape[1], self.chunk), keep=keep,
        )  # fmt: skip

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `mamba_mixer` has them."""
        assert self.conv1d.bias is not None
        return (
            self.in_proj.weight, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, self.A_log, self.D,
            self.norm.weight, self.out_proj.weight,
        )  # fmt: skip

    def extend(self, u: Tensor, cache: MambaCache) -> Tensor:
        """The next T tokens of a sequence whose past is in `cache`, which moves past them. u and result [B, T, D]."""
        z, xbc, dt = self._project(u)
        xbc = torch.cat((cache.conv.to(xbc.dtype), xbc), dim=1)
        cache.conv.copy_(xbc[:, 1 - self.conv_width :])
        x, B, C = self._convolve(xbc)
        if u.shape[1] == 1:
            y, state = ssd_step(cache.ssm, x[:, 0], dt[:, 0], self._rates(), B[:, 0], C[:, 0], self.D)
            y = y[:, None]
        else:
            y, state = ssd(
                x, dt, self._rates(), B, C, self.D,
                chunk_size=choose_chunk(u.shape[1], self.chunk), initial_state=cache.ssm, return_final_state=True,
            )  # fmt: skip
        cache.ssm.copy_(state)
        return self._gate_out(y, z)

    def init_cache(self, batch_size: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> MambaCache:
        """The state before the first token; `max_tokens` does not matter here."""
        conv = torch.zeros(batch_size, self.conv_width - 1, self.conv_dim, device=device, dtype=dtype)
        state_dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        shape = (batch_size, self.n_heads, self.head_width, self.state_dim)
        return MambaCache(conv, torch.zeros(shape, device=device, dtype=state_dtype))

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [B, T, H·P], xBC [B, T, H·P + 2N] before the convolution, dt [B, T, H] in at least float32."""
        z, xbc, dt = self.in_proj(u).split((self.inner_dim, self.conv_dim, self.n_heads), dim=-1)
        # bf16 has 8 bits: dt + bias must not be rounded to it before softplus, for small steps live in the bias.
        return z, xbc, F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + self.dt_bias)

    def _convolve(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """xBC with W − 1 tokens of past [B, W − 1 + T, …] -> x [B, T, H, P], B and C [B, T, 1, N]."""
        xbc = F.silu(self.conv1d(xbc.transpose(1, 2))).transpose(1, 2)
        x, B, C = xbc.split((self.inner_dim, self.state_dim, self.state_dim), dim=-1)
        return x.unflatten(-1, (self.n_heads, self.head_width)), B.unsqueeze(2), C.unsqueeze(2)

    def _rates(self) -> Tensor:
        """A [H] < 0."""
        return -torch.exp(self.A_log)

    def _gate_out(self, y: Tensor, z: Tensor) -> Tensor:
        """y [B, T, H, P], z [B, T, H·P] -> [B, T, D]."""
        return self.out_proj(self.norm(y.flatten(2) * F.silu(z)))
