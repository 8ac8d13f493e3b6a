"""Sums on a grid: undone to the last bit; kernels have the reference's bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eco_llm.ops.backend import reference_only
from eco_llm.ops.grid import RANGE, STEP, advance, checksum, retreat, snap

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def numbers(size: tuple[int, ...], scale: float, device: str) -> Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(3)) * scale).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [(1,), (2, 63, 65), (4097,)])
def test_retreat_undoes_advance(size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    a, y = snap(numbers(size, 30.0, device)), numbers(size, 5.0, device).to(dtype)
    c = advance(a, y)
    assert c.dtype == torch.float32
    assert torch.equal(retreat(c, y), a)
    assert torch.equal(c, snap(c))
    torch.testing.assert_close(c, a + y.float(), rtol=0, atol=STEP / 2 + 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_sums_are_exact_up_to_the_range_and_not_beyond(device: str) -> None:
    a = torch.tensor([RANGE - 2 * STEP, -RANGE + 2 * STEP], device=device)
    y = torch.tensor([STEP, -STEP], device=device)
    assert torch.equal(retreat(advance(a, y), y), a)
    beyond = torch.full((1,), 4 * RANGE, device=device)
    assert torch.equal(advance(beyond, y[:1]), beyond)  # the addend is lost


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_even_and_nothing_is_hidden(device: str) -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 3.0, 1e9, float("inf"), float("nan")], device=device) * STEP
    want = torch.tensor([0.0, 2.0, 2.0, 0.0, -2.0, 3.0, 1e9, float("inf"), float("nan")], device=device) * STEP
    zero = torch.zeros_like(x)
    torch.testing.assert_close(snap(x), want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(advance(zero, x), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_a_checksum_sees_every_single_bit(device: str) -> None:
    a, b = numbers((3, 1000), 1.0, device), numbers((3, 1000), 2.0, device)
    seen = checksum(a, b)
    assert seen.dtype == torch.int64
    assert torch.equal(checksum(a.clone(), b.clone()), seen)
    assert not torch.equal(checksum(b, a), seen)
    for stream in (a, b):
        for at in (0, 1234, 2999):
            for bit in (0, 13, 31):
                changed = stream.clone()
                changed.view(torch.int32).view(-1)[at] ^= -(2**31) if bit == 31 else 1 << bit
                pair = (changed, b) if stream is a else (a, changed)
                assert not torch.equal(checksum(*pair), seen), (at, bit)
    swapped = a.clone()
    swapped.view(-1)[[0, 1]] = a.view(-1)[[1, 0]]
    assert not torch.equal(checksum(swapped, b), seen)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1,), (2, 63, 65), (4096,), (3, 100_001)])
def test_kernels_have_the_references_bits(size: tuple[int, ...], dtype: torch.dtype) -> None:
    a, y = snap(numbers(size, 300.0, "cuda")), numbers(size, 50.0, "cuda").to(dtype)
    y.view(-1)[0] = 1e7  # beyond 2^23 grid steps
    ours = advance(a, y), retreat(a, y), checksum(a, a.flip(0))
    with reference_only():
        theirs = advance(a, y), retreat(a, y), checksum(a, a.flip(0))
    for mine, want in zip(ours, theirs, strict=True):
        assert torch.equal(mine, want)
