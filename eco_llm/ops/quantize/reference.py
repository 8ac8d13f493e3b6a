"""Quantizing in PyTorch's own ops, and the numbers that the kernels share. Maths: README.md beside this file.

Every line below rounds as the kernels do, so that codes, scales and results are the same bits on every device.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
"""Elements that share a scale."""
LARGEST = {8: 127, 4: 7}
"""The largest code, and minus the smallest."""
ZERO_NIBBLE = 8
"""A 4-bit code is stored with this added, so that a nibble is never negative."""

FRACTION = 15
"""Bits behind the point with which x / scale is compared with a random number."""
UNIT = float(1 << FRACTION)
MAGIC = 12582912.0
"""1.5 · 2^23: v + MAGIC has the bits of round(v) in its own, for |v| < 2^22. Its lowest 15 bits are 0."""
MAGIC_BITS = 0x4B400000
SMALLEST_SCALE = 2.0**-112
"""So that 2^15 / scale is a float32. Smaller numbers than this one are still unbiased."""
NAN_BITS = 0x7FC00000
INFINITY_BITS = 0x7F800000

# Odd multipliers with evenly spread bits, the primes of xxHash32.
PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
_MASK = 0xFFFFFFFF


def slope(bits: int) -> float:
    """The scale of a group over its largest magnitude: a float32 a hair above 1 / LARGEST.

    The hair, 2^-20, is more than all roundings between here and the code, so that none exceeds LARGEST.
    """
    value: float = struct.unpack("<f", struct.pack("<f", (1 + 2.0**-20) / LARGEST[bits]))[0]
    return value


def check_bits(bits: int) -> None:
    """
    Raises:
        ValueError: neither 8 nor 4.
    """
    if bits not in LARGEST:
        raise ValueError(f"can quantize to 8 or 4 bits, not {bits}")


def empty_codes(numel: int, bits: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales), flat and not yet written, for `numel` elements; on the device of `like`. As `check_bits`."""
    check_bits(bits)
    size, dtype = (numel, torch.int8) if bits == 8 else (-(-numel // 2), torch.uint8)
    return like.new_empty(size, dtype=dtype), like.new_empty(-(-numel // GROUP), dtype=torch.bfloat16)


def stream_keys(stream: int) -> list[int]:
    """Two unsigned 32-bit words that `step` is mixed into: the first bits of pi, with the stream mixed in."""
    return [_folded(_folded(start ^ stream, PRIMES[0]), PRIMES[1]) for start in (0x243F6A88, 0x85A308D3)]


def _folded(x: int, prime: int) -> int:
    product = x * prime
    return (product ^ (product >> 32)) & _MASK


def _fold(x: Tensor, prime: int) -> Tensor:
    """Both halves of the 64-bit product, one upon the other. int64 holding 32 unsigned bits, in and out."""
    product = x * prime  # may wrap round to below 0; its bits are those of the unsigned product
    return product.bitwise_xor_(product >> 32).bitwise_and_(_MASK)


def random_numbers(count: int, step: Tensor, stream: int) -> Tensor:
    """`count` numbers of FRACTION bits, those of elements 0, 1, …

    Args:
        count: of elements.
        step: 0-dim int32 or int64; a device tensor is not read by the host.
        stream: 0 … 2^31 − 1.

    Returns:
        int32, [count rounded up to 4], on the device of `step`.
    """
    step = step.to(torch.int64)
    keys = [
        _fold(_fold((step & _MASK) ^ k, PRIMES[2]) ^ ((step >> 32) & _MASK), PRIMES[3]) for k in stream_keys(stream)
    ]
    mixed = torch.arange(-(-count // 4), dtype=torch.int64, device=step.device).bitwise_xor_(keys[0])
    mixed = _fold(_fold(mixed, PRIMES[0]).bitwise_xor_(keys[1]), PRIMES[1])
    numbers = torch.empty(mixed.numel(), 4, dtype=torch.int32, device=step.device)
    for half, prime in ((numbers[:, :2], PRIMES[2]), (numbers[:, 2:], PRIMES[3])):
        word = _fold(mixed, prime)
        half[:, 1] = word >> 17
        half[:, 0] = (word >> 1).bitwise_and_((1 << FRACTION) - 1)
    return numbers.flatten()


def _groups(x: Tensor) -> Tensor:
    """x in row-major order as float32 [groups, GROUP], padded with zeros."""
    return _padded(x.reshape(-1).float())


def _padded(flat: Tensor) -> Tensor:
    """[n] as [groups, GROUP], with zeros at the end."""
    count = -(-flat.numel() // GROUP)
    return F.pad(flat, (0, count * GROUP - flat.numel())).view(count, GROUP)


def _scales(groups: Tensor, bits: int) -> Tensor:
    """float32 [groups], each a bfloat16 number; NaN where the group has a number that is not finite."""
    # As integers, magnitudes sort as they do as numbers, and NaN comes last.
    top = (groups.view(torch.int32) & 0x7FFFFFFF).amax(dim=1)
    scale = (top.view(torch.float32) * slope(bits)).clamp_min(SMALLEST_SCALE)
    up = (scale.view(torch.int32) + 0xFFFF) & -0x10000  # away from 0, so that the largest code is not exceeded
    return torch.where(top < INFINITY_BITS, up, NAN_BITS).view(torch.float32)


def _codes(groups: Tensor, scale: Tensor, step: Tensor, stream: int) -> Tensor:
    """int32 [groups, GROUP]: x / scale, rounded up with the probability that its fraction asks for."""
    codes = (groups * (UNIT / scale)[:, None]).add_(MAGIC).view(torch.int32).sub_(MAGIC_BITS)
    codes.add_(random_numbers(groups.numel(), step, stream).view(groups.shape)).bitwise_right_shift_(FRACTION)
    return codes.masked_fill_(scale.isnan()[:, None], 0)


def _decoded(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes · scale in `dtype`; what would be infinite by rounding up is the largest number instead, NaN stays."""
    largest = torch.finfo(dtype).max
    return (codes.float() * scale[:, None]).clamp(-largest, largest).to(dtype)


def quantize_reference(x: Tensor, bits: int, step: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of `eco_llm.ops.quantize.quantize`."""
    groups = _groups(x)
    scale = _scales(groups, bits)
    codes = _codes(groups, scale, step, stream).flatten()[: x.numel() + (x.numel() % 2 if bits == 4 else 0)]
    if bits == 8:
        return codes.to(torch.int8), scale.to(torch.bfloat16)
    low, high = (codes + ZERO_NIBBLE).to(torch.uint8).view(-1, 2).unbind(dim=1)
    return low | high << 4, scale.to(torch.bfloat16)


def dequantize_reference(codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int) -> Tensor:
    """The result of `eco_llm.ops.quantize.dequantize`."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=1).flatten().to(torch.int8) - ZERO_NIBBLE
    numel = torch.Size(shape).numel()
    return _decoded(_padded(codes[:numel]), scales.float(), dtype).flatten()[:numel].view(shape)


def error_reference(x: Tensor, bits: int, step: Tensor, stream: int) -> Tensor:
    """float32 [2] of `eco_llm.ops.quantize.quantization_error`."""
    groups = _groups(x)
    scale = _scales(groups, bits)
    error = _decoded(_codes(groups, scale, step, stream), scale, x.dtype).float() - groups
    return torch.stack((error.square().sum(), groups.square().sum()))
