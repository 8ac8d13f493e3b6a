"""The SwiGLU MLP against its definition, and the Triton path against it; values and gradients.

Tests of the kernels need a GPU (`-m gpu`), or Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import INTERPRETED, KERNEL_DEVICE, normal
from torch import Tensor

from eco_llm.ops import swiglu
from eco_llm.ops.quantize import Keep, dequantize, quantize
from eco_llm.ops.residual_norm.reference import residual_norm_backward_reference, residual_norm_reference
from eco_llm.ops.swiglu import swiglu_mlp, swiglu_mlp_foreseen, swiglu_mlp_unread, writes_codes

# Largest error as a share of the largest element. The interpreter cuts numbers off to bf16 where a GPU rounds them.
ELEMENTWISE = {torch.float32: 2e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}
THROUGH_PRODUCTS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.5e-2}
KERNEL_WIDTHS = [1, 4, 40, 41, 100] if INTERPRETED else [1, 4, 40, 41, 1664, 2048]
KERNEL_TYPES = pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2],
    ids=str,
)
SHAPES = (  # B, T, D, F
    [(2, 1, 8, 40), (1, 63, 12, 6), (1, 100, 5, 7)]
    if INTERPRETED
    else [(2, 1, 64, 40), (3, 63, 640, 1664), (1, 100, 768, 2048), (2, 63, 41, 7)]
)


def make(
    shape: tuple[int, int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype, device: str = KERNEL_DEVICE
) -> tuple[list[Tensor], Tensor]:
    """x, gate_up, down as leaves, and a gradient of the result."""
    batch, time, dim, width = shape
    x, dy = (normal(batch, time, dim, seed=seed, dtype=dtype, device=device) for seed in (0, 3))
    gate_up = normal(2 * width, dim, seed=1, device=device) * dim**-0.5
    down = normal(dim, width, seed=2, device=device) * width**-0.5
    return [t.requires_grad_() for t in (x, gate_up.to(weight_dtype), down.to(weight_dtype))], dy


def by_definition(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    width = down.shape[1]
    gate, up = x @ gate_up[:width].t(), x @ gate_up[width:].t()
    return (gate * torch.sigmoid(gate) * up) @ down.t()


def exact(leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x, gate_up, down in float64, from the weights as the products see them."""
    wide = [t.detach().to(dy.dtype).double().requires_grad_() for t in leaves]
    y = by_definition(*wide)
    return y, *torch.autograd.grad(y, wide, dy.double())


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.isfinite().all()
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def run(function: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, dy)


def triton_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return swiglu_mlp(x, gate_up, down, backend="triton")


@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (1, 63, 8, 40)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2],
    ids=str,
)
def test_reference_is_the_definition(
    dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    leaves, dy = make(shape, dtype, weight_dtype, "cpu")
    got = run(swiglu_mlp, leaves, dy)
    assert [t.dtype for t in got] == [dtype, dtype, weight_dtype, weight_dtype]
    for actual, expected in zip(got, exact(leaves, dy), strict=True):
        assert error(actual, expected) < THROUGH_PRODUCTS[dtype]


def test_autocast_sets_the_type_of_the_products() -> None:
    leaves, _ = make((2, 3, 8, 6), torch.float32, torch.float32, "cpu")
    half = swiglu_mlp(leaves[0].bfloat16(), *leaves[1:])
    with torch.autocast("cpu", torch.bfloat16):
        y = swiglu_mlp(*leaves)
        assert swiglu_mlp(*(t.double() for t in leaves)).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, half)
    assert [g.dtype for g in torch.autograd.grad(y.float().sum(), leaves)] == [torch.float32] * 3


