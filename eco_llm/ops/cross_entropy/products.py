"""Matrix products that leave the tensor cores' float32 sums unrounded where the device can."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a result of at least float32.

    CUDA can leave the tensor cores' float32 sums unrounded; elsewhere a half-precision product is rounded first.
    """
    if a.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()
    return a @ b


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
