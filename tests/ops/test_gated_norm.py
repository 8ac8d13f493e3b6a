"""The gated norm against its definition, and the Triton kernels against it; values and gradients.

Tests of the kernels need a GPU (`-m gpu`), or Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import INTERPRETED, KERNEL_DEVICE, assert_close, normal
from torch import Tensor

from eco_llm.ops.gated_norm import gated_rms_norm
from eco_llm.ops.gated_norm.reference import gated_rms_norm_reference

EPS = 1e-5
# Largest error of a result as a share of its largest element, for results in the type of y.
# The interpreter cuts numbers off to bf16 where a GPU rounds them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}
SUM_TOLERANCE = 1e-5  # float32 sums over all tokens


def nan_slice(shape: tuple[int, ...], offset: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A NaN tensor of `width` columns, and its columns `offset` … of the shape asked for."""
    wide = torch.full((*shape[:-1], width), float("nan"), dtype=dtype, device=KERNEL_DEVICE)
    return wide, wide[..., offset : offset + shape[-1]]


def by_definition(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    h = y * z * torch.sigmoid(z)
    return weight * h / torch.sqrt(h.square().mean(-1, keepdim=True) + EPS)


def exact(y: Tensor, z: Tensor, weight: Tensor, dg: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g, dy, dz, dweight in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (y, z, weight)]
    g = by_definition(*leaves)
    return g, *torch.autograd.grad(g, leaves, dg.double())


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 3, 40), (2, 63, 24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_reference_is_the_definition(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    y, z, dg = (normal(*shape, seed=seed, dtype=dtype, device="cpu") for seed in range(3))
    weight = normal(shape[2], seed=3, dtype=torch.promote_types(dtype, torch.float32), device="cpu")
    leaves = [t.requires_grad_() for t in (y, z, weight)]
    g = gated_rms_norm(*leaves, EPS)
    assert g.dtype == dtype
    got = (g, *torch.autograd.grad(g, leaves, dg))
    for actual, expected in zip(got, exact(y, z, weight, dg), strict=True):
        # One channel alone is normalised to ±1 and has next to no gradient: errors stand against nothing.
        if shape[2] > 1 or actual is g:
            assert_close(actual, expected, TOLERANCE[dtype] if actual.dtype == dtype else SUM_TOLERANCE)


def test_autocast_changes_nothing() -> None:
    y, z, weight = (normal(*s, seed=5, device="cpu") for s in ((2, 12, 6), (2, 12, 6), (6,)))
    with torch.autocast("cpu", torch.bfloat16):
        g = gated_rms_norm(y, z, weight, EPS)
    assert torch.equal(g, gated_rms_norm(y, z, weight, EPS))


def test_compiled_reference() -> None:
    y, z, weight = (normal(*s, seed=5, device="cpu") for s in ((2, 12, 6), (2, 12, 6), (6,)))
    compiled = torch.compile(gated_rms_norm, backend="aot_eager", fullgraph=True)
    assert_close(compiled(y, z, weight, EPS), gated_rms_norm(y, z, weight, EPS), 1e-6)


def test_mistakes_are_refused() -> None:
    y, z, weight = (normal(*s, seed=5, device="cpu") for s in ((2, 12, 6), (2, 12, 6), (6,)))
    with pytest.raises(ValueError, match="need y and z"):
        gated_rms_norm(y, z[:1], weight, EPS)
    with pytest.raises(ValueError, match="need y and z"):
        gated_rms_norm(y, z, weight[:1], EPS)
    with pytest.raises(ValueError, match="unknown gated norm backend"):
        gated_rms_norm(y, z, weight, EPS, backend="apex")
    with pytest.raises(ValueError, match="float64"):
        gated_rms_norm(y.double(), z, weight, EPS, backend="triton")


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
# Rows of less than a chunk, of a power of two, of three chunks with nothing idle, of chunks with idle ends.
@pytest.mark.parametrize(
    "shape", [(2, 1, 40), (2, 63, 200), (1, 100, 128), (2, 3, 1536), (1, 2, 2048), (1, 2, 5001), (1, 2, 8192)], ids=str
)
@pytest.mark.parametrize("with_g", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels(dtype: torch.dtype, in_place: bool, with_g: bool, shape: tuple[int, int, int]) -> None:
    from eco_llm.ops.gated_norm.triton import gated_norm_backward, gated_norm_forward

    channels = shape[2]
    offset, width = (8, channels + 24) if channels % 8 == 0 else (3, channels + 10)
    y, dg = (normal(*shape, seed=seed, dtype=dtype) for seed in (0, 1))
    _, z = nan_slice(shape, offset, width, dtype)
    z.copy_(normal(*shape, seed=2))
    weight = normal(channels, seed=3)
    g_exact, dy_exact, dz_exact, dweight_exact = exact(y, z, weight, dg)

    g = gated_norm_forward(y, z, weight, EPS)
    assert (g.dtype, g.is_contiguous()) == (dtype, True)
    assert_close(g, g_exact, TOLERANCE[dtype])

    def backward(dg: Tensor) -> tuple[Tensor, ...]:
        wide, dz = nan_slice(shape, offset, width, dtype)
        dy = dg if in_place else torch.empty_like(dg)
        again = torch.empty_like(g) if with_g else None
        dweight = gated_norm_backward(dg, y, z, weight, EPS, dz, dy, again)
        assert wide[..., :offset].isnan().all()
        assert wide[..., offset + channels :].isnan().all()
        return (dy, dz, dweight) if again is None else (dy, dz, dweight, again)

    dy, dz, dweight, *rest = first = backward(dg.clone())
    assert_close(dy, dy_exact, TOLERANCE[dtype])
    assert_close(dz, dz_exact, TOLERANCE[dtype])
    assert dweight.dtype == torch.float32
    assert_close(dweight, dweight_exact, SUM_TOLERANCE)
    for again in rest:
        assert_close(again, g_exact, TOLERANCE[dtype])
    for one, two in zip(first, backward(dg.clone()), strict=True):
        assert torch.equal(one, two)


@pytest.mark.gpu
def test_strides_that_allow_no_vectors() -> None:
    from eco_llm.ops.gated_norm.triton import gated_norm_backward

    y = normal(9, 3, 41, seed=0).transpose(0, 1)[..., 1:]  # rows farther apart than batches
    z, dg, weight = normal(3, 18, 40, seed=1)[:, ::2], normal(3, 9, 40, seed=2), normal(40, seed=3)
    dy, dz = torch.empty_like(dg), torch.full((3, 9, 43), float("nan"), device=dg.device)[..., 2:42]
    dweight = gated_norm_backward(dg, y, z, weight, EPS, dz, dy)
    for actual, expected in zip((dy, dz, dweight), exact(y, z, weight, dg)[1:], strict=True):
        assert_close(actual, expected, SUM_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_public_function_through_triton(dtype: torch.dtype, compiled: bool) -> None:
    y, z, dg = (normal(2, 17, 40, seed=seed, dtype=dtype) for seed in range(3))
    weight = normal(40, seed=3)
    leaves = [t.requires_grad_() for t in (y, z, weight)]

    def caller(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm(y * 1, z, weight, EPS, backend="triton")

    run = torch.compile(caller, backend="aot_eager", fullgraph=True) if compiled else caller
    g = run(*leaves)
    got = (g, *torch.autograd.grad(g, leaves, dg, retain_graph=True))
    for actual, expected in zip(got, exact(y, z, weight, dg), strict=True):
        assert_close(actual, expected, TOLERANCE[dtype] if actual.dtype == dtype else SUM_TOLERANCE)
    # A gradient without memory of its own, as sum() makes it.
    (dz,) = torch.autograd.grad(g.sum(), z)
    assert_close(dz, exact(y, z, weight, torch.ones_like(dg))[2], TOLERANCE[dtype])


@pytest.mark.gpu
def test_auto_takes_triton_on_cuda_and_second_derivatives_are_refused() -> None:
    if INTERPRETED:
        pytest.skip("the interpreter has no device that auto would serve with Triton")
    y, z, weight = (normal(*s, seed=5).requires_grad_() for s in ((2, 12, 6), (2, 12, 6), (6,)))
    g = gated_rms_norm(y, z, weight, EPS)
    assert torch.equal(g, gated_rms_norm(y, z, weight, EPS, backend="triton"))
    assert_close(g, gated_rms_norm_reference(y, z, weight, EPS), 3e-6)
    (dy,) = torch.autograd.grad(g.square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        dy.sum().backward()


@pytest.mark.gpu
def test_launchers_refuse_what_does_not_fit() -> None:
    from eco_llm.ops.gated_norm.triton import gated_norm_backward, gated_norm_forward

    y, z, weight = (normal(*s, seed=5) for s in ((2, 12, 6), (2, 12, 6), (6,)))
    with pytest.raises(ValueError, match="last stride"):
        gated_norm_forward(y, normal(2, 6, 12, seed=0).transpose(1, 2), weight, EPS)
    with pytest.raises(ValueError, match="float32"):
        gated_norm_forward(y, z, weight.double(), EPS)
    with pytest.raises(ValueError, match="dz_out"):
        gated_norm_backward(y, y, z, weight, EPS, z[:1], torch.empty_like(y))


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("channels", [64, 192, 832] if INTERPRETED else [64, 192, 832, 1536, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_the_unfused_ones(dtype: torch.dtype, channels: int, bits: int) -> None:
    """Forward writes what `quantize` makes of y and z; backward reads what `dequantize` would give; bit for bit.

    In rows of 32 KiB the compiler spreads the two kernels over threads in two ways, and their sums differ in the last
    bits (seen on an H200): close is enough there.
    """
    bits_alike = channels * dtype.itemsize < 32_768
    from eco_llm.ops.gated_norm import triton as norm
    from eco_llm.ops.quantize import dequantize, quantize

    wide = normal(2, 7, 2 * channels + 8, seed=1, dtype=dtype)
    y, z = normal(2, 7, channels, seed=0, dtype=dtype), wide[..., :channels]
    weight, dg = 1 + 0.3 * normal(channels, seed=2), normal(2, 7, channels, seed=3, dtype=dtype)
    step = torch.tensor((3 << 32) + 5, device=y.device)
    g, codes = norm.gated_norm_forward_to_codes(y, z, weight, 1e-5, bits, step, 70, 71)
    alike(g, norm.gated_norm_forward(y, z, weight, 1e-5), bits_alike)
    expected = [quantize(x, bits, step=step, stream=s, backend="reference") for x, s in ((y, 70), (z, 71))]
    for got, want in zip(codes[:4], (t for q in expected for t in q[:2]), strict=True):
        assert torch.equal(got, want)
    y, z = (dequantize(q, backend="reference") for q in expected)
    found = []
    for extra, inputs in (({}, (y, z)), ({"codes": codes}, (dg, dg))):
        dy, dz, again = torch.empty_like(dg), torch.empty_like(wide)[..., :channels], torch.empty_like(dg)
        partials = norm.gated_norm_backward_partials(dg, *inputs, weight, 1e-5, dz, dy, again, **extra)
        found.append((dy, dz, again, partials))
    for actual, want in zip(*found, strict=True):
        alike(actual, want, bits_alike)


def alike(actual: Tensor, expected: Tensor, bits: bool) -> None:
    """Equal, or without `bits` close."""
    if bits:
        assert torch.equal(actual, expected)
    else:
        assert_close(actual, expected, 2e-6)