@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (1, 63, 8, 40)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_unread_reference_has_the_gradients(
    dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool, shape: tuple[int, int, int, int]
) -> None:
    leaves, dy = make(shape, dtype, weight_dtype, "cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = swiglu_mlp(*leaves), swiglu_mlp_unread(*leaves)
    check_unread(*values, leaves, dy)


def check_unread(y: Tensor, unread: Tensor, leaves: list[Tensor], dy: Tensor) -> None:
    """NaN of the shape and type of y, with the bits of its gradients."""
    assert (unread.shape, unread.dtype) == (y.shape, y.dtype)
    assert unread.isnan().all()
    expected, ours = (torch.autograd.grad(value, leaves, dy.to(y.dtype)) for value in (y, unread))
    for actual, want in zip(ours, expected, strict=True):
        assert actual.dtype == want.dtype
        assert torch.equal(actual, want)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@KERNEL_TYPES
def test_unread_has_the_gradients_of_the_kernels(
    dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiglu, "uses_triton", lambda x: True)
    monkeypatch.setattr(swiglu, "swiglu_mlp_unread_reference", None)
    leaves, dy = make(shape, dtype, weight_dtype)
    check_unread(triton_mlp(*leaves), swiglu_mlp_unread(*leaves), leaves, dy)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@KERNEL_TYPES
def test_foreseen_has_the_bits_of_the_kernels(
    dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiglu, "uses_triton", lambda x: True)
    leaves, dy = make(shape, dtype, weight_dtype)
    y, ours = triton_mlp(*leaves), swiglu_mlp_foreseen(*leaves, dy)
    assert torch.equal(ours, y)
    expected = torch.autograd.grad(y, leaves, dy)
    # What is sent back is not looked at: it was known.
    for actual, want in zip(torch.autograd.grad(ours, leaves, torch.zeros_like(dy)), expected, strict=True):
        assert actual.dtype == want.dtype
        assert torch.equal(actual, want)
    with pytest.raises(ValueError, match="need dy"):
        swiglu_mlp_foreseen(*leaves, dy[:, :0])


@pytest.mark.parametrize("autocast", [False, True])
def test_foreseen_reference_is_the_reference(autocast: bool) -> None:
    leaves, dy = make((2, 7, 12, 6), torch.float32, torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = swiglu_mlp(*leaves), swiglu_mlp_foreseen(*leaves, dy)
    assert torch.equal(*values)
    expected, ours = (torch.autograd.grad(value, leaves, dy.to(value.dtype)) for value in values)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_reference(backend: str) -> None:
    leaves, dy = make((2, 12, 6, 10), torch.float32, torch.float32, "cpu")
    compiled = torch.compile(swiglu_mlp, backend=backend, fullgraph=True)
    for actual, expected in zip(run(compiled, leaves, dy), exact(leaves, dy), strict=True):
        assert error(actual, expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert error(compiled(*leaves), swiglu_mlp(*leaves)) < 2e-2


def test_mistakes_are_refused() -> None:
    (x, gate_up, down), _ = make((2, 3, 8, 6), torch.float32, torch.float32, "cpu")
    with pytest.raises(ValueError, match="need x"):
        swiglu_mlp(x[0], gate_up, down)
    with pytest.raises(ValueError, match="gate_up"):
        swiglu_mlp(x, gate_up[:-1], down)
    with pytest.raises(ValueError, match="down"):
        swiglu_mlp(x, gate_up, down[:-1])
    with pytest.raises(ValueError, match="unknown SwiGLU backend"):
        swiglu_mlp(x, gate_up, down, backend="apex")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float64"):
        swiglu_mlp(x.double(), gate_up, down, backend="triton")


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("width", KERNEL_WIDTHS)
@pytest.mark.parametrize("rows", [1, 63, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels(dtype: torch.dtype, rows: int, width: int) -> None:
    from eco_llm.ops.swiglu.triton import silu_mul_backward, silu_mul_forward

    a, dh = 3 * normal(rows, 2 * width, seed=0, dtype=dtype), normal(rows, width, seed=1, dtype=dtype)
    a.view(-1)[0] = -300.0  # e^300 is no float32
    wide = a.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    h_exact = gate * torch.sigmoid(gate) * up
    (da_exact,) = torch.autograd.grad(h_exact, wide, dh.double())

    h = silu_mul_forward(a)
    assert (h.shape, h.dtype) == (dh.shape, dtype)
    again, buffer = dh.clone(), dh.clone()
    da = silu_mul_backward(a, buffer)
    # One row of one channel may be all but nothing: errors stand against at least 1 then.
    for actual, expected in ((h, h_exact), (buffer, h_exact), (da, da_exact)):
        assert actual.isfinite().all()
        assert (actual - expected).abs().max() <= ELEMENTWISE[dtype] * expected.abs().max().clamp_min(1.0)
    assert torch.equal(h, buffer)
    assert torch.equal(da, silu_mul_backward(a, again))
    # From an address that allows no wide loads.
    shifted = torch.cat((dh.new_zeros(1), dh.view(-1)))[1:].view(rows, width)
    assert torch.equal(da, silu_mul_backward(a, shifted))
    assert torch.equal(h, shifted)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_triton(dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    leaves, dy = make(shape, dtype, weight_dtype)
    got = run(triton_mlp, leaves, dy)
    assert [t.dtype for t in got] == [dtype, dtype, weight_dtype, weight_dtype]
    plain = run(lambda *leaves: swiglu_mlp(*leaves, backend="reference"), leaves, dy)
    for actual, other, expected in zip(got, plain, exact(leaves, dy), strict=True):
        tolerance = THROUGH_PRODUCTS[torch.bfloat16 if torch.bfloat16 in (dtype, actual.dtype) else dtype]
        assert error(actual, expected) < tolerance
        # No worse than plain ops, but for one rounding's luck; the interpreter's cut-off numbers are.
        luck = 4e-3 if tolerance > 1e-3 else 1e-6
        assert INTERPRETED or error(actual, expected) < 1.5 * error(other, expected) + luck
    for one, two in zip(got, run(triton_mlp, leaves, dy), strict=True):
        assert torch.equal(one, two)
    with torch.no_grad():
        assert torch.equal(triton_mlp(*leaves), got[0])


@pytest.mark.gpu
def test_backward_inside_autocast() -> None:
    leaves, dy = make(SHAPES[0], torch.float32, torch.float32)
    plain = run(triton_mlp, leaves, dy)[1:]
    y = triton_mlp(*leaves)
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        got = torch.autograd.grad(y, leaves, dy)
    for actual, expected in zip(got, plain, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("strides", ["slice", "transposed", "channels first"])
def test_strided_x_and_gradient(strides: str) -> None:
    leaves, dy = make((3, 9, 16, 8), torch.float32, torch.float32)
    values = leaves[0].detach()
    if strides == "slice":
        leaves[0] = torch.full((3, 9, 40), float("nan"), device=values.device)[..., 3:19].copy_(values)
    elif strides == "transposed":
        leaves[0] = values.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        leaves[0] = values.transpose(1, 2).contiguous().transpose(1, 2)
    leaves[0].requires_grad_()
    for actual, expected in zip(run(triton_mlp, leaves, dy), exact(leaves, dy), strict=True):
        assert error(actual, expected) < 1e-5
    # A gradient without memory of its own, as sum() makes it.
    got = torch.autograd.grad(triton_mlp(*leaves).sum(), leaves)
    for actual, expected in zip(got, exact(leaves, torch.ones_like(dy))[1:], strict=True):
        assert error(actual, expected) < 1e-5


@pytest.mark.gpu
def test_nothing_is_kept_without_gradients_and_weights_are_cast_once_with() -> None:
    leaves, _ = make((1, 3, 8, 40), torch.bfloat16, torch.float32)
    y, a, gate_up, down = swiglu._mlp(*leaves)
    assert (a.dtype, gate_up.dtype, down.dtype) == (torch.bfloat16,) * 3
    saved = {t.data_ptr() for t in y.grad_fn.saved_tensors}
    assert saved == {t.data_ptr() for t in (leaves[0], a, gate_up, down)}
    leaves, _ = make((1, 3, 8, 40), torch.bfloat16, torch.bfloat16)
    y, a, gate_up, down = swiglu._mlp(*leaves)
    assert gate_up.numel() + down.numel() == 0
    assert {t.data_ptr() for t in y.grad_fn.saved_tensors} == {t.data_ptr() for t in (*leaves, a)}
    with torch.no_grad():
        assert triton_mlp(*leaves).grad_fn is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager"] if INTERPRETED else ["aot_eager", "inductor"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_under_autocast(weight_dtype: torch.dtype, backend: str) -> None:
    leaves, dy = make((2, 17, 16, 40), torch.float32, weight_dtype)
    dy = dy.bfloat16()

    def function(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
            return triton_mlp(x * 1, gate_up, down)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    got = run(compiled, leaves, dy)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, weight_dtype, weight_dtype]
    for actual, expected in zip(got, run(function, leaves, dy), strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(got, exact(leaves, dy), strict=True):
        assert error(actual, expected) < THROUGH_PRODUCTS[torch.bfloat16]
    with torch.no_grad():
        assert torch.equal(compiled(*leaves), got[0])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs CUDA graphs")
def test_cuda_graph() -> None:
    leaves, dy = make((2, 63, 64, 40), torch.bfloat16, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd remembers the stream on which it first met a leaf
        expected = run(swiglu_mlp, leaves, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = run(swiglu_mlp, leaves, dy)
    graph.replay()
    for actual, other in zip(got, expected, strict=True):
        assert torch.equal(actual, other)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs 20 GB")
def test_offsets_beyond_32_bits() -> None:
    from eco_llm.ops.swiglu.triton import silu_mul_backward, silu_mul_forward

    width, last = 1664, 8
    rows = 2**31 // (2 * width) + 1000
    a = torch.zeros(rows, 2 * width, dtype=torch.bfloat16, device="cuda")
    dh = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    a[-last:], dh[-last:] = normal(last, 2 * width, seed=0), normal(last, width, seed=1)
    few = dh[-last:].clone()
    da = silu_mul_backward(a[-last:].clone(), few)
    assert torch.equal(silu_mul_forward(a)[-last:], few)
    assert torch.equal(silu_mul_backward(a, dh)[-last:], da)
    assert torch.equal(dh[-last:], few)
    assert not dh[:-last].any()


@pytest.mark.gpu
def test_launcher_refuses_what_does_not_fit() -> None:
    from eco_llm.ops.swiglu.triton import silu_mul_backward, silu_mul_to_codes

    with pytest.raises(ValueError, match="contiguous"):
        silu_mul_backward(normal(4, 12, seed=0), normal(4, 12, seed=0)[:, ::2])
    with pytest.raises(ValueError, match="2F"):
        silu_mul_backward(normal(4, 12, seed=0), normal(4, 5, seed=0))
    with pytest.raises(ValueError, match="8 or 4 bits, not 5"):
        silu_mul_to_codes(normal(4, 128, seed=0), 5, torch.tensor(0, device=KERNEL_DEVICE), 0)


# ---- u and a kept as codes: bit for bit what quantizing and dequantizing them does ----------------------------------

STREAM = 1 << 16
CODED_SHAPES = [(2, 1, 64, 64), (1, 63, 128, 192), (3, 5, 192, 128)] + ([] if INTERPRETED else [(3, 63, 768, 2048)])


def keep_of(bits: int, step: int = (5 << 32) + 7) -> Keep:
    return Keep(bits, torch.tensor(step, device=KERNEL_DEVICE))


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [64, 192, 320] if INTERPRETED else [64, 192, 1664, 2048])
@pytest.mark.parametrize("rows", [1, 63, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_codes_are_the_unfused_ones(dtype: torch.dtype, rows: int, width: int, bits: int) -> None:
    from eco_llm.ops.swiglu.triton import (
        silu_mul_backward,
        silu_mul_forward,
        silu_mul_from_codes,
        silu_mul_to_codes,
    )

    a, dh = 3 * normal(rows, 2 * width, seed=0, dtype=dtype), normal(rows, width, seed=1, dtype=dtype)
    a[0, 0], a[-1, -64:] = -300.0, 0.0
    keep = keep_of(bits)
    h, coded = silu_mul_to_codes(a, bits, keep.step, STREAM)
    expected = quantize(a, bits, step=keep.step, stream=STREAM, backend="reference")
    assert torch.equal(h, silu_mul_forward(a))
    assert torch.equal(coded.codes, expected.codes)
    assert torch.equal(coded.scales, expected.scales)
    mine, theirs = dh.clone(), dh.clone()
    da = silu_mul_from_codes(coded, mine)
    assert torch.equal(da, silu_mul_backward(dequantize(expected, backend="reference"), theirs))
    assert torch.equal(mine, theirs)
    # From an address that allows no wide loads.
    shifted = torch.cat((dh.new_zeros(1), dh.view(-1)))[1:].view(rows, width)
    assert torch.equal(da, silu_mul_from_codes(coded, shifted))
    assert torch.equal(mine, shifted)


def coded_case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Stream, what is added to it, the norm's weight, gate_up and down as leaves; gradients of stream and result."""
    (x, *weights), dy = make(shape, torch.float32, weight_dtype)
    stream, added = 3 * x.detach(), x.detach().flip(1).to(dtype)
    pre_weight = 1 + 0.1 * x.detach()[0, 0]
    leaves = [*(t.requires_grad_() for t in (stream, added, pre_weight)), *weights]
    return leaves, (normal(*shape[:3], seed=7), dy.to(dtype))


def run_coded(leaves: list[Tensor], gradients: tuple[Tensor, Tensor], keep: Keep) -> tuple[Tensor, ...]:
    from eco_llm.ops.swiglu.coded import coded_mlp

    x, added, pre_weight, *weights = leaves
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16, enabled=gradients[1].dtype == torch.bfloat16):
        results = coded_mlp(x, added, pre_weight, 1e-5, *weights, keep=keep)
    return *results, *torch.autograd.grad(results, leaves, gradients)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", CODED_SHAPES, ids=str)
@KERNEL_TYPES
def test_codes_are_their_slow_twin(
    dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, int, int, int], bits: int
) -> None:
    """The unfused operators, between which u and a go through `quantize` and `dequantize`: the same bits, but for what
    goes through sums of the norm's gradient, which the reference adds up otherwise.
    """
    from eco_llm.ops.residual_norm.triton import residual_norm_to_codes
    from eco_llm.ops.swiglu.coded import A_STREAM, U_STREAM
    from eco_llm.ops.swiglu.triton import mlp_backward, mlp_forward

    leaves, (d_total, dy) = coded_case(shape, dtype, weight_dtype)
    keep = keep_of(bits)
    got = run_coded(leaves, (d_total, dy), keep)

    def through_codes(t: Tensor, stream: int) -> Tensor:
        q = quantize(t, bits, step=keep.step, stream=stream, backend="reference")
        return dequantize(q, backend="reference")

    x, added, pre_weight, *weights = (t.detach() for t in leaves)
    exact_u = residual_norm_to_codes(x, added, pre_weight, 1e-5, dtype, bits, keep.step, 0).u  # for its bits alone
    total, _, inverse = residual_norm_reference(x, added, pre_weight, 1e-5, dtype)
    y, a, *_ = mlp_forward(exact_u, *weights)
    u = through_codes(exact_u, U_STREAM)
    narrow = [w.to(dtype) for w in weights]
    d_u, *d_weights = mlp_backward(dy, u, through_codes(a, A_STREAM), *narrow, *(w.dtype for w in weights))
    d_x, d_pre = residual_norm_backward_reference(d_u, u, inverse, pre_weight, d_total)
    for actual, expected in zip((*got[:2], *got[5:]), (total, y, *d_weights), strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(got[2:5], (d_x, d_x.to(dtype), d_pre), strict=True):
        assert actual.dtype == expected.dtype
        assert error(actual, expected) < (1e-5 if actual.dtype == torch.float32 else 8e-3)
    others = run_coded(leaves, (d_total, dy), keep_of(bits, step=8))
    assert torch.equal(got[1], others[1])
    assert not torch.equal(got[5], others[5])


@pytest.mark.gpu
def test_a_number_that_is_not_finite_shows_in_the_gradient() -> None:
    leaves, gradients = coded_case((1, 63, 64, 192), torch.float32, torch.float32)
    with torch.no_grad():
        leaves[0][0, 5, 3] = float("nan")
    got = run_coded(leaves, gradients, keep_of(8))
    assert all(t.isnan().any() for t in got)
    assert got[2][0, 6:].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_all_that_is_kept(bits: int) -> None:
    from eco_llm.ops.swiglu.coded import coded_mlp

    (x, added, pre_weight, *weights), _ = coded_case((1, 63, 64, 192), torch.bfloat16, torch.float32)
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        _, y = coded_mlp(x, added, pre_weight, 1e-5, *weights, keep=keep_of(bits))
    sizes = [(t.dtype, t.numel()) for t in y.grad_fn.saved_tensors]
    codes = torch.int8 if bits == 8 else torch.uint8
    assert sizes == [
        (codes, 63 * 64 * bits // 8), (torch.bfloat16, 63), (torch.float32, 63), (torch.float32, 64),
        (codes, 63 * 384 * bits // 8), (torch.bfloat16, 63 * 6), (torch.bfloat16, 384 * 64), (torch.bfloat16, 64 * 192),
    ]  # fmt: skip


@pytest.mark.gpu
def test_which_shapes_are_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swiglu, "uses_triton", lambda x: True)
    (x, gate_up, down), _ = make((1, 3, 64, 128), torch.float32, torch.float32)
    assert writes_codes(x, gate_up, down, keep_of(8))
    assert not writes_codes(x.double(), gate_up, down, keep_of(8))
    assert not writes_codes(x, gate_up, down.half(), keep_of(8))
    for dim, width in ((40, 128), (64, 40)):
        assert not writes_codes(*make((1, 3, dim, width), torch.float32, torch.float32)[0], keep_of(8))
    with pytest.raises(ValueError, match="8 or 4 bits, not 5"):
        writes_codes(x, gate_up, down, keep_of(5))
    with pytest.raises(ValueError, match="0-dim"):
        writes_codes(x, gate_up, down, Keep(8, torch.zeros(2, dtype=torch.int64, device=KERNEL_DEVICE)))
    monkeypatch.setattr(swiglu, "uses_triton", lambda x: False)
    assert not writes_codes(x, gate_up, down, keep_of(8))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs CUDA graphs")
def test_replayed_graphs_draw_anew() -> None:
    leaves, gradients = coded_case((2, 63, 64, 128), torch.bfloat16, torch.float32)
    keep = keep_of(8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = run_coded(leaves, gradients, keep)
        keep.step.add_(1)
        second = run_coded(leaves, gradients, keep)
        keep.step.sub_(2)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        keep.step.add_(1)
        got = run_coded(leaves, gradients, keep)
    for expected in (first, second):
        graph.replay()
        for actual, other in zip(got, expected, strict=True):
            assert torch.equal(actual, other)
    assert not torch.equal(first[2], second[2])
