"""A product whose value nobody reads, against the product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eco_llm.ops.products import linear, linear_unread

WIDE, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(2, 63, 24), (1, 1, 24), (7, 24)], ids=str)
@pytest.mark.parametrize(
    ("x_type", "weight_type", "autocast"),
    [
        (torch.float64, torch.float64, False), (WIDE, WIDE, False), (WIDE, HALF, False), (HALF, HALF, False),
        (WIDE, WIDE, True), (HALF, WIDE, True), (HALF, HALF, True),
    ],
    ids=str,
)  # fmt: skip
def test_an_unread_product_has_the_gradients_of_the_product(
    x_type: torch.dtype, weight_type: torch.dtype, autocast: bool, shape: tuple[int, ...], device: str
) -> None:
    """The same bits, types and strides; the value is NaN."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

    x, weight = leaf(*shape, dtype=x_type), leaf(40, 24, dtype=weight_type)
    d_y = torch.randn(*shape[:-1], 40, generator=generator).to(device)
    found = []
    for function in (linear, linear_unread):
        with torch.autocast(device, HALF, enabled=autocast):
            y = function(x, weight)
        found.append((y, *torch.autograd.grad(y, (x, weight), d_y.to(y.dtype))))
    (y, *expected), (unread, *ours) = found
    assert (unread.shape, unread.dtype, unread.device) == (y.shape, y.dtype, y.device)
    assert unread.isnan().all()
    assert unread.untyped_storage().nbytes() == unread.element_size()
    for actual, want in zip(ours, expected, strict=True):
        assert (actual.dtype, actual.stride()) == (want.dtype, want.stride())
        assert torch.equal(actual, want)


def test_backward_inside_autocast_has_the_types_of_forward() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    expected = torch.autograd.grad(linear(x, weight).sum(), (x, weight))
    y = linear_unread(x, weight)
    with torch.autocast("cpu", HALF):
        ours = torch.autograd.grad(y, (x, weight), torch.ones(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
