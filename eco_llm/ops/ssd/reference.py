"""The SSD recurrence, one time step after another: the slow judge of every other form.

Shapes: B batch, T time, H heads, P head width (channels), G groups that share B and C, N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token: h ← exp(dt·A)·h + dt·x ⊗ B, y = h·C + D·x (arXiv 2405.21060, eq. 1 with scalar A).

    Args:
        state: [B, H, P, N], float32 (float64 for float64 x). Not modified.
        x: [B, H, P].
        dt: [B, H], positive step sizes.
        A: [H], negative rates.
        B, C: [B, G, N]; head h uses group h // (H / G).
        D: [H] or None.

    Returns:
        y [B, H, P] in the type of x, and the new state.
    """
    heads_per_group = x.shape[1] // B.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        B = B.to(wide).repeat_interleave(heads_per_group, dim=1)
        C = C.to(wide).repeat_interleave(heads_per_group, dim=1)
        dt, u = dt.to(wide), x.to(wide)
        decay = torch.exp(dt * A.to(wide))
        state = decay[..., None, None] * state + (dt[..., None] * u)[..., None] * B[:, :, None, :]
        y = (state * C[:, :, None, :]).sum(-1)
        if D is not None:
            y = y + D.to(wide)[:, None] * u
        return y.to(x.dtype), state


def ssd_recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`ssd_step` over t = 0 … T-1; shapes as in `eco_llm.ops.ssd.ssd`, `state` [B, H, P, N]."""
    ys = []
    for t in range(x.shape[1]):
        y, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        ys.append(y)
    return torch.stack(ys, dim=1), state
