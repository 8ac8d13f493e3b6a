"""oneDNN's products against PyTorch's own, wherever oneDNN is; which of the two a machine takes, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eco_llm.config import SigmaConfig
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.ops import onednn, traced_backend
from eco_llm.ops.backend import Kernels, reference_only
from eco_llm.ops.products import linear, linear_unread

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN on any processor, for products of any size."""
    for module in (onednn, traced_backend):
        monkeypatch.setattr(module, "products_by", lambda: Kernels("onednn", "for a test"))
    monkeypatch.setattr(onednn, "LEAST_WORK", 1)


def leaf(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, torch.Size]]:
    """Shapes of what oneDNN is given from now on."""
    seen: list[tuple[torch.Size, torch.Size]] = []
    plain = onednn.onednn_matmul

    def spy(a: Tensor, b: Tensor, transpose: bool = False) -> Tensor:
        seen.append((a.shape, b.shape))
        return plain(a, b, transpose)

    monkeypatch.setattr(onednn, "onednn_matmul", spy)
    monkeypatch.setattr("eco_llm.ops.products.onednn_matmul", spy)
    return seen


@pytest.mark.parametrize("shape", [(63, 24, 40), (1, 7, 5), (130, 384, 12)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_the_operator_is_a_product(shape: tuple[int, int, int], transposed: bool, transpose: bool) -> None:
    rows, inner, columns = shape
    a = leaf(rows, inner, seed=0)
    b = leaf(columns, inner, seed=1).t() if transposed else leaf(inner, columns, seed=1)
    d_out = leaf(columns, rows, seed=2).t().detach()  # not row by row: copied inside
    y = onednn.onednn_matmul(a, b, transpose)
    ours = (y, *torch.autograd.grad(y, (a, b), d_out))
    left, right, d = (t.detach().double() for t in (a, b, d_out))
    for actual, (f, g) in zip(ours, ((left, right), (d, right.t()), (left.t(), d)), strict=True):
        assert ((actual - f @ g).abs() <= 4 * 2**-23 * (f.abs() @ g.abs())).all()
    torch.library.opcheck(onednn.onednn_matmul.overload, (a, b.detach().requires_grad_(), transpose))


@pytest.mark.parametrize("shape", [(2, 63, 24), (1, 1, 24), (7, 24)], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_linear(taken: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], compiled: bool) -> None:
    """Value, gradients and their strides, second derivatives; and that it was oneDNN."""
    x, weight, d_y = leaf(*shape, seed=0), leaf(40, 24, seed=1), leaf(*shape[:-1], 40, seed=2)
    seen = calls_of(monkeypatch)
    ours = torch.compile(linear, backend="aot_eager") if compiled else linear
    found: list[tuple[Tensor, ...]] = []
    for function in (ours, F.linear):
        y = function(x, weight)
        first = torch.autograd.grad(y, (x, weight), d_y, create_graph=not compiled)
        second = () if compiled else torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, d_y))
        found.append((y, *first, *second))
    assert seen
    for index, (actual, expected) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert index > 2 or actual.stride() == expected.stride()


