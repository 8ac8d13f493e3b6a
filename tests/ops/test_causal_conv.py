"""The causal convolution against its definition, and the Triton kernels against the reference; values and gradients.

Tests of the kernels need a GPU (`-m gpu`), or Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import INTERPRETED, assert_close, compile_instead_of_running, normal
from torch import Tensor

from eco_llm.ops.causal_conv import causal_conv_silu
from eco_llm.ops.causal_conv.reference import _taps_first, causal_conv_silu_reference

# Largest error of a result as a share of its largest element, for results in the type of x.
# The interpreter cuts numbers off to bf16 where a GPU rounds them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}
SUM_TOLERANCE = 1e-5  # float32 sums over all tokens


def slice_of_wider(x: Tensor, offset: int, width: int) -> Tensor:
    """x as columns `offset` … of a tensor of `width` columns whose other columns are NaN."""
    wide = x.new_full((*x.shape[:-1], width), float("nan"))
    part = wide[..., offset : offset + x.shape[-1]]
    part.copy_(x)
    return part


def by_definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The sum of the README, tap by tap, in the type of x."""
    pre = bias.expand_as(x).clone()
    taps = weight.shape[1]
    for tap in range(taps):
        back = taps - 1 - tap
        if back < x.shape[1]:
            pre[:, back:] += weight[:, tap] * x[:, : x.shape[1] - back]
    return pre * torch.sigmoid(pre)


def exact(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dx, dweight, dbias in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = by_definition(*leaves)
    return y, *torch.autograd.grad(y, leaves, dy.double())


@pytest.mark.parametrize("taps", [1, 2, 4, 9])
@pytest.mark.parametrize("time", [1, 3, 48, 63])  # 48 is whole blocks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_reference_is_the_definition(dtype: torch.dtype, time: int, taps: int) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    x, dy = (normal(2, time, 10, seed=seed, dtype=dtype, device="cpu") for seed in (0, 1))
    weight, bias = normal(10, taps, seed=2, dtype=wide, device="cpu"), normal(10, seed=3, dtype=wide, device="cpu")
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = causal_conv_silu(*leaves)
    assert y.dtype == dtype
    got = (y, *torch.autograd.grad(y, leaves, dy))
    for actual, expected in zip(got, exact(x, weight, bias, dy), strict=True):
        assert_close(actual, expected, TOLERANCE[dtype] if actual.dtype == dtype else SUM_TOLERANCE)


@pytest.mark.parametrize("cut", [1, 2, 5, 11])
def test_past_continues_a_sequence(cut: int) -> None:
    x, weight, bias = (normal(*s, seed=4, dtype=torch.float64, device="cpu") for s in ((2, 12, 6), (6, 4), (6,)))
    past = torch.cat((x.new_zeros(2, 3, 6), x[:, :cut]), dim=1)[:, -3:]
    whole = causal_conv_silu(x, weight, bias)
    torch.testing.assert_close(causal_conv_silu(x[:, cut:], weight, bias, past), whole[:, cut:], rtol=0, atol=1e-14)


def test_autocast_changes_nothing() -> None:
    x, weight, bias = (normal(*s, seed=5, device="cpu") for s in ((2, 12, 6), (6, 4), (6,)))
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_conv_silu(x, weight, bias)
    assert torch.equal(y, causal_conv_silu(x, weight, bias))


def test_compiled_reference() -> None:
    x, weight, bias = (normal(*s, seed=5, device="cpu") for s in ((2, 12, 6), (6, 4), (6,)))
    compiled = torch.compile(causal_conv_silu, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, weight, bias), causal_conv_silu(x, weight, bias), 1e-6)


def test_mistakes_are_refused() -> None:
    x, weight, bias = (normal(*s, seed=5, device="cpu") for s in ((2, 12, 6), (6, 4), (6,)))
    with pytest.raises(ValueError, match="weight"):
        causal_conv_silu(x, weight.t(), bias)
    with pytest.raises(ValueError, match="past"):
        causal_conv_silu(x, weight, bias, x[:, :2])
    with pytest.raises(ValueError, match="unknown convolution backend"):
        causal_conv_silu(x, weight, bias, backend="cudnn")
    with pytest.raises(ValueError, match="no past"):
        causal_conv_silu(x, weight, bias, x[:, :3], backend="triton")
    with pytest.raises(ValueError, match="float64"):
        causal_conv_silu(x.double(), weight, bias, backend="triton")


