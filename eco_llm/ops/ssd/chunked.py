"""The SSD recurrence in chunks: matrix products inside a chunk, one small scan over chunks.

Source: arXiv 2405.21060 ("Transformers are SSMs"), section 6 and listing 1. The maths: README.md beside this file.

Shape legend: b batch, c chunk, l and s positions inside a chunk of L tokens, g group, r head within its group
(H = G·R heads in all), p head width, n state size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _decay_between(log_decay_cumsum: Tensor) -> Tensor:
    """exp(segment sum): [..., L] inclusive cumulative log-decays -> [..., L, L] with entry (l, s) the decay
    from after token s to after token l, 0 where s > l.

    The mask is added before `exp`: above the diagonal the difference is positive and its exponential may be
    inf, which times a zero gradient would be NaN.
    """
    length = log_decay_cumsum.shape[-1]
    future = log_decay_cumsum.new_full((length, length), -torch.inf).triu_(1)
    segment = log_decay_cumsum[..., :, None] - log_decay_cumsum[..., None, :]
    return segment.add_(future).exp_()


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `eco_llm.ops.ssd.ssd`; `state` [B, H, P, N] or None for zeros.

    Decays, their sums inside a chunk and the scan over chunks are float32 (float64 for float64 x); the matrix
    products take operands in the type of x, each rounded once, after it has been multiplied by its decays.
    """
    batch, time, heads, width = x.shape
    groups, state_size = B.shape[2:]
    per_group = heads // groups
    wide = torch.promote_types(x.dtype, torch.float32)
    length = min(chunk_size, time)
    chunks = -(-time // length)

    u, dt = x, dt.to(wide)
    if pad := chunks * length - time:
        # A token with dt = 0 neither decays the state nor adds to it, so padding leaves the final state right.
        u, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (u, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))

    # Tokens last in memory, so that code for the decays below, L·L a head and chunk, is vectorised along them.
    dt = dt.view(batch, chunks, length, groups, per_group)
    by_head = (dt * A.to(wide).view(groups, per_group)).permute(0, 1, 3, 4, 2).contiguous()
    cum_by_head = by_head.cumsum(-1)  # b c g r l, inside each chunk
    cum = cum_by_head.permute(0, 1, 4, 2, 3)  # b c l g r
    u = u.reshape(batch, chunks, length, groups, per_group, width)
    B = B.reshape(batch, chunks, length, groups, state_size).transpose(2, 3)  # b c g l n
    C = C.reshape(batch, chunks, length, groups, state_size).transpose(2, 3)

    # 1. Inside a chunk (the diagonal blocks): attention with scores C·B weighted by the decay.
    scores = (C @ B.mT).unsqueeze(3)  # b c g 1 l s
    weights = (scores * _decay_between(cum_by_head)).to(x.dtype)  # b c g r l s
    du = (u * dt.unsqueeze(-1)).to(x.dtype)
    y = (weights @ du.permute(0, 1, 3, 4, 2, 5)).permute(0, 1, 4, 2, 3, 5)  # b c l g r p

    # 2. What each chunk alone would leave in the state. Heads of a group share B: one wide product.
    dt_to_end = dt * torch.exp(cum[:, :, -1:] - cum)  # b c l g r
    weighted = (u * dt_to_end.unsqueeze(-1)).to(x.dtype).transpose(2, 3).flatten(4)  # b c g l (r p)
    local = (B.mT @ weighted).to(wide)  # b c g n (r p)
    local = local.unflatten(-1, (per_group, width)).transpose(3, 4)  # b c g r n p

    # 3. Scan over chunks as one product with the matrix of decays between chunk boundaries.
    if state is None:
        first = local.new_zeros(batch, 1, groups, per_group, state_size, width)
    else:
        first = state.to(wide).mT.reshape(batch, 1, groups, per_group, state_size, width)
    # These sums span the whole sequence: float64 keeps their differences exact, and there are few of them.
    boundary = F.pad(cum[:, :, -1], (0, 0, 0, 0, 1, 0)).double().cumsum(1)  # b c+1 g r
    between = _decay_between(boundary.permute(0, 2, 3, 1)).to(wide)  # b g r c+1 c+1
    states = torch.einsum("bgrcz,bzgrnp->bcgrnp", between, torch.cat((first, local), 1))
    final = states[:, -1].reshape(batch, heads, state_size, width).mT

    # 4. What the state at the start of a chunk adds to each of its outputs.
    entering = states[:, :-1].transpose(3, 4).flatten(4).to(x.dtype)  # b c g n (r p)
    carried = (C @ entering).unflatten(-1, (per_group, width)).transpose(2, 3)  # b c l g r p
    y = y + carried * torch.exp(cum).unsqueeze(-1)

    y = y.reshape(batch, chunks * length, heads, width)[:, :time]
    if D is not None:
        y = y + D.to(wide)[:, None] * x
    return y.to(x.dtype), final
