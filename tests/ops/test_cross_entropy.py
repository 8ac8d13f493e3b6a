"""Chunked linear + cross-entropy against all logits at once; values and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eco_llm.ops.cross_entropy import linear_cross_entropy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS, WIDTH, VOCAB = 50, 24, 97


@pytest.fixture
def nan_filled_buffers() -> Iterator[None]:
    """torch.empty returns NaN, so that a buffer read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def make_inputs(dtype: torch.dtype, device: str = "cpu", ignored: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[torch.randperm(TOKENS, generator=generator)[:ignored]] = -100
    leaves = (t.to(device, dtype).requires_grad_() for t in (hidden, weight))
    return *leaves, targets.to(device)


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in float64, by PyTorch's own cross-entropy."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=-100, reduction=reduction)
    return loss, *torch.autograd.grad(3.0 * loss, (hidden, weight))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.detach().double() - expected.detach().double()).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [1, 7, 25, 50, 1000])  # 7 does not divide 50 tokens
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_equals_full_logits(
    dtype: torch.dtype, tolerance: float, chunk: int, reduction: str, backend: str, device: str
) -> None:
    hidden, weight, targets = make_inputs(dtype, device)
    loss = linear_cross_entropy(
        hidden,
        weight,
        targets,
        chunk_tokens=chunk,
        reduction=reduction,
        backend=backend,
    )
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    grads = torch.autograd.grad(3.0 * loss, (hidden, weight))
    assert [g.dtype for g in grads] == [dtype, dtype]
    for got, want in zip((loss, *grads), full_logits(hidden, weight, targets, reduction), strict=True):
        assert_close(got, want, tolerance)
    assert not grads[0][targets == -100].any()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_multiplies_in_bf16_and_accumulates_in_float32(device: str) -> None:
    hidden, weight, targets = make_inputs(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=7)
    exact = linear_cross_entropy(hidden, weight, targets, chunk_tokens=7)
    grads = torch.autograd.grad(3.0 * loss, (hidden, weight))
    assert loss.dtype == grads[0].dtype == grads[1].dtype == torch.float32
    assert loss != exact  # or autocast was not honoured
    for got, want in zip((loss, *grads), full_logits(hidden, weight, targets, "mean"), strict=True):
        assert_close(got, want, 1e-2)
    # dWeight over many chunks: bf16 sums would drift, float32 ones do not.
    repeated, many = hidden.detach().repeat(64, 1), targets.repeat(64)
    with torch.autocast(device, torch.bfloat16):
        total = linear_cross_entropy(repeated, weight, many, chunk_tokens=7, reduction="sum")
        (once,) = torch.autograd.grad(
            linear_cross_entropy(hidden, weight, targets, chunk_tokens=TOKENS, reduction="sum"), weight
        )
    assert_close(torch.autograd.grad(total, weight)[0], 64 * once, 4e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_by_finite_differences(reduction: str) -> None:
    hidden, weight, targets = make_inputs(torch.float64)
    hidden, weight = hidden[:9].detach().requires_grad_(), weight[:13].detach().requires_grad_()
    labels = torch.where(targets[:9] < 0, targets[:9], targets[:9] % 13)

    def function(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, labels, chunk_tokens=4, reduction=reduction)

    assert (labels == -100).any()
    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_counts(reduction: str, backend: str) -> None:
    hidden, weight, targets = make_inputs(torch.float32, ignored=TOKENS)
    loss = linear_cross_entropy(
        hidden,
        weight,
        targets,
        chunk_tokens=8,
        reduction=reduction,
        backend=backend,
    )
    assert loss == 0.0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_far_logits_stay_exact() -> None:
    """A target of probability e^−20000 has loss 20000, not inf."""
    hidden = torch.tensor([[20_000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]), chunk_tokens=1)
    assert loss == 20_000.0
    assert torch.isfinite(torch.autograd.grad(loss, weight)[0]).all()


def test_none_gives_one_value_a_token_and_refuses_gradients() -> None:
    hidden, weight, targets = make_inputs(torch.float64)
    with pytest.raises(ValueError, match="no gradient"):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=7, reduction="none")
    with torch.no_grad():
        got = linear_cross_entropy(hidden, weight, targets, chunk_tokens=7, reduction="none")
        want = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def count_flops(hidden: Tensor, weight: Tensor, targets: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=7)
    return counter.get_total_flops()


def test_no_gradient_work_that_nobody_asked_for() -> None:
    hidden, weight, targets = make_inputs(torch.float32)
    product = 2 * TOKENS * WIDTH * VOCAB
    assert count_flops(hidden, weight, targets) == 3 * product
    assert count_flops(hidden, weight.detach(), targets) == 2 * product
    assert count_flops(hidden.detach(), weight.detach(), targets) == product
    with torch.no_grad():
        assert count_flops(hidden, weight, targets) == product


@pytest.mark.parametrize("device", DEVICES)
def test_all_logits_never_exist(device: str) -> None:
    """No tensor of tokens × V elements, nor of more than the chunk's logits, is made on the way."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    hidden, weight, targets = make_inputs(torch.float32, device)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=5).backward()
    assert largest.elements == VOCAB * WIDTH  # the weight and its gradient; 5 × V is smaller, 50 × V larger


def test_retained_graph_may_be_walked_twice() -> None:
    hidden, weight, targets = make_inputs(torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=7)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_are_refused_not_wrong() -> None:
    hidden, weight, targets = make_inputs(torch.float64)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=7)
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_compiled_caller() -> None:
    hidden, weight, targets = make_inputs(torch.float32)

    def caller(h: Tensor) -> Tensor:
        return linear_cross_entropy(torch.tanh(h), weight, targets, chunk_tokens=7) * 2.0

    expected = torch.autograd.grad(caller(hidden), (hidden, weight))
    compiled = torch.compile(caller, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(hidden), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_mistakes_are_refused() -> None:
    hidden, weight, targets = make_inputs(torch.float32)
    with pytest.raises(ValueError, match="unknown cross-entropy backend"):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=7, backend="liger")
    with pytest.raises(ValueError, match="unknown reduction"):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=7, reduction="avg")
    with pytest.raises(ValueError, match="chunk_tokens"):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=0)
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(hidden, weight, targets[:-1], chunk_tokens=7)
    with pytest.raises(ValueError, match="weight"):
        linear_cross_entropy(hidden, weight.t(), targets, chunk_tokens=7)
