"""Training in turns: two runs share a machine, and only one of them works at a time (`eco_train compare`)."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from eco_llm.training.hooks.base import Hook


class TakeTurns(Hook):
    """Lets the run train only while it is its turn; at the end of a turn the device is idle and the host waits.

    Args:
        ask: told the last step done (0 before the first), waits, and returns the last step of the next turn, or None:
            leave, without a checkpoint.
        delay: share of a step's time to sleep away in each step; for tests of what finds slowdowns.
    """

    def __init__(self, ask: Callable[[int], int | None], *, delay: float = 0.0) -> None:
        self._ask, self._delay = ask, delay
        self._last = 0
        self._woke_at: float | None = None

    def on_step(self, step: int) -> None:
        """Wait here if the turn is over.

        Raises:
            SystemExit: it was the last turn. The trainer writes the records under way, and saves nothing.
        """
        if step > self._last:
            _wait_for_device()
            last = self._ask(step - 1)
            if last is None:
                raise SystemExit(0)
            self._last, self._woke_at = last, None
        if self._delay:
            _wait_for_device()  # else the host sleeps while the device works, and nothing is slower for it
            if self._woke_at is not None:
                time.sleep(self._delay * (time.perf_counter() - self._woke_at))
            self._woke_at = time.perf_counter()


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
