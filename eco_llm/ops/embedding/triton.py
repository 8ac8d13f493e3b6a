# mypy: allow-untyped-defs
"""Rows added to the rows of a matrix, as one kernel after a sort. Import it only where Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # summed at a time
_COLUMNS = 256  # a program's
_WARPS = 8


@triton.jit(do_not_specialize=["count"])
def _add_rows_kernel(matrix, values, ids, order, count, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (i, j) adds all rows of the i-th sorted id if that is the first of its kind; columns j·COLUMNS …"""
    first = tl.program_id(0)
    mine = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if mine != before:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([COLUMNS], tl.float32)
        at, found = first, ROWS
        while found == ROWS:
            places = at + tl.arange(0, ROWS)
            alike = tl.load(ids + places, mask=places < count, other=-1) == mine
            rows = tl.load(order + places, mask=alike, other=0).to(tl.int64)
            inside = alike[:, None] & (columns < D)[None, :]
            total += tl.sum(
                tl.load(values + rows[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32), 0
            )
            at += ROWS
            found = tl.sum(alike.to(tl.int32), 0)
        target = matrix + mine.to(tl.int64) * D + columns
        sums = tl.load(target, mask=columns < D, other=0.0).to(tl.float32) + total
        tl.store(target, sums.to(matrix.dtype.element_ty), mask=columns < D)


def add_rows(matrix: Tensor, ids: Tensor, values: Tensor) -> None:
    """matrix[ids[m]] += values[m] for every m, in place. Rows of one id are summed in float32, in the order of m, and
    rounded once: the same bits in every run. A frequent id is one program's work, 32 rows at a time.

    Args:
        matrix: [V, D] float32, bfloat16 or float16, contiguous.
        ids: [M] integers, 0 … V − 1, V < 2^31.
        values: [M, D] floating point, contiguous.
    """
    count, width = values.shape
    if values.numel():
        sorted_ids, order = ids.to(torch.int32).sort(stable=True)  # half the passes of a 64-bit sort
        with torch.cuda.device_of(matrix):
            _add_rows_kernel[(count, triton.cdiv(width, _COLUMNS))](
                matrix, values, sorted_ids, order, count, D=width, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS
            )