# Time, taps, channels, channels of dy's head, summands of its tail. Blocks have 128 channels: more than one, less than
# one, heads that end with a block, inside one, and where no vector does.
CASES = [
    (1, 4, 200, 136, 2),
    (63, 4, 48, 48, 0),
    (63, 4, 160, 128, 1),
    (100, 4, 41, 25, 1),
    (100, 4, 200, 136, 2),
    (33, 2, 41, 25, 1),
    (33, 2, 150, 17, 5),
    (20, 7, 72, 64, 1),
    (20, 16, 41, 41, 0),
    (5, 16, 40, 24, 2),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize(("time", "taps", "channels", "head", "slices"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels(dtype: torch.dtype, time: int, taps: int, channels: int, head: int, slices: int) -> None:
    from eco_llm.ops.causal_conv.triton import conv_silu_backward, conv_silu_forward

    offset, width = (8, channels + 24) if channels % 8 == 0 else (3, channels + 10)
    x = slice_of_wider(normal(2, time, channels, seed=0, dtype=dtype), offset, width)
    weight, bias = normal(channels, taps, seed=1), normal(channels, seed=2)
    dy_head = normal(2, time, head, seed=3, dtype=dtype)
    dy_tail = normal(slices, 2, time, channels - head, seed=4) if slices else None
    dy = dy_head.double() if dy_tail is None else torch.cat((dy_head.double(), dy_tail.double().sum(0)), dim=-1)
    y_exact, dx_exact, dweight_exact, dbias_exact = exact(x, weight, bias, dy)

    y = conv_silu_forward(x, weight, bias)
    assert (y.dtype, y.is_contiguous()) == (dtype, True)
    assert_close(y, y_exact, TOLERANCE[dtype])

    wide = torch.full((2, time, width), float("nan"), dtype=dtype, device=x.device)
    dx = wide[..., offset : offset + channels]
    dweight, dbias = conv_silu_backward(x, weight, bias, dy_head, dy_tail, dx)
    assert_close(dx, dx_exact, TOLERANCE[dtype])
    assert wide[..., :offset].isnan().all()
    assert wide[..., offset + channels :].isnan().all()
    assert dweight.dtype == dbias.dtype == torch.float32
    assert_close(dweight, dweight_exact, SUM_TOLERANCE)
    assert_close(dbias, dbias_exact, SUM_TOLERANCE)

    again = torch.empty_like(dx)
    for first, second in zip(
        (dx, dweight, dbias), (again, *conv_silu_backward(x, weight, bias, dy_head, dy_tail, again)), strict=True
    ):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_strides_that_allow_no_vectors_and_a_gradient_in_float32() -> None:
    from eco_llm.ops.causal_conv.triton import conv_silu_backward

    x = normal(3, 7 * 40, 50, seed=0, dtype=torch.bfloat16)[:, ::7]  # every seventh row; batches farther apart
    weight, bias, dy = normal(50, 4, seed=1), normal(50, seed=2), normal(3, 40, 50, seed=3)
    out = torch.full((40, 3, 51), float("nan"), device=x.device).transpose(0, 1)[..., 1:]
    got = (out, *conv_silu_backward(x, weight, bias, dy, None, out))
    for actual, expected in zip(got, exact(x, weight, bias, dy)[1:], strict=True):
        assert_close(actual, expected, SUM_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_public_function_through_triton(dtype: torch.dtype, compiled: bool) -> None:
    x, dy = (normal(2, 37, 40, seed=seed, dtype=dtype) for seed in (0, 1))
    weight, bias = normal(40, 4, seed=2), normal(40, seed=3)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def caller(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv_silu(x * 1, weight, bias, backend="triton")

    run = torch.compile(caller, backend="aot_eager", fullgraph=True) if compiled else caller
    y = run(*leaves)
    got = (y, *torch.autograd.grad(y, leaves, dy, retain_graph=True))
    for actual, expected in zip(got, exact(x, weight, bias, dy), strict=True):
        assert_close(actual, expected, TOLERANCE[dtype] if actual.dtype == dtype else SUM_TOLERANCE)
    # A gradient without memory of its own, as sum() makes it.
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_close(dx, exact(x, weight, bias, torch.ones_like(dy))[1], 2 * TOLERANCE[dtype])


@pytest.mark.parametrize(("channels", "taps"), [(5, 4), (7, 1), (1, 3)])
def test_taps_first_is_a_transposed_copy_that_compilers_may_trace(channels: int, taps: int) -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(channels, taps, generator=generator).requires_grad_()
    by_tap = _taps_first(weight)
    assert by_tap.is_contiguous()
    assert by_tap.data_ptr() != weight.data_ptr()
    assert torch.equal(by_tap, weight.t())
    factor = torch.randn(taps, channels, generator=generator)
    (grad,) = torch.autograd.grad((by_tap * factor).sum(), weight)
    assert torch.equal(grad, factor.t())
    torch.library.opcheck(_taps_first.overload, (weight,))


@pytest.mark.gpu
def test_auto_takes_triton_on_cuda_and_second_derivatives_are_refused() -> None:
    if INTERPRETED:
        pytest.skip("the interpreter has no device that auto would serve with Triton")
    x, weight, bias = (normal(*s, seed=5).requires_grad_() for s in ((2, 12, 6), (6, 4), (6,)))
    y = causal_conv_silu(x, weight, bias)
    assert torch.equal(y, causal_conv_silu(x, weight, bias, backend="triton"))
    assert_close(y, causal_conv_silu_reference(x, weight, bias), 2e-6)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        dx.sum().backward()


@pytest.mark.gpu
def test_launchers_refuse_what_does_not_fit() -> None:
    from eco_llm.ops.causal_conv.triton import conv_silu_backward, conv_silu_forward

    x, weight, bias = (normal(*s, seed=5) for s in ((2, 12, 6), (6, 4), (6,)))
    with pytest.raises(ValueError, match="last stride"):
        conv_silu_forward(normal(2, 6, 12, seed=0).transpose(1, 2), weight, bias)
    with pytest.raises(ValueError, match="float32"):
        conv_silu_forward(x, weight.double(), bias)
    with pytest.raises(ValueError, match="no dy_tail"):
        conv_silu_backward(x, weight, bias, x[..., :4], None, torch.empty_like(x))
    with pytest.raises(ValueError, match="dy_tail"):
        conv_silu_backward(x, weight, bias, x[..., :4], x[None], torch.empty_like(x))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize(("head", "tail", "taps"), [(64, 0, 4), (128, 64, 4), (64, 128, 8)])
@pytest.mark.parametrize(("batch", "time", "strip"), [(2, 1, None), (2, 3, None), (1, 63, None), (1, 70, 8)])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 8), (torch.bfloat16, 8), (torch.bfloat16, 4)], ids=str)
def test_codes_are_what_they_stand_for(
    dtype: torch.dtype, bits: int, batch: int, time: int, strip: int | None, head: int, tail: int, taps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """From codes, any bytes beside any scales, what is had from `dequantize`'s result, bit for bit."""
    from eco_llm.ops.causal_conv import triton as conv
    from eco_llm.ops.quantize import Quantized, dequantize
    from eco_llm.ops.quantize.reference import empty_codes

    if strip is not None:
        monkeypatch.setattr(conv, "_strip_tokens", lambda *_: strip)
    shape = (batch, time, head + tail)
    weight, bias = normal(head + tail, taps, seed=1), normal(head + tail, seed=2)
    codes, scales = empty_codes(batch * time * (head + tail), bits, weight)
    every = torch.randint(0, 256, codes.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes.view(torch.uint8).copy_(every)
    scales.copy_(normal(*scales.shape, seed=4).abs() / 40)
    scales[0], scales[-1] = float("nan"), 2.0**120
    plain = dequantize(Quantized(codes, scales, shape, dtype, bits), backend="reference")
    assert plain.isnan().sum() == 64
    coded = conv.Codes(codes, scales, bits)
    wide = torch.full((*shape[:2], shape[2] + 8), float("nan"), dtype=dtype, device=plain.device)
    out = wide[..., 8:]  # gives shape and type, then holds dx
    assert_same_bits(conv.conv_silu_forward(out, weight, bias, coded), conv.conv_silu_forward(plain, weight, bias))
    dy_head = normal(batch, time, head, seed=5, dtype=dtype)
    dy_tail = normal(3, batch, time, tail, seed=6) if tail else None
    expected = torch.empty_like(plain)
    sums = conv.conv_silu_backward_partials(plain, weight, bias, dy_head, dy_tail, expected)
    partials = conv.conv_silu_backward_partials(out, weight, bias, dy_head, dy_tail, out, coded)
    for actual, want in zip((out, *partials), (expected, *sums), strict=True):
        assert_same_bits(actual, want)
    assert expected.isfinite().any()
    assert not expected.isfinite().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("time", "strip"), [(1, None), (63, None), (70, 8)])  # of 8: three programs, many neighbours
@pytest.mark.parametrize(("channels", "taps", "offset", "width"), [(64, 4, 0, 64), (192, 4, 8, 232), (128, 8, 3, 141)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_written_as_quantize_writes_them(
    dtype: torch.dtype, channels: int, taps: int, offset: int, width: int, time: int, strip: int | None, bits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The output, codes and scales of convolving and then quantizing, bit for bit; a broken group is broken alone."""
    from eco_llm.ops.causal_conv import triton as conv
    from eco_llm.ops.quantize import quantize

    if strip is not None:
        monkeypatch.setattr(conv, "_strip_tokens", lambda *_: strip)
    values = normal(2, time, channels, seed=0, dtype=dtype)
    values[0, 0, :5] *= 40.0
    values[1, time // 2, 3] = float("inf")
    x = slice_of_wider(values, offset, width)
    weight, bias = normal(channels, taps, seed=1), normal(channels, seed=2)
    step = torch.tensor((5 << 32) + 7, device=x.device)
    y, got = conv.conv_silu_forward_to_codes(x, weight, bias, bits, step, 4)
    want = quantize(x, bits, step=step, stream=4, backend="reference")
    broken = want.scales.isnan()
    assert broken.sum() == 1
    means = ~broken.repeat_interleave(8 * bits)  # codes of a group that is not finite mean nothing
    assert torch.equal(got.codes[means], want.codes[means])
    assert_same_bits(got.scales, want.scales)
    assert_same_bits(y, conv.conv_silu_forward(x, weight, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_written_without_a_detour(
    dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for each card, not run: little shared memory, and no thread waits for others on behalf of codes."""
    if INTERPRETED:
        pytest.skip("needs Triton's compiler")
    from eco_llm.ops.causal_conv import triton as conv

    built = compile_instead_of_running(monkeypatch, conv, "conv_silu_forward_kernel", capability=capability)
    x = torch.empty(4, 128, 3352, dtype=dtype)[..., 1536:3328]  # the mixer's at its default widths
    weight, bias, step = torch.empty(1792, 4), torch.empty(1792), torch.tensor(0)
    conv.conv_silu_forward(x, weight, bias)
    for bits in (8, 4):
        conv.conv_silu_forward_to_codes(x, weight, bias, bits, step, 0)
    plain, *to_codes = (compiled for _, compiled in built)
    assert len(to_codes) == 2
    for one in to_codes:
        assert one.metadata.shared <= plain.metadata.shared <= 4096
        assert one.asm["ptx"].count("bar.sync") == plain.asm["ptx"].count("bar.sync")
        assert "ld.global.v2.b32" in one.asm["ptx"] or "ld.global.v4.b32" in one.asm["ptx"]  # four numbers at once


@pytest.mark.gpu
def test_codes_that_do_not_fit_are_refused() -> None:
    from eco_llm.ops.causal_conv import triton as conv

    assert not conv.takes_codes(96, 4)
    assert not conv.takes_codes(128, 9)
    x, weight, bias = normal(1, 5, 96, seed=0), normal(96, 4, seed=1), normal(96, seed=2)
    with pytest.raises(ValueError, match="whole groups"):
        conv.conv_silu_forward(x, weight, bias, conv.Codes(x, x.bfloat16(), 8))
    with pytest.raises(ValueError, match="whole groups"):
        conv.conv_silu_forward_to_codes(x, weight, bias, 8, torch.tensor(0, device=x.device), 0)
    x, weight, bias = normal(1, 5, 64, seed=0), normal(64, 4, seed=1), normal(64, seed=2)
    with pytest.raises(ValueError, match="8 or 4 bits, not 5"):
        conv.conv_silu_forward(x, weight, bias, conv.Codes(x, x.bfloat16(), 5))
    with pytest.raises(ValueError, match="8 or 4 bits, not 5"):
        conv.conv_silu_forward_to_codes(x, weight, bias, 5, torch.tensor(0, device=x.device), 0)
