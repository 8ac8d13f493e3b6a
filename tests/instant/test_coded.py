"""An MLA mixer that runs again on codes of its norm's result, against its slow twin.

Needs a GPU (`-m gpu`), or Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

import os

import pytest
import torch
from stack_cases import SHAPE
from torch import Tensor

from eco_llm.instant.replay import Twice
from eco_llm.model.block import Block
from eco_llm.ops.quantize import Keep, dequantize, quantize
from eco_llm.ops.residual_norm.reference import residual_norm_backward_reference, residual_norm_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.gpu


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def mixer_of(dtype: torch.dtype) -> tuple[Block, Twice]:
    torch.manual_seed(0)
    block = Block(SHAPE, "mla").to(DEVICE, dtype)
    return block, block._attention


def keep_of(bits: int) -> Keep:
    return Keep(bits, torch.tensor(7, device=DEVICE))


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.isfinite().all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("time", [1, 63])
def test_it_is_its_slow_twin(time: int, bits: int, added: bool) -> None:
    """Float32: forward is exact, and gradients are those of what the codes stand for."""
    from eco_llm.instant.coded import U_STREAM, recompute_from_codes

    block, f = mixer_of(torch.float32)
    x, y, d_total, d_out = (normal(seed, 2, time, SHAPE.d_model) for seed in range(4))
    weight = 1 + 0.1 * normal(4, SHAPE.d_model)
    leaves = [x.requires_grad_(), *([y.requires_grad_()] if added else []), weight.requires_grad_()]
    keep = keep_of(bits)
    results = recompute_from_codes(f, x, y if added else None, weight, 1e-5, keep=keep)
    block.zero_grad()
    torch.autograd.backward(results, (d_total, d_out))
    ours = [t.grad for t in leaves] + [p.grad for p in block.mixer.parameters()]

    with torch.no_grad():
        total, u, inverse = residual_norm_reference(x, y if added else None, weight, 1e-5, torch.float32)
        out = f.value(u)
    for actual, expected in zip(results, (total, out), strict=True):
        assert error(actual.detach(), expected) < 1e-5
    kept = dequantize(quantize(u, bits, step=keep.step, stream=U_STREAM)).requires_grad_()
    block.zero_grad()
    f.value(kept).backward(d_out)
    assert kept.grad is not None
    d_sum, d_weight = residual_norm_backward_reference(kept.grad, kept.detach(), inverse, weight, d_total)
    wanted = [d_sum, *([d_sum] if added else []), d_weight, *(p.grad for p in block.mixer.parameters())]
    for actual, expected in zip(ours, wanted, strict=True):
        assert actual is not None
        assert expected is not None
        # u is the kernel's, with other last bits than the reference's: a number of it may be rounded to another code.
        assert error(actual, expected) < (1e-3 if bits == 8 else 1e-2)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_alone_are_kept(bits: int) -> None:
    """Of what the norm gives codes, and of attention nothing; hooks are shown the codes and no activation."""
    from eco_llm.instant.coded import recompute_from_codes

    _, f = mixer_of(torch.float32)
    x, y = (normal(seed, 2, 63, SHAPE.d_model).requires_grad_() for seed in range(2))
    weight = torch.ones(SHAPE.d_model, device=DEVICE, requires_grad=True)
    shown: list[tuple[torch.dtype, int]] = []

    def show(t: Tensor) -> Tensor:
        shown.append((t.dtype, t.numel()))
        return t.detach()

    with torch.autocast(DEVICE, torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(show, lambda t: t):
        total, out = recompute_from_codes(f, x, y.bfloat16(), weight, 1e-5, keep=keep_of(bits))
    assert (total.dtype, out.dtype) == (torch.float32, torch.bfloat16)
    rows, channels = 2 * 63, SHAPE.d_model
    codes = torch.int8 if bits == 8 else torch.uint8
    assert shown == [
        (codes, rows * channels * bits // 8), (torch.bfloat16, rows * channels // 64), (torch.float32, rows),
        (torch.float32, channels),
    ]  # fmt: skip


def test_both_runs_share_one_compiled_graph() -> None:
    """The first is under hooks, the second is not: that must not be another compilation."""
    from torch._dynamo.testing import CompileCounterWithBackend

    from eco_llm.instant.coded import recompute_from_codes

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    block, _ = mixer_of(torch.float32)
    block.compile_parts(backend=counter)
    x = normal(0, 2, 63, SHAPE.d_model).requires_grad_()
    weight = torch.ones(SHAPE.d_model, device=DEVICE)
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t):
            total, out = recompute_from_codes(block._attention, x, None, weight, 1e-5, keep=keep_of(8))
        (total + out).sum().backward()
    torch._dynamo.reset()
    assert counter.frame_count == 1
