"""Rounding of moments to bfloat16 that does not stall.

bfloat16 keeps 8 significant bits, so round-to-nearest returns x unchanged for every relative change under 2^-9:
with b2 = 0.999 the second moment v <- b2 v (1 - b2 = 0.001 < 2^-9) would never decay. Here the discarded 16 bits
of the float32 pattern are compared with a threshold that moves with the step, so that an element is rounded up
exactly as often, over steps, as its discarded fraction asks: unbiased in time, no random generator, the same
bits after a resume. The thresholds are the additive recurrence R2 (M. Roberts, "The unreasonable effectiveness
of quasirandom sequences", 2018): position and step each advance by an odd multiple of 2^-16, so that one element
visits all 65536 thresholds once in 65536 steps, evenly from the start.
"""

from __future__ import annotations

import torch
from torch import Tensor

_POSITION_STRIDE = 49471  # round(2^16 / p), p = 1.3247… (the plastic number)
_STEP_STRIDE = 37345  # round(2^16 / p²)
FIRST_MOMENT, SECOND_MOMENT = 0, 1
"""Streams: the two moments of one element use thresholds half a period apart."""


def dithered_bfloat16(x: Tensor, position: Tensor, step: Tensor, stream: int) -> Tensor:
    """Round `x` to bfloat16, up or down in magnitude, by less than one unit in the last place.

    Args:
        x: floating values, any shape.
        position: integer index of each element within its credit block; broadcasts to `x`.
        step: step count, an exact integer of any dtype; broadcasts to `x`.
        stream: FIRST_MOMENT or SECOND_MOMENT.

    Returns:
        bfloat16 tensor of x's shape. Infinities and NaN stay what they are; values that bfloat16 holds are exact.
    """
    # int32 products may wrap; only their low 16 bits are used, and wrapping keeps those.
    phase = step.to(torch.int32) * _STEP_STRIDE + stream * 0x8000
    threshold = (position.to(torch.int32) * _POSITION_STRIDE + phase).bitwise_and_(0xFFFF)
    bits = x.to(torch.float32).contiguous().view(torch.int32) + threshold
    rounded = bits.bitwise_and_(-0x10000).view(torch.float32)
    # CUDA's NaN is 0x7FFFFFFF: adding to it would wrap around to -0 and hide it.
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)
