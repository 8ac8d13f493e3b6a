"""The gate: what was reconstructed in backward is compared with what forward saw, in every step.

Verdicts stay on the device. Where one is bad the loss that the optimizer is told becomes NaN, and the optimizer's own
guard, which never reads it on the host either, leaves every bit of weights and state as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("instant_tripped_blocks", "instant_inversion_rel_residual", "instant_reconstruction_error")
BLOCK_PREFIX = "instant_tripped_block_"
"""Of the names of single blocks' verdicts."""


class Gate:
    """Device-side verdicts of one step over a stack of blocks; micro-batches add up.

    Args:
        blocks: how many there are.
        device: where they compute.
    """

    def __init__(self, blocks: int, device: torch.device) -> None:
        self._tripped = torch.zeros(blocks, dtype=torch.float32, device=device)
        # Maxima over the step: relative residual of an inversion; relative error of reconstructed rows.
        self._worst = torch.zeros(2, dtype=torch.float32, device=device)
        self._nan = torch.full((), float("nan"), device=device)

    def begin_step(self) -> None:
        """Forget the last step's verdicts."""
        self._tripped.zero_()
        self._worst.zero_()

    def flags(self, block: int) -> tuple[Tensor, Tensor]:
        """What has to become 1 where a block's state is not the one of forward: its verdict, and the step's error of
        reconstruction. 0-dim float32, shared with the gate, so that the kernel that finds a difference can say so.
        """
        return self._tripped[block], self._worst[1]

    def expect_residual(self, block: int, residual: Tensor, limit: float) -> None:
        """Trip unless a 0-dim relative residual is at most `limit`; NaN trips."""
        self._expect(block, residual, limit, 0)

    def expect_error(self, block: int, error: Tensor, limit: float) -> None:
        """Trip unless a 0-dim relative error of reconstructed rows is at most `limit`; NaN trips."""
        self._expect(block, error, limit, 1)

    def _expect(self, block: int, value: Tensor, limit: float, kind: int) -> None:
        wrong = torch.logical_not(value <= limit).to(torch.float32)
        torch.maximum(self._tripped[block], wrong, out=self._tripped[block])
        torch.maximum(self._worst[kind], value.to(torch.float32), out=self._worst[kind])  # NaN stays

    def guard(self, loss: Tensor) -> Tensor:
        """The loss, or NaN where a verdict is bad: what the optimizer's guard is given. 0-dim."""
        return torch.where(self._tripped.amax() > 0, self._nan.to(loss.dtype), loss.detach())

    def values(self) -> Tensor:
        """float32 [3 + blocks]: `NAMES` of this step, then 1 for each block that tripped."""
        return torch.cat([self._tripped.sum()[None], self._worst, self._tripped])


def block_name(block: int) -> str:
    """The name of one block's verdict among a step's values."""
    return f"{BLOCK_PREFIX}{block}"