@pytest.mark.parametrize(
    ("backend", "outputs", "narrow"),
    [
        ("aot_eager", 40, ([24, 63], [63, 40])),
        ("aot_eager", 12, ([12, 63], [63, 24])),
        ("inductor", 40, ([24, 63], [63, 40])),
    ],
)
def test_a_compiled_weight_gradient_transposes_the_narrower_factor(
    taken: None, outputs: int, narrow: tuple[list[int], list[int]], backend: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # its key knows the forward graph alone
    x, weight, d_y = leaf(63, 24, seed=0), leaf(outputs, 24, seed=1), leaf(63, outputs, seed=2).detach()
    step = torch.compile(linear, backend=backend)
    torch.autograd.grad(step(x, weight), (x, weight), d_y)  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        d_x, d_weight = torch.autograd.grad(step(x, weight), (x, weight), d_y)
    called = [event.input_shapes[:2] for event in profile.events() if event.name == "eco_llm::onednn_matmul"]
    assert sorted(called) == sorted([[[63, 24], [24, outputs]], [[63, outputs], [outputs, 24]], list(narrow)])
    torch.testing.assert_close(d_x, d_y @ weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d_weight, d_y.t() @ x, rtol=1e-4, atol=1e-4)
    assert d_weight.is_contiguous()


@pytest.mark.parametrize("outputs", [40, 12])
def test_factors_whose_rows_overlap_are_left_to_pytorch(taken: None, outputs: int) -> None:
    base, weight, d_y = leaf(160, seed=0), leaf(outputs, 24, seed=1), leaf(outputs + 62, seed=2).detach()
    found = []
    for function in (torch.compile(linear, backend="aot_eager"), F.linear):
        y = function(base.unfold(0, 24, 2), weight)
        assert y.shape[0] == 69
        found.append(torch.autograd.grad(y, (base, weight), d_y.new_ones(69, outputs)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    overlapping = d_y.unfold(0, outputs, 1)  # [63, outputs]
    x = leaf(63, 24, seed=3).detach()
    torch.testing.assert_close(onednn.weight_product(overlapping, x, True), overlapping.t() @ x, rtol=1e-4, atol=1e-4)


def test_an_unread_product_has_the_same_bits(taken: None) -> None:
    x, weight, d_y = leaf(2, 63, 24, seed=0), leaf(40, 24, seed=1), leaf(2, 63, 40, seed=2).detach()
    ours, expected = (torch.autograd.grad(f(x, weight), (x, weight), d_y) for f in (linear_unread, linear))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_model_learns_the_same(taken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient of a SigmaLLM with both kinds of block, head and loss."""
    config = SigmaConfig(
        vocab_size=257, d_model=32, n_layers=6, n_heads=2, mamba_head_dim=16, mamba_state_dim=8, kv_latent_dim=16,
        rope_head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SigmaLLM(config)
    tokens, targets = torch.randint(257, (2, 2, 63)).unbind()

    def learn() -> list[Tensor]:
        model.zero_grad()
        loss = model.loss(tokens, targets)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    seen = calls_of(monkeypatch)
    ours = learn()
    assert len(seen) > 6 * 6  # forward and the gradients of inputs, at least three products a block
    with reference_only():
        expected = learn()
    assert len(ours) == 1 + len(list(model.parameters()))
    for actual, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-3, atol=1e-5)


def test_what_it_does_not_serve(taken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.zeros(16, 8), torch.zeros(8, 4)
    assert onednn.serves(a, b)
    assert onednn.serves(a.view(2, 8, 8), b)
    assert not onednn.serves(a.double(), b.double())
    assert not onednn.serves(a.bfloat16(), b.bfloat16())
    assert not onednn.serves(torch.zeros(8, 16).t(), b)  # it would be copied
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.serves(a, b)
    with reference_only():
        assert not onednn.serves(a, b)
    monkeypatch.setattr(onednn, "LEAST_WORK", 16 * 8 * 4 + 1)
    assert not onednn.serves(a, b)


@pytest.mark.parametrize(
    ("capabilities", "name", "reason"),
    [
        ({"sse4a": True, "avx512_f": True}, "onednn", "AVX-512"),
        ({"sse4a": True, "avx512_f": False}, "pytorch", "without AVX-512"),
        ({"avx512_f": True}, "pytorch", "AMD processors only"),
    ],
)
def test_the_choice_is_named(
    capabilities: dict[str, bool], name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    chosen = onednn.products_by.__wrapped__()
    assert chosen.name == name
    assert reason in chosen.why


def test_without_its_parts_the_choice_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkl, "is_available", lambda: False)
        assert "MKL" in onednn.products_by.__wrapped__().why
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    chosen = onednn.products_by.__wrapped__()
    assert (chosen.name, chosen.why) == ("pytorch", "this PyTorch has no oneDNN operator for products")
