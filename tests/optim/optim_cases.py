"""Shared inputs of the optimizer tests: shapes that break layouts, rules as data, gradient sequences."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from eco_llm.optim.c3o import C3O

# 1-D, odd, exactly one block, one over, several blocks, 0-dim, empty, higher rank.
SHAPES = ((3,), (63, 65), (4096,), (4097,), (100, 130), (), (0,), (2, 3, 5))

# Every option of the rule, each strong enough to change the result (test_c3o_rule checks that it does).
RULES: dict[str, dict[str, Any]] = {
    "plain": {"trust_radius": 0.0},
    "cap": {"trust_radius": 0.1},
    "cap-binds": {"trust_radius": 1e-3, "lr": 1e-2},
    "skip": {"trust_radius": 0.1, "trust_norm_refresh_drift": 0.05, "trust_norm_refresh_steps": 3, "lr": 3e-3},
    "credit": {"credit_gain": 20.0},
    "credit-skip": {"credit_gain": 20.0, "trust_norm_refresh_drift": 0.05, "lr": 1e-3},
    "clip-norm": {"grad_clip": 0.5, "grad_clip_mode": "norm"},
    "clip-value": {"grad_clip": 0.01, "grad_clip_mode": "value"},
    "no-decay": {"weight_decay": 0.0},
    "no-momentum": {"betas": (0.0, 0.999)},
    "no-second": {"betas": (0.9, 0.0), "eps": 1e-3, "trust_norm_refresh_drift": 0.1},
    "big-eps": {"eps": 1e-1},
    "sphere": {"sphere": 3.0, "lr": 1e-2},
    "no-nesterov": {"nesterov": False},
    "no-nesterov-skip": {"nesterov": False, "trust_norm_refresh_drift": 0.05, "trust_norm_refresh_steps": 3},
    "all": {"credit_gain": 20.0, "sphere": 3.0, "grad_clip": 0.5},
    "sphere-credit": {"sphere": 3.0, "lr": 1e-2, "credit_gain": 20.0, "trust_radius": 0.0},
}

# parameter dtype, state dtype
DTYPES: tuple[tuple[torch.dtype, torch.dtype | str], ...] = (
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, "int8"),
    (torch.float32, "int8"),
    (torch.bfloat16, "int4"),
    (torch.float32, "int4"),
)


def parameters(dtype: torch.dtype = torch.float64, shapes: Any = SHAPES, device: str = "cpu") -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(1)
    values = [torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes]
    values.append(torch.zeros(5, 7, dtype=torch.float64))  # zero-initialised
    values.append(torch.randn(7, 9, generator=gen, dtype=torch.float64).T)  # non-contiguous
    return [nn.Parameter(v.to(device, dtype)) for v in values]


def set_gradients(params: list[nn.Parameter], step: int, *, scale: float = 1e-2) -> None:
    """Gradients of step `step`: fixed by the step, with a persistent part so that the moments mean something."""
    gen, fixed = torch.Generator().manual_seed(100 + step), torch.Generator().manual_seed(7)
    for p in params:
        noise = torch.randn(p.shape, generator=gen, dtype=torch.float64)
        trend = torch.randn(p.shape, generator=fixed, dtype=torch.float64)
        p.grad = (scale * (noise + trend)).to(p.device, p.dtype)


def run(optimizer: C3O, params: list[nn.Parameter], steps: int, start: int = 0) -> None:
    for i in range(start, start + steps):
        set_gradients(params, i)
        optimizer.step()


def resumed(optimizer: C3O, params: list[nn.Parameter]) -> tuple[C3O, list[nn.Parameter]]:
    """A new optimizer of copies of `params`, its state loaded from what was saved of `optimizer`; and the copies."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    after = [nn.Parameter(p.detach().clone()) for p in params]
    second = C3O(after)
    second.load_state_dict(torch.load(file, weights_only=True))
    return second, after


def assert_alike(x: Tensor, y: Tensor, *, rounded: bool) -> None:
    """Two paths' float32 results, of one parameter or state tensor.

    Args:
        rounded: something of the step is stored in fewer bits than it is computed in: a last-bit difference of float32
            arithmetic may round to the other neighbour, or to the other code, rarely.
    """
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    if not rounded:
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6)
        return
    differs = (x.double() - y.double()).abs().gt(1e-4 * y.double().abs()).double()
    assert x.numel() < 99 or differs.mean() < 0.01
    if x.is_floating_point():
        torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-7 * float(y.abs().max()) if y.numel() else 0.0)


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters and state tensors, in a fixed order."""
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found.append(p.detach())
            found += [v for _, v in sorted(optimizer.state.get(p, {}).items()) if isinstance(v, Tensor)]
    return found


def bits(tensors: list[Tensor]) -> list[bytes]:
    """Exact bit patterns: tells -0 from 0, and one NaN from another."""
    return [t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]
