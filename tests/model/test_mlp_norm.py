"""SwiGLU and RMSNorm against their formulas written out, and by finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from eco_llm.config import SigmaConfig
from eco_llm.model.mlp import SwiGLU
from eco_llm.model.norm import RMSNorm
from eco_llm.ops.backend import reference_only


def make(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    module = SwiGLU(SigmaConfig(d_model=8, mlp_hidden_dim=10)) if kind == "mlp" else RMSNorm(8, 1e-3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return module.to(dtype)


def test_swiglu_formula() -> None:
    mlp = make("mlp")
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    gate, up = mlp.gate_up.weight[:10], mlp.gate_up.weight[10:]
    g = x @ gate.t()
    torch.testing.assert_close(mlp(x), (g / (1 + torch.exp(-g)) * (x @ up.t())) @ mlp.down.weight.t())


def test_swiglu_keeps_its_parameters_and_takes_the_autocast_type() -> None:
    mlp = make("mlp", torch.float32)
    assert {name: tuple(t.shape) for name, t in mlp.state_dict().items()} == {
        "gate_up.weight": (20, 8),
        "down.weight": (8, 10),
    }
    x = torch.randn(2, 3, 8)
    plain = mlp(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x)
        want = mlp.down(F.silu(mlp.gate_up(x)[..., :10]) * mlp.gate_up(x)[..., 10:])
    assert (plain.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(y, want)
    y.float().sum().backward()
    assert [p.grad.dtype for p in mlp.parameters() if p.grad is not None] == [torch.float32] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_swiglu_on_cuda_is_the_reference_in_bf16(compiled: bool) -> None:
    """Weights' gradients are float32 and whole; evaluation gives the same numbers as training."""
    mlp = make("mlp", torch.float32).cuda()
    x = torch.randn(2, 63, 8, device="cuda", requires_grad=True)
    dy = torch.randn(2, 63, 8, device="cuda", dtype=torch.bfloat16)
    leaves = (x, *mlp.parameters())

    def run(module: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16):
            y = module(x)
        return y, *torch.autograd.grad(y, leaves, dy)

    module = torch.compile(mlp, fullgraph=True) if compiled else mlp
    got = run(module)
    with reference_only():
        want = run(mlp)
    assert [t.dtype for t in got] == [torch.bfloat16, *[torch.float32] * 3]
    for actual, expected in zip(got, want, strict=True):
        assert (actual - expected).abs().max() < 2.5e-2 * expected.abs().max()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(module(x), got[0])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_rmsnorm_formula_and_type(dtype: torch.dtype, tolerance: float) -> None:
    norm = make("norm", torch.float32)
    x = (0.05 * torch.randn(2, 3, 8)).to(dtype)  # small, so that epsilon counts
    wide = x.double()
    want = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    got = norm(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["mlp", "norm"])
def test_gradients_by_finite_differences(kind: str) -> None:
    module = make(kind)
    names, values = zip(*module.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True), *values))


def test_rmsnorm_keeps_its_type_under_the_autocast_of_cuda() -> None:
    """Which casts rms_norm up, unlike the CPU's. Fake tensors take its path without a GPU."""
    norm = RMSNorm(8, 1e-3)
    with FakeTensorMode(), torch.no_grad():
        norm.weight = torch.nn.Parameter(torch.empty(8, device="cuda"), requires_grad=False)
        x = torch.empty(3, 8, device="cuda", dtype=torch.bfloat16)
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            assert F.linear(x.float(), x.float()).dtype == torch.bfloat16  # autocast is on
            assert norm(x).dtype == torch.bfloat16
            assert norm(x.float()).dtype == torch.float32
        finally:
            torch.set_autocast_enabled("cuda", enabled)
            torch.set_autocast_dtype("cuda", dtype)
