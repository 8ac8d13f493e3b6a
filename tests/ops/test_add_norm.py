"""The residual sum with its norm against their definition, and the Triton kernels against it; values and gradients.

Tests of the kernels need a GPU (`-m gpu`), or Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import INTERPRETED, KERNEL_DEVICE, assert_close, compile_instead_of_running, normal
from torch import Tensor

from eco_llm.ops import add_norm
from eco_llm.ops.add_norm import add_rms_norm, forked_rms_norm, rms_norm_of_sum
from eco_llm.ops.add_up import Ahead, add_up

EPS = 1e-5
# Largest error of a result as a share of its largest element.
# The interpreter cuts numbers off to bf16 where a GPU rounds them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}
SUM_TOLERANCE = 1e-5  # float32 sums over all tokens


def autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """In which products have the type, bfloat16 or no other than their operands'."""
    return torch.autocast(device, dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


def exact(x: Tensor, delta: Tensor, weight: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    """s, the norm, and gradients of x, delta and weight, in float64 by the definition."""
    leaves = [t.detach().double().requires_grad_() for t in (x, delta, weight)]
    total = leaves[0] + leaves[1]
    normed = leaves[2] * total / torch.sqrt(total.square().mean(-1, keepdim=True) + EPS)
    return total, normed, *torch.autograd.grad((total, normed), leaves, [g.double() for g in gradients])


def cases(
    shape: tuple[int, int, int], wide: torch.dtype, narrow: torch.dtype, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """([x, delta, weight], [the gradients of s and of the norm])."""
    x, d_total = (normal(*shape, seed=seed, dtype=wide, device=device) for seed in (0, 1))
    delta, d_normed = (normal(*shape, seed=seed, dtype=narrow, device=device) for seed in (2, 3))
    return [x, delta, normal(shape[2], seed=4, dtype=wide, device=device)], [d_total, d_normed]


def compare(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], wide: torch.dtype, narrow: torch.dtype) -> None:
    kinds = (wide, narrow, wide, narrow, wide)
    assert tuple(t.dtype for t in got) == kinds
    for kind, actual, expected in zip(kinds[:-1], got[:-1], wanted[:-1], strict=True):
        assert_close(actual, expected, TOLERANCE[kind])
    assert_close(got[-1], wanted[-1], 1e-12 if wide == torch.float64 else SUM_TOLERANCE)


def test_without_a_delta_the_sum_is_x() -> None:
    (x, _, weight), (d_total, d_normed) = cases((2, 7, 24), torch.float32, torch.float32, "cpu")
    leaves = [t.requires_grad_() for t in (x, weight)]
    results = add_rms_norm(leaves[0], None, leaves[1], EPS, keep_sum=True)
    assert torch.equal(results[0], x)
    got = torch.autograd.grad(results, leaves, (d_total, d_normed))
    wanted = exact(x, torch.zeros_like(x), weight, d_total, d_normed)
    for actual, expected in zip((results[1], *got), (wanted[1], wanted[2], wanted[4]), strict=True):
        assert_close(actual, expected, SUM_TOLERANCE)


TYPES = [(torch.float64,) * 2, (torch.float32,) * 2, (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("keep_sum", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 3, 40), (2, 63, 24)], ids=str)
@pytest.mark.parametrize(("wide", "narrow"), TYPES, ids=str)
def test_reference_is_the_definition(
    wide: torch.dtype, narrow: torch.dtype, shape: tuple[int, int, int], keep_sum: bool
) -> None:
    inputs, gradients = cases(shape, wide, narrow, "cpu")
    leaves = [t.requires_grad_() for t in inputs]
    with autocast("cpu", narrow):
        results = add_rms_norm(*leaves, EPS, keep_sum=keep_sum)
    got = (*results, *torch.autograd.grad(results, leaves, gradients))
    compare(got, exact(*inputs, *gradients), wide, narrow)


def test_compiled_reference() -> None:
    inputs, _ = cases((2, 12, 6), torch.float32, torch.float32, "cpu")
    compiled = torch.compile(add_rms_norm, backend="aot_eager", fullgraph=True)
    expected = add_rms_norm(*inputs, EPS, keep_sum=True)
    for actual, want in zip(compiled(*inputs, EPS, keep_sum=True), expected, strict=True):
        assert_close(actual, want, 1e-6)


def test_mistakes_are_refused() -> None:
    (x, delta, weight), _ = cases((2, 12, 6), torch.float32, torch.float32, "cpu")
    for wrong in ((x, delta[:1], weight), (x, delta, weight[:1]), (x[0], delta[0], weight)):
        with pytest.raises(ValueError, match="need x and delta"):
            add_rms_norm(*wrong, EPS, keep_sum=True)
    for wide, narrow in ((x.bfloat16(), delta), (x, delta.double())):
        with pytest.raises(ValueError, match="at least float32"):
            add_rms_norm(wide, narrow, weight, EPS, keep_sum=True)
    with pytest.raises(ValueError, match="unknown norm backend"):
        add_rms_norm(x, delta, weight, EPS, keep_sum=True, backend="apex")
    with pytest.raises(ValueError, match="float64"):
        add_rms_norm(x.double(), delta, weight, EPS, keep_sum=True, backend="triton")


def compare_alone(inputs: list[Tensor], d_normed: Tensor, narrow: torch.dtype, **how: Any) -> None:
    """`rms_norm_of_sum` with and without delta, and its gradients, against the definition."""
    for given in (inputs, [inputs[0], None, inputs[2]]):
        leaves = [t.detach().requires_grad_() for t in given if t is not None]
        x, delta, weight = leaves if len(leaves) == 3 else (leaves[0], None, leaves[1])
        with autocast(x.device.type, narrow):
            normed = rms_norm_of_sum(x, delta, weight, EPS, **how)
        assert normed.dtype == narrow
        got = (normed, *torch.autograd.grad(normed, leaves, d_normed))
        zeros = torch.zeros_like(x)
        _, *wanted = exact(x, zeros if delta is None else delta, weight, zeros, d_normed)
        if delta is None:
            del wanted[2]
        for actual, expected, like in zip(got, wanted, (normed, *leaves), strict=True):
            assert actual.dtype == like.dtype
            assert_close(actual, expected, SUM_TOLERANCE if like is leaves[-1] else TOLERANCE[like.dtype])


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 3, 40), (2, 63, 24)], ids=str)
def test_the_norm_alone_by_the_reference(shape: tuple[int, int, int], x_type: torch.dtype) -> None:
    (x, delta, weight), (_, d_normed) = cases(shape, torch.float32, x_type, "cpu")
    compare_alone([x.to(x_type), delta, weight], d_normed, x_type)
    if x_type == torch.float32:
        compare_alone([t.double() for t in (x, delta, weight)], d_normed.double(), torch.float64)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 63, 200), (3, 67, 768), (1, 3, 2560), (1, 2, 8192)], ids=str)
