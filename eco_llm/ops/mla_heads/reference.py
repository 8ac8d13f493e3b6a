"""`mla_heads` in PyTorch's own ops, which autograd differentiates and a compiler may fuse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eco_llm.ops.products import linear


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x [..., T, R] by (cos, sin), each [T, R / 2]; computed in at least float32, returned in the type of x.

    Channel i < R/2 is paired with channel i + R/2.
    """
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def mla_heads_reference(
    q: Tensor, latent: Tensor, norm_weight: Tensor, up: Tensor, table: tuple[Tensor, Tensor], heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `eco_llm.ops.mla_heads.mla_heads`; honours autocast."""
    rope = 2 * table[0].shape[-1]
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    nope = q.shape[-1] - rope
    c_kv, k_rope = latent.split((norm_weight.shape[0], rope), dim=-1)
    with torch.autocast(q.device.type, enabled=False):  # which would cast a bf16 latent up
        c_kv = F.rms_norm(c_kv, norm_weight.shape, norm_weight.to(c_kv.dtype), eps)
    kv = linear(c_kv, up).unflatten(-1, (heads, -1)).transpose(1, 2)
    k_nope, v = kv.split((nope, kv.shape[-1] - nope), dim=-1)
    k_rope = rotate(k_rope, table)[:, None].expand(-1, heads, -1, -1)
    queries = torch.cat((q[..., :nope], rotate(q[..., nope:], table)), dim=-1)
    return queries, torch.cat((k_nope, k_rope), dim=-1), v
