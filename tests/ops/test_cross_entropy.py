"""Chunked linear + cross-entropy against all logits at once; values and gradients."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eco_llm.ops.cross_entropy import linear_cross_entropy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS, WIDTH, VOCAB = 50, 24, 97
# Kernels run on the GPU, or anywhere under TRITON_INTERPRET=1 (still selected with `-m gpu`).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICE = "cpu" if INTERPRETED else "cuda"
BF16_TOLERANCE = 2e-2 if INTERPRETED else 1e-2  # Triton 3.6's interpreter truncates to bfloat16 instead of rounding


def make_inputs(
    dtype: torch.dtype, device: str = "cpu", ignored: int = 11, tokens: int = TOKENS, vocab: int = VOCAB
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[torch.randperm(tokens, generator=generator)[:ignored]] = -100
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


# ---- the Triton kernels -------------------------------------------------------------------------------------------


def use_blocks(monkeypatch: pytest.MonkeyPatch, block: int | None) -> None:
    """Make the row kernel walk over blocks of `block` logits, also where a row would fit in one."""
    from eco_llm.ops.cross_entropy import triton

    if block is not None:
        monkeypatch.setattr(triton, "row_block", lambda vocab: (block, 4))


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("tokens", "ignored", "vocab", "chunk", "block"),
    [
        (1, 0, 97, 8, None),  # one block holds the row
        (13, 3, 97, 5, 32),  # 32 does not divide 97, nor 5 divide 13
        (13, 3, 256, 13, 64),  # every block full
        (50, 11, 257, 1000, 128),
        (13, 13, 257, 5, None),  # nothing counts
        (7, 2, 32_768 + 64, 4, None),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, BF16_TOLERANCE), (torch.float16, 2e-3)], ids=str
)
def test_triton_equals_full_logits(
    dtype: torch.dtype, tolerance: float, tokens: int, ignored: int, vocab: int, chunk: int, block: int | None,
    reduction: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use_blocks(monkeypatch, block)
    hidden, weight, targets = make_inputs(dtype, KERNEL_DEVICE, ignored, tokens, vocab)
    kwargs = {"chunk_tokens": chunk, "reduction": reduction, "backend": "triton"}
    loss = linear_cross_entropy(hidden, weight, targets, **kwargs)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(3.0 * loss, (hidden, weight))
    assert [g.dtype for g in grads] == [dtype, dtype]
    if ignored == tokens:
        assert loss == 0.0
        assert not any(g.any() for g in grads)
        return
    for got, want in zip((loss, *grads), full_logits(hidden, weight, targets, reduction), strict=True):
        assert_close(got, want, tolerance)
    assert not grads[0][targets == -100].any()
    with torch.no_grad():
        none = linear_cross_entropy(hidden, weight, targets, **{**kwargs, "reduction": "none"})
        want = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="none")
        assert_close(none, want, tolerance)
        assert_close(linear_cross_entropy(hidden, weight, targets, **kwargs), loss, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("strided", [False, True])
def test_triton_autocast_and_strides(strided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use_blocks(monkeypatch, 32)
    hidden, weight, targets = make_inputs(torch.float32, KERNEL_DEVICE)
    if strided:
        hidden = torch.stack([hidden.detach()] * 2, dim=2)[..., 0].requires_grad_()
        weight = weight.detach().t().contiguous().t().requires_grad_()
        targets = torch.stack([targets] * 2, dim=1)[:, 0]
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=7, backend="triton")
        old = linear_cross_entropy(hidden, weight, targets, chunk_tokens=7, backend="chunked")
    grads, olds = (torch.autograd.grad(3.0 * x, (hidden, weight)) for x in (loss, old))
    assert loss.dtype == grads[0].dtype == grads[1].dtype == torch.float32
    for got, want in zip((loss, *grads), (old, *olds), strict=True):
        assert_close(got, want, BF16_TOLERANCE)
    for got, want in zip((loss, *grads), full_logits(hidden, weight, targets, "mean"), strict=True):
        assert_close(got, want, BF16_TOLERANCE)


@pytest.mark.gpu
def test_triton_far_logits_stay_exact_and_bad_targets_are_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    use_blocks(monkeypatch, 2)
    hidden = torch.tensor([[20_000.0]], device=KERNEL_DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [0.5]], device=KERNEL_DEVICE, requires_grad=True)
    kwargs = {"chunk_tokens": 1, "backend": "triton"}
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1], device=KERNEL_DEVICE), **kwargs)
    assert loss == 20_000.0
    assert torch.isfinite(torch.autograd.grad(loss, weight)[0]).all()
    for bad in (3, -1):
        assert linear_cross_entropy(hidden, weight, torch.tensor([bad], device=KERNEL_DEVICE), **kwargs).isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_triton_scales_in_place_only_what_nobody_reads_again(factor: float) -> None:
    hidden, weight, targets = make_inputs(torch.float32, KERNEL_DEVICE)

    def gradients(retain: bool, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss * factor, (hidden, weight), retain_graph=retain)

    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=7, backend="triton")
    walks = [gradients(True, loss), gradients(True, loss), gradients(False, loss)]
    for walk in walks[1:]:
        for a, b in zip(walk, walks[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(False, loss)
    # Into .grad, twice: the second adds to the first.
    for _ in range(2):
        (linear_cross_entropy(hidden, weight, targets, chunk_tokens=7, backend="triton") * factor).backward()
    for leaf, once in zip((hidden, weight), walks[0], strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once, rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_triton_refuses_float64_and_gradients_of_none() -> None:
    hidden, weight, targets = make_inputs(torch.float64, KERNEL_DEVICE)
    with pytest.raises(ValueError, match="float64"):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=7, backend="triton")
    with pytest.raises(ValueError, match="no gradient"):
        linear_cross_entropy(
            hidden.float(), weight.float(), targets, chunk_tokens=7, reduction="none", backend="triton"
        )


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("chunk", [64, 256])
def test_triton_in_a_cuda_graph_without_syncs(chunk: int) -> None:
    hidden, weight, targets = make_inputs(torch.bfloat16, "cuda", 9, 200, 1024)

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        for got, want in zip(captured, eager, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("vocab", [32_768, 50_304, 50_257])
def test_triton_at_full_size(vocab: int) -> None:
    """Warps race only at size: bit-equal over repetitions, and equal to the eager twin. Peak memory as promised."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(1000, 256, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, 256, device="cuda", generator=generator) / 8).bfloat16().requires_grad_()
    targets = torch.randint(vocab, (1000,), device="cuda", generator=generator)
    targets[::7] = -100

    def step(backend: str) -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=512, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    first = step("triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        for got, want in zip(step("triton"), first, strict=True):
            assert torch.equal(got, want)
    logits, d_weight = 512 * vocab * 4, vocab * 256 * 4
    assert torch.cuda.max_memory_allocated() - before < logits + 2.5 * d_weight + 2**24
    for got, want in zip(first, step("chunked"), strict=True):
        assert_close(got, want, 1e-2)