def test_the_norm_alone_by_kernels(shape: tuple[int, int, int], narrow: torch.dtype, x_type: torch.dtype) -> None:
    (x, delta, weight), (_, d_normed) = cases(shape, torch.float32, narrow, KERNEL_DEVICE)
    if x_type == torch.bfloat16 and narrow == torch.float32:
        d_normed = d_normed.bfloat16()  # without autocast products have the type of x
        narrow = torch.bfloat16
    compare_alone([x.to(x_type), delta, weight], d_normed, narrow, backend="triton")


def same_bits(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for actual, expected in zip(got, wanted, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def compare_beside(shape: tuple[int, int, int], narrow: torch.dtype, device: str) -> None:
    """What delta receives besides is added to its gradient, once that is of its type: nothing else differs."""
    inputs, (beside, d_normed) = cases(shape, torch.float32, narrow, device)
    leaves = [t.to(narrow).requires_grad_() for t in inputs[:2]] + [inputs[2].requires_grad_()]
    with autocast(device, narrow):
        plain = rms_norm_of_sum(*leaves, EPS)
        ours = rms_norm_of_sum(*leaves, EPS, beside=beside)
    assert torch.equal(ours, plain)
    dx, d_delta, d_weight = torch.autograd.grad(plain, leaves, d_normed)
    same_bits(torch.autograd.grad(ours, leaves, d_normed), (dx, d_delta + beside.to(narrow), d_weight))


def compare_forked(shape: tuple[int, int, int], narrow: torch.dtype, device: str) -> None:
    """The norm's gradient, rounded to the type of x, is added up as `add_up` does."""
    (x, other, weight), (stream, d_normed) = cases(shape, torch.float32, narrow, device)
    x, other = x.to(narrow).requires_grad_(), other.to(narrow)
    weight.requires_grad_()
    ahead = Ahead(other, stream, narrow)
    with autocast(device, narrow):
        plain = rms_norm_of_sum(x, None, weight, EPS)
        passed, ours = forked_rms_norm(x, weight, EPS, ahead)
    assert torch.equal(ours, plain)
    assert torch.equal(passed, x)
    dx, d_weight = torch.autograd.grad(plain, (x, weight), d_normed)
    total, narrowed = add_up(stream, other, dx, narrow)
    torch.autograd.backward((passed, ours), (other, d_normed))
    assert ahead.total is not None
    assert x.grad is not None
    assert weight.grad is not None
    same_bits((ahead.total, x.grad, weight.grad), (total, narrowed, d_weight))


@pytest.mark.parametrize("compare", [compare_beside, compare_forked])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 3, 40), (2, 63, 24)], ids=str)
def test_sums_beside_the_norms_gradient_by_the_reference(
    shape: tuple[int, int, int], narrow: torch.dtype, compare: Any
) -> None:
    compare(shape, narrow, "cpu")


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("compare", [compare_beside, compare_forked])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 63, 200), (3, 67, 768), (1, 3, 2560), (1, 2, 8192)], ids=str)
def test_sums_beside_the_norms_gradient_by_kernels(
    shape: tuple[int, int, int], narrow: torch.dtype, compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if narrow == torch.bfloat16 and INTERPRETED:
        pytest.skip("the interpreter cuts numbers off to bf16")
    monkeypatch.setattr(add_norm, "uses_triton", lambda x: True)
    monkeypatch.setattr(add_norm, "rms_norm_of_sum_reference", None)
    monkeypatch.setattr(add_norm, "fork", None)
    compare(shape, narrow, KERNEL_DEVICE)


def test_mistakes_with_the_norm_alone_are_refused() -> None:
    (x, delta, weight), _ = cases((2, 12, 6), torch.float32, torch.float32, "cpu")
    for wrong in ((x, delta[:1], weight), (x, delta, weight[:1]), (x[0], delta[0], weight), (x[0], None, weight)):
        with pytest.raises(ValueError, match="need x and delta"):
            rms_norm_of_sum(*wrong, EPS)
    for nothing, beside in ((None, x), (delta, x[:1])):
        with pytest.raises(ValueError, match="need beside"):
            rms_norm_of_sum(x, nothing, weight, EPS, beside=beside)
    with pytest.raises(ValueError, match="unknown norm backend"):
        rms_norm_of_sum(x, delta, weight, EPS, backend="apex")
    with pytest.raises(ValueError, match="float64"):
        rms_norm_of_sum(x.double(), delta, weight, EPS, backend="triton")


# Rows of less than a chunk, of chunks with nothing idle, of one warp and of several, of chunks with idle ends; numbers
# of rows that no program's rows divide.
SHAPES = [
    (2, 1, 40), (2, 63, 200), (1, 100, 128), (3, 67, 768), (1, 21, 1024), (1, 3, 2560), (1, 2, 5001), (1, 2, 8192),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keep_sum", [False, True])
@pytest.mark.parametrize("has_d_total", [False, True])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
def test_kernels(narrow: torch.dtype, has_d_total: bool, keep_sum: bool, shape: tuple[int, int, int]) -> None:
    from eco_llm.ops.add_norm.triton import add_norm_backward, add_norm_forward

    wide = torch.float32
    (x, delta, weight), (d_total, d_normed) = cases(shape, wide, narrow, KERNEL_DEVICE)
    wanted = exact(x, delta, weight, d_total if has_d_total else torch.zeros_like(d_total), d_normed)
    total, normed = add_norm_forward(x, delta, weight, EPS, narrow)

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        of_sum = (total, None) if keep_sum else (x, delta)
        dx, narrowed, d_weight = add_norm_backward(
            d_total if has_d_total else None, d_normed, *of_sum, weight, EPS, narrow
        )
        assert (narrowed is None) == (narrow == wide)
        return dx, dx if narrowed is None else narrowed, d_weight

    first = backward()
    compare((total, normed, *first), wanted, wide, narrow)
    assert torch.equal(total, x + delta)
    for one, two in zip(first, backward(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keep_sum", [False, True])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
def test_public_function_through_triton(narrow: torch.dtype, keep_sum: bool, compiled: bool) -> None:
    inputs, gradients = cases((2, 17, 40), torch.float32, narrow, KERNEL_DEVICE)
    leaves = [t.requires_grad_() for t in inputs]

    def caller(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x * 1, delta * 1, weight, EPS, keep_sum=keep_sum, backend="triton")

    run = torch.compile(caller, backend="aot_eager", fullgraph=True) if compiled else caller
    with autocast(KERNEL_DEVICE, narrow):
        results = run(*leaves)
    got = (*results, *torch.autograd.grad(results, leaves, gradients))
    compare(got, exact(*inputs, *gradients), torch.float32, narrow)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
def test_a_gradient_of_either_result_alone() -> None:
    inputs, (d_total, d_normed) = cases((2, 5, 40), torch.float32, torch.bfloat16, KERNEL_DEVICE)
    leaves = [t.requires_grad_() for t in inputs]
    with autocast(KERNEL_DEVICE, torch.bfloat16):
        total, normed = add_rms_norm(*leaves, EPS, keep_sum=True, backend="triton")
    dx, d_delta = torch.autograd.grad(total, leaves[:2], d_total, retain_graph=True)
    assert torch.equal(dx, d_total)
    assert torch.equal(d_delta, d_total.bfloat16())
    got = torch.autograd.grad(normed, leaves, d_normed)
    wanted = exact(*inputs, torch.zeros_like(d_total), d_normed)[2:]
    for actual, expected in zip(got, wanted, strict=True):
        assert_close(actual, expected, TOLERANCE[torch.bfloat16] if actual.dtype == torch.bfloat16 else SUM_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("keep_sum", [False, True])
def test_without_a_delta_the_bits_are_those_of_a_delta_of_zeros(keep_sum: bool) -> None:
    (x, _, weight), gradients = cases((2, 37, 768), torch.float32, torch.bfloat16, KERNEL_DEVICE)
    leaves = [t.requires_grad_() for t in (x, weight)]
    results = []
    for delta in (None, torch.zeros_like(x, dtype=torch.bfloat16)):
        with autocast(KERNEL_DEVICE, torch.bfloat16):
            pair = add_rms_norm(leaves[0], delta, leaves[1], EPS, keep_sum=keep_sum, backend="triton")
        results.append((*pair, *torch.autograd.grad(pair, leaves, gradients)))
    assert results[0][0].data_ptr() != x.data_ptr()
    for without, zeros in zip(*results, strict=True):
        assert without.isfinite().all()
        assert torch.equal(without, zeros)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 5, 40), (2, 0, 40)], ids=str)
def test_no_rows(shape: tuple[int, int, int]) -> None:
    inputs, gradients = cases(shape, torch.float32, torch.float32, KERNEL_DEVICE)
    leaves = [t.requires_grad_() for t in inputs]
    results = add_rms_norm(*leaves, EPS, keep_sum=False, backend="triton")
    dx, d_delta, d_weight = torch.autograd.grad(results, leaves, gradients)
    assert (dx.shape, d_delta.shape) == (shape, shape)
    assert torch.equal(d_weight, torch.zeros_like(d_weight))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="PyTorch's own kernels, on a GPU")
def test_kernels_agree_with_pytorchs_own() -> None:
    """Sum, norm and every gradient in the types of training, at the default width."""
    inputs, gradients = cases((2, 1000, 768), torch.float32, torch.bfloat16, "cuda")
    leaves = [t.requires_grad_() for t in inputs]
    with torch.autocast("cuda", torch.bfloat16):
        ours = add_rms_norm(*leaves, EPS, keep_sum=True, backend="triton")
    total = leaves[0] + leaves[1]
    theirs = (total, F.rms_norm(total, (768,), leaves[2], EPS).bfloat16())
    assert torch.equal(ours[0], theirs[0])
    got, wanted = (torch.autograd.grad(r, leaves, gradients) for r in (ours, theirs))
    for actual, expected in zip((ours[1], *got), (theirs[1], *wanted), strict=True):
        assert actual.dtype == expected.dtype
        assert_close(actual, expected, TOLERANCE[actual.dtype] if actual.shape == total.shape else SUM_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("channels", [768, 2560, 8192])
def test_no_program_waits_or_changes_threads_but_where_it_must(
    channels: int, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for each card, not run: wide accesses only, and in rows of one warp no barrier in forward."""
    from eco_llm.ops.add_norm import triton as launchers

    kernels = ("add_norm_forward_kernel", "add_norm_backward_kernel")
    compiled = compile_instead_of_running(monkeypatch, launchers, *kernels, capability=capability)
    monkeypatch.setattr(launchers, "sum_partials", lambda partials: [partials[0]])
    x, delta, weight = torch.empty(1, 64, channels), torch.empty(1, 64, channels).bfloat16(), torch.empty(channels)
    for stream in (x, delta):
        launchers.norm_forward(stream, delta, weight, EPS, torch.bfloat16)
        launchers.norm_forward(stream, None, weight, EPS, torch.bfloat16)
        launchers.add_norm_backward(None, delta, stream, delta, weight, EPS, torch.bfloat16)
        launchers.add_norm_backward(None, delta, stream, None, weight, EPS, torch.bfloat16)
        launchers.norm_backward_beside(delta, stream, delta, weight, EPS, delta)
        launchers.norm_backward_added(delta, stream, weight, EPS, x, delta, torch.bfloat16)
    launchers.add_norm_forward(x, delta, weight, EPS, torch.bfloat16)
    launchers.add_norm_backward(x, delta, x, delta, weight, EPS, torch.bfloat16)
    assert len(compiled) == 14
    for _, one in compiled:
        assert one.metadata.shared <= 8192
        loads = re.findall(r"ld\.global\S*", one.asm["ptx"])
        assert loads
        assert all(".v2.b32" in load or ".v4.b32" in load for load in loads)  # four channels of a thread
    forward = [one.asm["ptx"] for name, one in compiled if name == "add_norm_forward_kernel"]
    assert [("bar.sync" in ptx) == (channels > 768) for ptx in forward] == [True] * 5
