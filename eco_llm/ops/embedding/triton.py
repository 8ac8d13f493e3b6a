# mypy: allow-untyped-defs
"""Rows added to the rows of a matrix: a sort, then two kernels. Import it only where Triton is installed.

Most ids of a batch come once or twice, a few come thousands of times. An id of at most FEW rows is one warp's work, so
that thousands run beside each other; one with more gets programs of eight warps that read 64 rows at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEW = 32  # rows


@triton.jit
def _add(matrix, values, ids, order, count, first, mine, columns, D: tl.constexpr, ROWS: tl.constexpr):
    """matrix[mine, columns] += the sum of the rows whose sorted places begin at `first`."""
    total = tl.sum(tl.zeros([ROWS, columns.shape[0]], tl.float32), 0)
    at, found = first, ROWS
    while found == ROWS:
        places = at + tl.arange(0, ROWS)
        alike = tl.load(ids + places, mask=places < count, other=-1) == mine
        rows = tl.load(order + places, mask=alike, other=0)
        inside = alike[:, None] & (columns < D)[None, :]
        total += tl.sum(
            tl.load(values + rows[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32), 0
        )
        at += ROWS
        found = tl.sum(alike.to(tl.int32), 0)
    target = matrix + mine.to(tl.int64) * D + columns
    sums = tl.load(target, mask=columns < D, other=0.0).to(tl.float32) + total
    tl.store(target, sums.to(matrix.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["count"])
def _few_kernel(
    matrix, values, ids, order, count, FEW: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (i, j): columns j·COLUMNS … of the id at sorted place i, if it begins there and has at most FEW rows."""
    first = tl.program_id(0)
    mine = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    beyond = tl.load(ids + first + FEW, mask=first + FEW < count, other=-1)
    if (mine != before) & (mine != beyond):
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        _add(matrix, values, ids, order, count, first, mine, columns, D, ROWS)


@triton.jit(do_not_specialize=["count"])
def _many_kernel(
    matrix, values, ids, order, count, FEW: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (i, j): the id with more than FEW rows that begins at one of the places i·FEW … i·FEW + FEW − 1, if any.

    There is one at most: it reaches beyond them.
    """
    places = tl.program_id(0) * FEW + tl.arange(0, FEW)
    here = tl.load(ids + places, mask=places < count, other=-1)
    before = tl.load(ids + places - 1, mask=(places > 0) & (places < count), other=-1)
    beyond = tl.load(ids + places + FEW, mask=places + FEW < count, other=-2)
    first = tl.max(tl.where((here != before) & (here == beyond), places, -1), 0)
    if first >= 0:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        _add(matrix, values, ids, order, count, first, tl.load(ids + first), columns, D, ROWS)


def add_rows(matrix: Tensor, ids: Tensor, values: Tensor) -> None:
    """matrix[ids[m]] += values[m] for every m, in place. Rows of one id are summed in float32, in an order that depends
    on `ids` alone, and rounded once: the same bits in every run. No host sync.

    Args:
        matrix: [V, D] float32, bfloat16 or float16, contiguous.
        ids: [M] integers, 0 … V − 1, V < 2^31.
        values: [M, D] floating point, contiguous.
    """
    count, width = values.shape
    if values.numel():
        sorted_ids, order = ids.to(torch.int32).sort(stable=True)  # half the passes of a 64-bit sort
        arguments = matrix, values, sorted_ids, order, count, _FEW, width
        with torch.cuda.device_of(matrix):
            _few_kernel[(count, triton.cdiv(width, 256))](*arguments, ROWS=4, COLUMNS=256, num_warps=1)
            if count > _FEW:
                grid = (triton.cdiv(count, _FEW), triton.cdiv(width, 128))
                _many_kernel[grid](*arguments, ROWS=64, COLUMNS=128, num_warps=8)
