"""Float32 products on AMD processors, by oneDNN.

PyTorch has two libraries for matrix products on a CPU, MKL and oneDNN, and gives float32 to MKL, which has no AVX-512
kernels for AMD. On Zen 4 oneDNN's take an eighth less time: 214 against 190 GFLOP/s on two cores, at 2048 rows and 384
to 1536 columns. Only where the left factor lies row by row: oneDNN's operator in PyTorch copies any other, which costs
what it gains. So the gradient of a weight, d_outᵀ · inputs, is oneDNN's in a compiled graph alone (`weight_product`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eco_llm.ops.backend import Kernels, forced_reference
from eco_llm.ops.opaque import operator

LEAST_WORK = 2**23
"""Multiply-adds below which a product gains less than a call of oneDNN's operator costs, 12 µs more than one of MKL."""


@functools.cache
def products_by() -> Kernels:
    """Where this machine's float32 products come from, `onednn` or `pytorch`'s own choice, with the reason."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return Kernels("pytorch", "this PyTorch has no oneDNN operator for products")
    if not torch.backends.mkl.is_available():
        return Kernels("pytorch", "oneDNN was measured against MKL only, which this PyTorch lacks")
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not known.get("sse4a"):  # in no processors but AMD's
        return Kernels("pytorch", "oneDNN is used on AMD processors only")
    if not known.get("avx512_f"):
        return Kernels("pytorch", "oneDNN was not measured on AMD processors without AVX-512")
    return Kernels("onednn", "MKL has no AVX-512 kernels for AMD processors")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N], by oneDNN where it is the faster."""
    product: Tensor = onednn_matmul(a, b) if serves(a, b) else a @ b
    return product


def serves(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN makes a [..., K] @ b [K, N] now: float32 on a CPU, outside autocast and `reference_only`."""
    if a.dtype != torch.float32 or b.dtype != torch.float32 or a.device.type != "cpu" or forced_reference():
        return False
    if a.ndim < 2 or a.stride(-1) != 1 or a.numel() * b.shape[1] < LEAST_WORK or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_dynamo_compiling():
        from eco_llm.ops.traced_backend import has_onednn

        return has_onednn()
    return products_by().name == "onednn"


# PyTorch's own operator has no derivative, and its compiler takes it for constant weights only.
@operator("onednn_matmul")
def onednn_matmul(a: Tensor, b: Tensor, transpose: bool = False) -> Tensor:
    """a [M, K] @ b [K, N], both float32 on a CPU, b of any strides that do not overlap: [M, N].

    With `transpose` its derivative may write a transposed factor (`weight_product`).
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
    return result


@onednn_matmul.register_fake
def _(a: Tensor, b: Tensor, transpose: bool = False) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    *factors, ctx.transpose = inputs
    ctx.save_for_backward(*factors)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    a, b = ctx.saved_tensors
    with torch.autocast("cpu", enabled=False):  # backward may be called inside one
        d_a = matmul(d_out, b.t()) if ctx.needs_input_grad[0] else None
        # b is a weight's transpose: its gradient lies as it does, so that the weight's own need not be copied.
        d_b = weight_product(d_out, a, ctx.transpose).t() if ctx.needs_input_grad[1] else None
    return d_a, d_b, None


def weight_product(d_out: Tensor, inputs: Tensor, transpose: bool) -> Tensor:
    """d_out [rows, outputs]ᵀ @ inputs [rows, inputs], row by row; by oneDNN with `transpose`, for compiled graphs.

    By oneDNN a factor must be transposed in memory: alone that costs what oneDNN gains. A compiled graph does it in the
    loop that makes the factor, or in one faster than PyTorch's copy, and gains a few percent; of the two factors the
    narrower is taken.
    """
    left = d_out.shape[1] <= inputs.shape[1]
    if not (transpose and serves(d_out, inputs) and _rows_apart(inputs if left else d_out)):
        return d_out.t() @ inputs
    if left:
        return onednn_matmul(d_out.t().contiguous(), inputs)
    return onednn_matmul(inputs.t().contiguous(), d_out).t().contiguous()


def _rows_apart(x: Tensor) -> bool:
    """Whether x [M, N] lies row by row, no number in two of them: oneDNN refuses others as a second factor."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1]


onednn_matmul.register_autograd(_differentiate, setup_context=_save)
