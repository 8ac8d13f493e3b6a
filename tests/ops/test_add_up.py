"""The sum of a gradient's parts: its bits are those of float32 sums in order, through kernels too."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import INTERPRETED, KERNEL_DEVICE, normal

from eco_llm.ops.add_up import Ahead, add_up, fork
from eco_llm.ops.add_up.reference import add_up_reference


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_parts_are_added_first_and_nothing_is_rounded_between(wide: torch.dtype, narrow: torch.dtype) -> None:
    total = torch.tensor([1.0, 2.0**24, -3.0], dtype=wide)
    one = torch.tensor([2.0**-9, 1.0, 3.0], dtype=torch.bfloat16)
    other = torch.tensor([2.0**-17, 1.0, torch.nan], dtype=torch.bfloat16)
    wanted = torch.tensor([1 + 2.0**-9 + 2.0**-17, 2.0**24 + 2, torch.nan], dtype=wide)
    found, narrowed = add_up(total, one, other, narrow)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(narrowed, wanted.to(narrow), rtol=0, atol=0, equal_nan=True)
    assert total.tolist()[:2] == [1.0, 2.0**24]


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32], ids=str)
def test_what_two_readers_send_back_is_added_to_the_stream(narrow: torch.dtype) -> None:
    x, one, other = (normal(3, 5, seed=seed, dtype=narrow, device="cpu") for seed in (1, 2, 3))
    stream = normal(3, 5, seed=4, device="cpu")
    ahead = Ahead(x, stream, narrow)
    leaf = x.clone().requires_grad_()
    for_one, for_other = fork(leaf, ahead)
    assert torch.equal(for_one, x)
    assert torch.equal(for_other, x)
    ((for_one * one).sum() + (for_other * other).sum()).backward()
    total, narrowed = add_up(stream, one, other, narrow)
    assert ahead.total is not None
    assert leaf.grad is not None
    assert torch.equal(ahead.total, total)
    assert torch.equal(leaf.grad, narrowed)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_buffers")
@pytest.mark.parametrize("size", [(1,), (2, 63, 65), (4096,), (3, 10_001), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_have_the_references_bits(size: tuple[int, ...], dtype: torch.dtype, narrow: torch.dtype) -> None:
    if narrow == torch.bfloat16 and INTERPRETED:
        pytest.skip("the interpreter cuts numbers off to bf16")
    from eco_llm.ops.add_up.triton import add_up_kernels

    total = normal(*size, seed=1, device=KERNEL_DEVICE)
    one, other = (normal(*size, seed=seed, dtype=dtype, device=KERNEL_DEVICE) for seed in (2, 3))
    for got, want in zip(
        add_up_kernels(total, one, other, narrow), add_up_reference(total, one, other, narrow), strict=True
    ):
        assert torch.equal(got, want)
