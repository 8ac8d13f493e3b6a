# mypy: disable-error-code="no-untyped-def"
"""Column sums of a few matrices of partial results in one launch, as the last step of deterministic reductions.

Kernels that sum over tokens leave one row a program, [rows, columns] float32. `torch.sum` takes one launch each, and
several microseconds of latency where columns are few. Here a program owns 16 columns of one matrix, all its rows, and
keeps 16 loads a thread in flight. The order of additions follows from the shape alone.

Import it only where Triton is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_MATRICES = 4
_COLUMNS = 16  # 64 bytes a row: two sectors; more programs than 32 would give
_ROWS = 128
_WARPS = 4


@triton.jit(
    do_not_specialize=[
        "rows_0", "columns_0", "stride_0", "blocks_0", "rows_1", "columns_1", "stride_1", "blocks_1",
        "rows_2", "columns_2", "stride_2", "blocks_2", "rows_3", "columns_3", "stride_3",
    ],
    do_not_specialize_on_alignment=["in_0", "in_1", "in_2", "in_3", "out_0", "out_1", "out_2", "out_3"],
)  # fmt: skip
def sum_partials_kernel(
    in_0, out_0, rows_0, columns_0, stride_0, blocks_0, in_1, out_1, rows_1, columns_1, stride_1, blocks_1,
    in_2, out_2, rows_2, columns_2, stride_2, blocks_2, in_3, out_3, rows_3, columns_3, stride_3,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The programs of a matrix follow those of the one before."""
    block = tl.program_id(0)
    source, out, rows, columns, stride = in_0, out_0, rows_0, columns_0, stride_0
    if block >= blocks_0 + blocks_1 + blocks_2:
        source, out, rows, columns, stride = in_3, out_3, rows_3, columns_3, stride_3
        block -= blocks_0 + blocks_1 + blocks_2
    elif block >= blocks_0 + blocks_1:
        source, out, rows, columns, stride = in_2, out_2, rows_2, columns_2, stride_2
        block -= blocks_0 + blocks_1
    elif block >= blocks_0:
        source, out, rows, columns, stride = in_1, out_1, rows_1, columns_1, stride_1
        block -= blocks_0
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)[:, None]
    inside = (column < columns)[None, :]
    stride = tl.cast(stride, tl.int64)
    pointers = source + row * stride + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rows, ROWS):
        total += tl.load(pointers + first * stride, mask=inside & (row + first < rows), other=0.0)
    tl.store(out + column, tl.sum(total, axis=0), mask=column < columns)


def sum_partials(*partials: Tensor) -> list[Tensor]:
    """Sums over the rows of up to four matrices, in one launch. Deterministic; no host sync.

    Args:
        partials: each [rows, columns] float32, last stride 1, row stride free; on one device. 0 rows sum to 0.

    Returns:
        One [columns] float32 tensor for each, sharing no memory with anything.

    Raises:
        ValueError: no matrix or more than four, or one of another form.
    """
    if not 1 <= len(partials) <= MAX_MATRICES:
        raise ValueError(f"need 1 to {MAX_MATRICES} matrices, got {len(partials)}")
    for matrix in partials:
        if matrix.ndim != 2 or matrix.dtype != torch.float32 or (matrix.stride(1) != 1 and matrix.shape[1] > 1):
            raise ValueError(
                f"need [rows, columns] float32 with a last stride of 1, got {tuple(matrix.shape)} {matrix.dtype} "
                f"with strides {matrix.stride()}"
            )
    sums = [torch.empty(matrix.shape[1], dtype=torch.float32, device=matrix.device) for matrix in partials]
    arguments: list[Tensor | int] = []
    programs = 0
    for matrix, out in zip(partials, sums, strict=True):
        rows, columns = matrix.shape
        blocks = triton.cdiv(columns, _COLUMNS)
        programs += blocks
        arguments += [matrix, out, rows, columns, matrix.stride(0), blocks]
    for _ in range(MAX_MATRICES - len(partials)):
        arguments += [partials[0], sums[0], 0, 0, 0, 0]  # gets no program
    if programs:
        # The last matrix takes the programs that are left.
        sum_partials_kernel[(programs,)](*arguments[:-1], ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS)
    return sums
