"""Rounding of moments and weights to bfloat16 that does not stall.

bfloat16 keeps 8 significant bits, so round-to-nearest returns x unchanged for every relative change under 2^-9:
with b2 = 0.999 the second moment v <- b2 v (1 - b2 = 0.001 < 2^-9) would never decay, and a weight whose updates are
under 2^-9 of it would never move. Here the discarded 16 bits of the float32 pattern are compared with a threshold that
moves with the step, so that an element is rounded up exactly as often, over steps, as its discarded fraction asks:
unbiased in time, no random generator, the same bits after a resume. The thresholds are the additive recurrence R2
(M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018): position and step each advance by an odd
multiple of 2^-16, so that one element visits all 65536 thresholds once in 65536 steps, evenly from the start.

A bfloat16 weight may have 8 more bits in a companion (`split_weight`): 16 significant bits in 3 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Stream(NamedTuple):
    """Strides and start of one sequence of thresholds, in units of 2^-16."""

    position: int
    step: int
    start: int


_P1 = 49471  # round(2^16 / p), p = 1.3247… (the plastic number)
_P2 = 37345  # round(2^16 / p²)
FIRST_MOMENT, SECOND_MOMENT, WEIGHT = Stream(_P1, _P2, 0), Stream(_P1, _P2, 0x8000), Stream(_P1, _P2, 0x4000)
"""What is stored of one element uses thresholds half or a quarter of a period apart."""
RATIO = Stream(_P2, _P1, 0)
"""For what is rounded relative to a rounded second moment: with SECOND_MOMENT's it runs through the unit square evenly
(R2 in two dimensions), so that it is unbiased whichever way the other went."""


def thresholds(position: Tensor, step: Tensor, stream: Stream) -> Tensor:
    """int32 in [0, 2^16): what a discarded 16-bit fraction is compared with.

    Args:
        position: integer index of each element within its credit block.
        step: step count, an exact integer of any dtype; broadcasts with `position`.
        stream: one of the above.
    """
    # int32 products may wrap; only their low 16 bits are used, and wrapping keeps those.
    phase = step.to(torch.int32) * stream.step + stream.start
    return (position.to(torch.int32) * stream.position + phase).bitwise_and_(0xFFFF)


def dithered_bfloat16(x: Tensor, position: Tensor, step: Tensor, stream: Stream) -> Tensor:
    """Round `x` to bfloat16, up or down in magnitude, by less than one unit in the last place.

    Args:
        x: floating values, any shape.
        position, step, stream: as in `thresholds`; broadcast to `x`.

    Returns:
        bfloat16 tensor of x's shape. Infinities and NaN stay what they are; values that bfloat16 holds are exact.
    """
    bits = x.to(torch.float32).contiguous().view(torch.int32) + thresholds(position, step, stream)
    rounded = bits.bitwise_and_(-0x10000).view(torch.float32)
    # CUDA's NaN is 0x7FFFFFFF: adding to it would wrap around to -0 and hide it.
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


def split_weight(x: Tensor, position: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Dither `x` to the 24 leading bits of its float32 pattern, in two parts: (bfloat16, int8), each of x's shape.

    The first is the nearest bfloat16, which the network uses; the second the signed difference in units of 2^-8 of its
    last place. `joined_weight` is the exact inverse. NaN and infinities stay, with 0 beside them.
    """
    x = x.to(torch.float32).contiguous()
    bits = (x.view(torch.int32) + (thresholds(position, step, WEIGHT) >> 8)) >> 8
    near = (bits + 128) >> 8
    error = torch.where(x.isnan(), 0, bits - (near << 8))
    weight = torch.where(x.isnan(), x, (near << 16).view(torch.float32))
    return weight.to(torch.bfloat16), error.to(torch.int8)


def joined_weight(weight: Tensor, error: Tensor) -> Tensor:
    """float32 value of what `split_weight` made."""
    bits = weight.to(torch.float32).contiguous().view(torch.int32) + (error.to(torch.int32) << 8)
    return bits.view(torch.float32)
