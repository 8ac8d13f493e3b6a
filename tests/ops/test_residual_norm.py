"""The residual addition and norm that write codes, against PyTorch's ops, autograd and the quantizer.

Tests of the kernels need a GPU (`-m gpu`), or Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import INTERPRETED, KERNEL_DEVICE, assert_close, normal
from torch import Tensor

from eco_llm.ops.quantize import dequantize, quantize
from eco_llm.ops.residual_norm.reference import residual_norm_backward_reference, residual_norm_reference

EPS = 1e-5
TYPES = [torch.float32, torch.bfloat16]
# Rows of one group, of less than a chunk, of three chunks with nothing idle, of chunks with idle ends.
CHANNELS = [64, 192, 768, 832] if INTERPRETED else [64, 192, 768, 832, 2560, 8192]
# The interpreter cuts numbers off to bf16 where a GPU rounds them.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}


def inputs(channels: int, dtype: torch.dtype, device: str = KERNEL_DEVICE) -> tuple[Tensor, Tensor, Tensor]:
    """x with a channel that sticks out, what is added, the weight."""
    x, added = normal(2, 7, channels, seed=0, device=device), normal(2, 7, channels, seed=1, dtype=dtype, device=device)
    x[..., 3] *= 300.0
    return 3 * x, added, 1 + 0.3 * normal(channels, seed=2, device=device)


def counter() -> Tensor:
    return torch.tensor((3 << 32) + 5, device=KERNEL_DEVICE)


@pytest.mark.parametrize("with_added", [True, False])
def test_the_reference_is_autograds(with_added: bool) -> None:
    x, added, weight = inputs(64, torch.float32, "cpu")
    leaves = [t.requires_grad_() for t in (x, *([added] if with_added else []), weight)]
    total = x + added if with_added else x * 1
    by_definition = total / torch.sqrt(total.square().mean(-1, keepdim=True) + EPS) * weight
    got, u, inverse = residual_norm_reference(x, added if with_added else None, weight, EPS, torch.float32)
    assert_close(u, by_definition, 1e-6)
    assert torch.equal(got, total)
    d_u, d_total = (normal(2, 7, 64, seed=seed, device="cpu") for seed in (5, 6))
    expected = torch.autograd.grad((by_definition * d_u).sum() + (total * d_total).sum(), leaves)
    d_sum, d_weight = residual_norm_backward_reference(d_u, u.detach(), inverse.detach(), weight.detach(), d_total)
    for want in expected[:-1]:
        assert_close(d_sum, want, 1e-5)
    assert_close(d_weight, expected[-1], 1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("with_added", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_forward(dtype: torch.dtype, with_added: bool, channels: int, bits: int) -> None:
    from eco_llm.ops.residual_norm.triton import residual_norm_to_codes

    x, added, weight = inputs(channels, dtype)
    y = added if with_added else None
    before = x.clone()
    found = residual_norm_to_codes(x, y, weight, EPS, dtype, bits, counter(), 70)
    total, u, inverse = residual_norm_reference(x, y, weight, EPS, dtype)
    assert torch.equal(found.total, total)
    assert (found.total is x) is (y is None)
    assert torch.equal(x, before)
    assert found.u.dtype == dtype
    assert_close(found.u, u, TOLERANCE[dtype])
    assert_close(found.inverse, inverse.flatten(), 1e-6)
    expected = quantize(found.u, bits, step=counter(), stream=70, backend="reference")
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_backward(dtype: torch.dtype, narrow: bool, channels: int, bits: int) -> None:
    """From the same codes: the reference's gradient, u itself where its gradient was, a dead channel left alone."""
    from eco_llm.ops.residual_norm.triton import NormBackward, residual_norm_to_codes

    x, added, weight = inputs(channels, dtype)
    weight[5] = 0.0
    kept = residual_norm_to_codes(x, added, weight, EPS, dtype, bits, counter(), 70)
    d_u, d_total = normal(2, 7, channels, seed=3, dtype=dtype), normal(2, 7, channels, seed=4)
    u = dequantize(quantize(kept.u, bits, step=counter(), stream=70, backend="reference"), backend="reference")
    inverse = kept.inverse.view(2, 7)
    d_sum, d_weight = residual_norm_backward_reference(d_u, u, inverse, weight, d_total)

    def run() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        norm = NormBackward(
            (kept.codes, kept.scales, kept.inverse, weight), bits, d_total, torch.bfloat16 if narrow else torch.float32
        )
        place = d_u.clone()
        got = norm(place)
        assert got is place
        return got, norm.d_sum, norm.d_added, norm.d_weight

    got, ours, ours_narrow, ours_weight = first = run()
    assert torch.equal(got, u)
    assert_close(ours, d_sum, 2e-6)
    assert ours_narrow.dtype == (torch.bfloat16 if narrow else torch.float32)
    assert_close(ours_narrow, d_sum, TOLERANCE[ours_narrow.dtype])
    assert (ours_narrow is ours) is not narrow
    assert_close(ours_weight, d_weight, 1e-5)
    assert ours_weight[5] == 0
    for one, two in zip(first, run(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.gpu
def test_a_row_that_is_not_finite_is_nan_and_no_other_is() -> None:
    from eco_llm.ops.residual_norm.triton import NormBackward, residual_norm_to_codes

    x, _, weight = inputs(64, torch.float32)
    x[1, 2, 7] = float("inf")
    kept = residual_norm_to_codes(x, None, weight, EPS, torch.float32, 8, counter(), 0)
    norm = NormBackward((kept.codes, kept.scales, kept.inverse, weight), 8, torch.zeros_like(x), torch.float32)
    u = norm(torch.ones_like(x))
    for t in (u, norm.d_sum):
        assert t[1, 2].isnan().all()
        assert t[0].isfinite().all()
        assert t[1, :2].isfinite().all()
    assert norm.d_weight.isnan().all()


@pytest.mark.gpu
def test_launchers_refuse_what_does_not_fit() -> None:
    from eco_llm.ops.residual_norm.triton import residual_norm_to_codes

    x, added, weight = inputs(64, torch.float32)
    for wrong, message in (
        ((x[..., :40], None, weight[:40]), "multiple of 64"),
        ((x.double(), None, weight), "float32"),
        ((x, added[:1], weight), "second tensor"),
        ((x.transpose(0, 1), None, weight), "contiguous"),
        ((x[:0], None, weight), "not empty"),
    ):
        with pytest.raises(ValueError, match=message):
            residual_norm_to_codes(*wrong, EPS, torch.float32, 8, counter(), 0)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs ptxas, and Triton as a compiler")
@pytest.mark.parametrize("bits", [8, 4])
def test_kernels_keep_to_their_registers(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the default width, under bf16: nothing spills, and shared memory is that of a sum over a row."""
    from eco_llm.ops.residual_norm import triton as kernels

    x, added, weight = (t.to("cuda") for t in inputs(768, torch.bfloat16))
    built = []
    for name in ("residual_norm_kernel", "residual_norm_backward_kernel"):
        kernel = getattr(kernels, name)

        class Spy:
            def __init__(self, kernel: object) -> None:
                self.kernel = kernel

            def __getitem__(self, grid: object) -> object:
                return lambda *a, **k: built.append(self.kernel[grid](*a, **k))  # type: ignore[index]

        monkeypatch.setattr(kernels, name, Spy(kernel))
    kept = kernels.residual_norm_to_codes(x, added, weight, EPS, torch.bfloat16, bits, counter(), 0)
    codes = (kept.codes, kept.scales, kept.inverse, weight)
    kernels.NormBackward(codes, bits, x, torch.bfloat16)(added.clone())
    assert len(built) == 2
    for compiled in built:
        assert compiled.n_spills == 0
        assert compiled.metadata.shared < 16_384


def test_what_the_reference_rounds() -> None:
    x, added, weight = inputs(64, torch.bfloat16, "cpu")
    total, u, _ = residual_norm_reference(x, added, weight, EPS, torch.bfloat16)
    assert torch.equal(u, F.rms_norm(total, (64,), weight, EPS).bfloat16())
