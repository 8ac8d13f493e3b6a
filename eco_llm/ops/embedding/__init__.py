"""One matrix read as token embedding and as head, with one gradient.

Autograd's own way fills a [V, D] gradient for the embedding with zeros, scatters the few rows that the batch touched
into it, and adds it to the head's: 4 passes over V·D numbers more than needed. Here those rows are added straight into
the gradient that the head has made: M·D numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.products import HALF

__all__ = ["embed", "tie"]


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Tensor | None:
        rows, head = grad_outputs
        if rows is None:
            return head
        if not rows.is_sparse:  # `embed` was not what read the table
            return rows if head is None else head + rows
        values = rows._values()
        if head is None:
            head = values.new_zeros(rows.shape)
        elif torch._C._autograd._get_current_graph_task_keep_graph():
            head = head.clone()  # a retained graph may hold it elsewhere
        ids = rows._indices()[0]
        if uses_triton(head) and head.is_contiguous() and values.is_contiguous() and head.dtype != torch.float64:
            from eco_llm.ops.embedding.triton import add_rows

            add_rows(head, ids, values)
            return head
        if head.dtype in HALF:
            values = _gathered(ids, values, rows.shape[0])
        # Sums of repeated rows go through a stable sort on CUDA: the same bits in every run.
        return head.index_put_((ids,), values.to(head.dtype), accumulate=True)


def _gathered(ids: Tensor, values: Tensor, rows: int) -> Tensor:
    """values [M, D] float32, those of one id summed at the last place that has it, zeros at its others.

    Added one by one to a half-precision row, what a frequent token brings the hundredth time would be lost in the sum.
    """
    places = torch.arange(len(ids), device=ids.device)
    last = torch.zeros(rows, dtype=torch.int64, device=ids.device).scatter_reduce_(0, ids, places, "amax")
    wide = values.to(torch.float32)
    return torch.zeros_like(wide).index_put_((last[ids],), wide, accumulate=True)


def tie(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [V, D] -> (table, head), the same numbers twice: `embed` reads the first, the head's product the second.

    Their gradients meet in one buffer: the head's, written to in place. So the head's reader must hand back a gradient
    of its own, as matrix products and `linear_cross_entropy` do. First derivatives only.
    """
    table, head = _Tie.apply(weight)
    return table, head


def embed(input_ids: Tensor, table: Tensor) -> Tensor:
    """input_ids [...] int64, table [V, D] of `tie` -> [..., D]; the gradient reaches `tie` as rows, not as [V, D].

    Half-precision tables give half-precision rows, whose gradients are rounded once and then summed in float32.
    """
    return F.embedding(input_ids, table, sparse=True)
