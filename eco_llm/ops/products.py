"""What ops share about matrix products: the type they run in, weights in that type, sums left in float32."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.ops.onednn import matmul, onednn_matmul, serves, weight_product

HALF = (torch.bfloat16, torch.float16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that autocast would give a product of x: its own where autocast is off. Float64 is left alone.

    Ops of our own need it, since autocast does not know them.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ in the type of x, or in autocast's if that is on (its cache then casts a weight once a context).

    A weight stored in another type is cast; without autocast its copy is kept for backward.
    """
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight)
    weight = weight.to(x.dtype)
    if serves(x, weight.t()):
        # Asked here, since PyTorch 2.11 does not know it of backward.
        transpose = torch.compiler.is_dynamo_compiling()
        return onednn_matmul(x.flatten(0, -2), weight.t(), transpose).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight)


def unread(like: Tensor, shape: torch.Size) -> Tensor:
    """A result that nobody may read, in the type of `like`: one NaN, seen as a tensor of `shape`."""
    return like.new_full((), math.nan).expand(shape)


class _LinearUnread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return unread(x, torch.Size((*x.shape[:-1], weight.shape[0])))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        d_y = gradients[0].flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):  # backward may be called inside one
            d_weight = weight_product(d_y, x.flatten(0, -2), torch.compiler.is_dynamo_compiling())
            return matmul(d_y, weight).view(x.shape), d_weight


def linear_unread(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` where its value is not read: the same shape, type and gradients, and no product. First derivatives only.

    For a function that runs again in backward, which needs what its last product read and not what came of it.
    """
    dtype = compute_dtype(x)
    return cast(Tensor, _LinearUnread.apply(x.to(dtype), weight.to(dtype)))


def cast_weight(weight: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The weight in the type of `like`; and the same if that is a copy, else an empty tensor: an operator must not
    return what it was given.
    """
    if weight.dtype == like.dtype:
        return weight, like.new_empty(0)
    copy = weight.to(like.dtype, memory_format=torch.contiguous_format)
    return copy, copy


def weight_gradient(d_out: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """d_outᵀ · inputs over all rows, in `dtype`; float32 straight from the product's sums, with no rounding between.

    Args:
        d_out: [rows, outputs].
        inputs: [rows, inputs].
    """
    return d_out.t() @ inputs if dtype == inputs.dtype else product(d_out.t(), inputs).to(dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a result of at least float32.

    CUDA can leave the tensor cores' float32 sums unrounded; elsewhere a half-precision product is rounded first.
    """
    if a.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()
    return matmul(a, b)


def product_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b with `add`; `out` is of the type of `a`, or float32.

    The addition is the product's own epilogue, so that `out` is read and written once; a separate `+=` makes a
    temporary and moves twice the bytes. A float32 addend of half-precision factors needs torch 2.10 (PyTorch pull
    request 167931), older than what this package requires.
    """
    if out.dtype == a.dtype:
        _ = torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda:
        wide = out.dtype
        _ = torch.addmm(out, a, b, out_dtype=wide, out=out) if add else torch.mm(a, b, out_dtype=wide, out=out)
    else:
        _ = out.add_(a @ b) if add else out.copy_(a @ b)
