"""Activations in 8 or 4 bits a number, with stochastic rounding. Maths and bytes: README.md beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from eco_llm.ops.backend import uses_triton
from eco_llm.ops.opaque import operator
from eco_llm.ops.quantize.reference import (
    GROUP,
    check_bits,
    dequantize_reference,
    empty_codes,
    error_reference,
    quantize_reference,
)  # fmt: skip

__all__ = ["GROUP", "OPS_STREAMS", "Keep", "Quantized", "dequantize", "quantization_error", "quantize"]

Backend = Literal["auto", "reference", "triton"]

OPS_STREAMS = 1 << 16
"""Ops that quantize for themselves (`Keep`) have streams from here on, so that they share none with their callers."""


class Keep(NamedTuple):
    """Asks an op to keep for backward codes and scales of what it can quantize by itself, while it is in registers."""

    bits: int
    """8 or 4."""
    step: Tensor
    """Of `quantize`; another for every call of an op, since the stream is the op's own."""

    def serves(self, x: Tensor, numel: int) -> bool:
        """Whether so many numbers, computed from x, can be quantized.

        Raises:
            ValueError: bits or step that no tensor on the device of x can be quantized with.
        """
        _check(x.device, self.bits, self.step)
        return numel < _TOO_MANY


_TOO_MANY = 2**34


class Quantized(NamedTuple):
    """A tensor in few bits; `dequantize` gives it back."""

    codes: Tensor
    """Flat, in row-major order: int8 [n], or for 4 bits uint8 [⌈n / 2⌉], an even element in the lower nibble."""
    scales: Tensor
    """bfloat16 [⌈n / 64⌉], one for every GROUP elements in row-major order."""
    shape: tuple[int, ...]
    """Of the tensor that was quantized."""
    dtype: torch.dtype
    """Of the tensor that was quantized."""
    bits: int
    """8 or 4."""

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return self.codes.nbytes + self.scales.nbytes


def quantize(x: Tensor, bits: int, *, step: Tensor, stream: int, backend: Backend = "auto") -> Quantized:
    """x in `bits` bits a number: in every group of 64, in row-major order, x ≈ code · scale.

    Rounded up or down at random, so that the mean over steps is x; the same x, step and stream give the same bits, on
    every device, whatever the strides. A group that holds an infinity or NaN comes back as NaN throughout. Nothing is
    recorded for autograd. One launch on a GPU; no host sync.

    Args:
        x: float32, bfloat16 or float16, any shape, fewer than 2^34 elements; copied first unless it is contiguous.
        bits: 8 or 4.
        step: 0-dim int32 or int64 on the device of x; a new one gives new random numbers, also when a CUDA graph is
            replayed.
        stream: 0 … 2^31 − 1; tensors with streams of their own have random numbers of their own.
        backend: `auto` takes Triton on CUDA, else the reference.

    Raises:
        ValueError: another type of x, bits, step or stream, or an unknown backend.
    """
    triton = _takes_triton(x, bits, step, stream, backend)
    function = _quantize_op if triton or torch.compiler.is_compiling() else _quantize_now
    codes, scales = function(x.detach(), bits, step, stream, triton)
    return Quantized(codes, scales, tuple(x.shape), x.dtype, bits)


def dequantize(q: Quantized, *, backend: Backend = "auto") -> Tensor:
    """code · scale, rounded to nearest; contiguous, in the shape and type of what was quantized.

    Never infinite: what would be, for a number at the very end of its type's range, is the largest number of the type.

    Raises:
        ValueError: an unknown backend.
    """
    triton = _named(backend, q.codes)
    function = _dequantize_op if triton or torch.compiler.is_compiling() else _dequantize_now
    y: Tensor = function(q.codes, q.scales, q.shape, q.dtype, q.bits, triton)
    return y


def quantization_error(
    x: Tensor, bits: int, step: Tensor, stream: int, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """(Σ (x̂ − x)², Σ x²) with x̂ what `dequantize(quantize(x, …))` returns; x̂ is never written.

    Arguments and refusals as `quantize`.

    Returns:
        Two 0-dim float32 tensors on the device of x; NaN if x has a number that is not finite. Deterministic.
    """
    triton = _takes_triton(x, bits, step, stream, backend)
    function = _error_op if triton or torch.compiler.is_compiling() else _error_now
    sums = function(x.detach(), bits, step, stream, triton)
    return sums[0], sums[1]


def _takes_triton(x: Tensor, bits: int, step: Tensor, stream: int, backend: Backend) -> bool:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"can quantize float32, bfloat16 or float16, not {x.dtype}")
    _check(x.device, bits, step)
    if not 0 <= stream < 2**31:
        raise ValueError(f"stream must be 0 … 2^31 - 1, not {stream}")
    if x.numel() >= _TOO_MANY:
        raise ValueError(f"can quantize fewer than 2^34 elements, not {x.numel()}")
    return _named(backend, x)


def _check(device: torch.device, bits: int, step: Tensor) -> None:
    check_bits(bits)
    if step.ndim or step.dtype not in (torch.int32, torch.int64) or step.device != device:
        raise ValueError(
            f"step must be a 0-dim int32 or int64 tensor on {device}, not {step.ndim}-dim {step.dtype} on {step.device}"
        )


def _named(backend: Backend, x: Tensor) -> bool:
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"unknown quantizer backend {backend!r}; known: auto, reference, triton")
    return backend == "triton" or (backend == "auto" and uses_triton(x))


# Operators, so that torch.compile sees opaque nodes with known shapes: it would trace into the launchers, and fuse the
# reference's products and sums to other roundings. Eager code goes to the reference directly.
def _quantize_now(x: Tensor, bits: int, step: Tensor, stream: int, triton: bool) -> tuple[Tensor, Tensor]:
    if not triton:
        return quantize_reference(x, bits, step, stream)
    from eco_llm.ops.quantize.triton import quantize_triton

    return quantize_triton(x, bits, step, stream)


_quantize_op = operator("quantize")(_quantize_now)


@_quantize_op.register_fake
def _(x: Tensor, bits: int, step: Tensor, stream: int, triton: bool) -> tuple[Tensor, Tensor]:
    return empty_codes(x.numel(), bits, x)


def _dequantize_now(
    codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, triton: bool
) -> Tensor:
    if not triton:
        return dequantize_reference(codes, scales, shape, dtype, bits)
    from eco_llm.ops.quantize.triton import dequantize_triton

    return dequantize_triton(codes, scales, shape, dtype, bits)


_dequantize_op = operator("dequantize")(_dequantize_now)


@_dequantize_op.register_fake
def _(codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, triton: bool) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


def _error_now(x: Tensor, bits: int, step: Tensor, stream: int, triton: bool) -> Tensor:
    if not triton:
        return error_reference(x, bits, step, stream)
    from eco_llm.ops.quantize.triton import error_triton

    return error_triton(x, bits, step, stream)


_error_op = operator("quantization_error")(_error_now)


@_error_op.register_fake
def _(x: Tensor, bits: int, step: Tensor, stream: int, triton: bool) -> Tensor:
    return x.new_empty(2, dtype=torch.float32)
