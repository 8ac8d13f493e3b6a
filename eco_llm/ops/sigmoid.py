# mypy: disable-error-code="no-untyped-def"
"""The logistic function for Triton kernels. Import it only where Triton is there."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# Triton's own exp and division handle denormals and huge divisors, 11 instructions of some 40 that a kernel spends on
# a channel. 1 + exp(−x) is neither: it is at least 1, and where it overflows the result is 0 either way. The
# interpreter and AMD take the plain formula.
_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(−x)), float32; relative error below 1e-6 where the result is a normal number."""
    if _PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.ftz.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.ftz.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + tl.exp(-x))
