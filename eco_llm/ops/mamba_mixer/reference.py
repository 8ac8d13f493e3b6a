"""The Mamba-2 mixer, one plain op after another."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eco_llm.ops.causal_conv.reference import causal_conv_silu_reference
from eco_llm.ops.gated_norm.reference import gated_rms_norm_reference
from eco_llm.ops.products import linear
from eco_llm.ops.ssd import ssd


def mamba_mixer_reference(
    u: Tensor, in_weight: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, out_weight: Tensor, *, state_dim: int, eps: float, chunk_size: int,
    ssd_backend: Literal["chunked", "recurrent"] = "chunked",
) -> Tensor:  # fmt: skip
    """Shapes as in `eco_llm.ops.mamba_mixer.mamba_mixer`."""
    heads, inner = dt_bias.shape[0], norm_weight.shape[0]
    # One product for each part, and B and C convolved apart from x: splitting the result of one product would make its
    # gradient by concatenation, which on a CPU, compiled, is the slowest thing here after the products.
    in_weights = in_weight.to(u.dtype).split((inner, inner, conv_weight.shape[0] - inner, heads))
    z, x, bc, dt = (linear(u, part) for part in in_weights)
    x = causal_conv_silu_reference(x, conv_weight[:inner], conv_bias[:inner])
    B, C = causal_conv_silu_reference(bc, conv_weight[inner:], conv_bias[inner:]).chunk(2, dim=-1)
    # bf16 has 8 bits: dt + bias must not be rounded to it before softplus, for small steps live in the bias.
    dt = F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + dt_bias)
    x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (-1, state_dim)), C.unflatten(-1, (-1, state_dim))
    y = ssd(x, dt, -torch.exp(A_log), B, C, D, chunk_size=chunk_size, backend=ssd_backend)
    return linear(gated_rms_norm_reference(y.flatten(2), z, norm_weight, eps), out_weight)
