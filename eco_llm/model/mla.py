"""MLA: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Shape legend: B batch, T tokens, S cached tokens, D model width, h heads, d head width (queries, keys and values),
R rotary part of d, n = d − R the rest, L key/value latent width.

    c_kv = norm(W_dkv x)                      [B, T, L]     all that generation keeps, beside
    k_R  = rope(W_kr x)                       [B, T, R]     one rotary key shared by all heads
    q    = [q_n ; rope(q_R)]                  per head, from x or from a query latent
    k    = [W_uk c_kv ; k_R], v = W_uv c_kv   per head

Training expands k and v and calls SDPA with equal widths, so every fused backend applies. Generation never
expands: q_n·(W_uk c) = (W_ukᵀ q_n)·c and Σ p W_uv c = W_uv Σ p c, so heads attend over the latent itself ("absorbed").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eco_llm.config import SigmaConfig
from eco_llm.model.linear import Linear
from eco_llm.model.norm import RMSNorm
from eco_llm.model.rotary import rotary_table
from eco_llm.ops.mla_heads import mla_heads
from eco_llm.ops.mla_heads.reference import rotate

VECTOR = 16
"""Bytes that attention kernels read at once: values whose rows do not begin at a multiple of it are copied."""


@dataclass
class MLACache:
    """What one MLA layer keeps for generation: room for S tokens, of which `length` are filled."""

    c_kv: Tensor  # [B, S, L]
    k_rope: Tensor  # [B, S, R], already rotated
    length: int = 0


class MLA(nn.Module):
    """Causal latent attention; `forward` for training, `extend` for generation with a cache."""

    def __init__(self, config: SigmaConfig) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.rope_dim = config.n_heads, config.head_dim, config.rope_head_dim
        self.nope_dim = self.head_dim - self.rope_dim
        self.latent_dim, self.rope_theta = config.kv_latent_dim, config.rope_theta
        width = self.n_heads * self.head_dim

        if config.q_latent_dim:
            self.q_proj: nn.Module = nn.Sequential(
                Linear(config.d_model, config.q_latent_dim),
                RMSNorm(config.q_latent_dim, config.norm_eps),
                Linear(config.q_latent_dim, width),
            )
        else:
            self.q_proj = Linear(config.d_model, width)
        self.kv_down = Linear(config.d_model, self.latent_dim + self.rope_dim)
        self.kv_norm = RMSNorm(self.latent_dim, config.norm_eps)
        # Rows: head 0's [key n ; value d], head 1's, …
        self.kv_up = Linear(self.latent_dim, self.n_heads * (self.nope_dim + self.head_dim))
        self.out_proj = Linear(width, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]; positions 0 … T−1."""
        return self.out_proj(self.attend(x))

    def attend(self, x: Tensor) -> Tensor:
        """What `forward` projects out, the heads' results side by side: x [B, T, D] -> [B, T, h·d]."""
        table = rotary_table(0, x.shape[1], self.rope_dim, self.rope_theta, x.device)
        return self._attention(
            *mla_heads(
                self.q_proj(x), self.kv_down(x), self.kv_norm.weight, self.kv_up.weight, table,
                heads=self.n_heads, eps=self.kv_norm.eps,
            )
        )  # fmt: skip

    def extend(self, x: Tensor, cache: MLACache) -> Tensor:
        """The next T tokens of a sequence whose past is in `cache`, which grows by them. x and result [B, T, D].

        Raises:
            ValueError: the cache has no room for them.
        """
        start, end = cache.length, cache.length + x.shape[1]
        if end > cache.c_kv.shape[1]:
            raise ValueError(f"cache holds {cache.c_kv.shape[1]} tokens, {end} are needed")
        q_nope, q_rope, c_kv, k_rope = self._project(x, start)
        cache.c_kv[:, start:end] = c_kv
        cache.k_rope[:, start:end] = k_rope
        cache.length = end
        if start == 0:  # no past: a prompt takes the training path, whose cost in T is far lower
            y = self._expanded(q_nope, q_rope, c_kv, k_rope)
        else:
            y = self._absorbed(q_nope, q_rope, cache.c_kv[:, :end], cache.k_rope[:, :end])
        return self.out_proj(y)

    def init_cache(self, batch_size: int, max_tokens: int, device: torch.device, dtype: torch.dtype) -> MLACache:
        """Room for `max_tokens`, none filled."""
        c_kv = torch.empty(batch_size, max_tokens, self.latent_dim, device=device, dtype=dtype)
        return MLACache(c_kv, c_kv.new_empty(batch_size, max_tokens, self.rope_dim))

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_nope [B, h, T, n], q_rope [B, h, T, R], c_kv [B, T, L], k_rope [B, T, R]; rotated from position `start`."""
        batch, time, _ = x.shape
        table = rotary_table(start, time, self.rope_dim, self.rope_theta, x.device)
        q = self.q_proj(x).view(batch, time, self.n_heads, self.head_dim).transpose(1, 2)
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        c_kv, k_rope = self.kv_down(x).split((self.latent_dim, self.rope_dim), dim=-1)
        return q_nope, rotate(q_rope, table), self.kv_norm(c_kv), rotate(k_rope, table)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor) -> Tensor:
        """Attention of T tokens over themselves with keys and values expanded from the latent, [B, T, h·d]."""
        batch, time, _ = c_kv.shape
        kv = self.kv_up(c_kv).view(batch, time, self.n_heads, self.nope_dim + self.head_dim).transpose(1, 2)
        k_nope, v = kv.split((self.nope_dim, self.head_dim), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, self.n_heads, -1, -1)), dim=-1)
        return self._attention(q, k, v)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of every token over itself and those before it; all [B, h, T, d] -> [B, T, h·d]."""
        if any(width * v.element_size() % VECTOR for width in (self.nope_dim, self.head_dim)):
            v = v.contiguous()
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor) -> Tensor:
        """Attention of the last T of S tokens over c_kv [B, S, L] and k_rope [B, S, R], not expanded; [B, T, h·d]."""
        time, past = q_nope.shape[2], c_kv.shape[1]
        per_head = self.kv_up.weight.view(self.n_heads, self.nope_dim + self.head_dim, self.latent_dim)
        key_up, value_up = per_head.to(c_kv.dtype).split((self.nope_dim, self.head_dim), dim=1)
        c_kv, k_rope = c_kv[:, None], k_rope[:, None]  # one "head" for all
        scores = (q_nope @ key_up) @ c_kv.mT + q_rope @ k_rope.mT  # [B, h, T, S]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.head_dim**-0.5
        seen = torch.ones(time, past, dtype=torch.bool, device=scores.device).tril(past - time)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).to(c_kv.dtype)
        y = (weights @ c_kv) @ value_up.mT  # [B, h, T, d]
        return y.transpose(1, 2).flatten(2)
