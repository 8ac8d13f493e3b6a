"""Column sums of several matrices in one launch against float64 sums.

They need a GPU (`-m gpu`), or Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import KERNEL_DEVICE
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_filled_buffers")]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(KERNEL_DEVICE)


# Fewer rows than a tile, as many, many tiles with a part; columns of less than a block, of blocks, with a part.
@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 1)],
        [(32, 72), (300, 16)],
        [(0, 5), (256, 40), (2500, 3)],
        [(7, 100), (257, 17), (1, 33), (1056, 48)],
    ],
    ids=str,
)
def test_sums_over_rows(shapes: list[tuple[int, int]]) -> None:
    from eco_llm.ops.partials import sum_partials

    # Every second one is a slice of a wider matrix whose other columns are NaN.
    partials = []
    for seed, shape in enumerate(shapes):
        wide = torch.full((shape[0], shape[1] + 3 * (seed % 2)), float("nan"), device=KERNEL_DEVICE)
        part = wide[:, 3 * (seed % 2) :]
        part.copy_(normal(*shape, seed=seed))
        partials.append(part)
    sums = sum_partials(*partials)
    assert len({s.untyped_storage().data_ptr() for s in sums}) == len(sums)
    for matrix, got in zip(partials, sums, strict=True):
        assert (got.dtype, got.shape, got.is_contiguous()) == (torch.float32, matrix.shape[1:], True)
        # Errors grow with the sum of magnitudes, not with the sum.
        error = (got.double() - matrix.double().sum(0)).abs()
        assert (error <= 1e-6 * matrix.double().abs().sum(0)).all()
    # The order of additions is a matter of a matrix's shape alone.
    for matrix, got in zip(partials, sums, strict=True):
        assert torch.equal(sum_partials(matrix)[0], got)


def test_no_columns() -> None:
    from eco_llm.ops.partials import sum_partials

    empty, ones = sum_partials(normal(4, 0, seed=0), torch.ones(4, 2, device=KERNEL_DEVICE))
    assert empty.shape == (0,)
    assert ones.tolist() == [4.0, 4.0]
    assert sum_partials(normal(4, 0, seed=0))[0].shape == (0,)


def test_mistakes_are_refused() -> None:
    from eco_llm.ops.partials import sum_partials

    matrix = normal(4, 6, seed=0)
    with pytest.raises(ValueError, match="got 0"):
        sum_partials()
    with pytest.raises(ValueError, match="got 5"):
        sum_partials(*[matrix] * 5)
    for wrong in (matrix[0], matrix.double(), matrix.t()):
        with pytest.raises(ValueError, match="last stride"):
            sum_partials(matrix, wrong)
