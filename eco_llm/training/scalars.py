"""Device values on their way to the log, without the host ever waiting for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor


class AsyncScalars:
    """Copies a few scalars a step to the host and hands them out when they have arrived.

    On CUDA the copy goes to pinned memory and an event marks its end; `collect` only asks the event. On CPU the
    values are there at once. Order is kept. At most `in_flight` steps may be under way: past that `push` waits
    for the oldest. Eight let the host write a file while the device works on; more would only be late news of a bad
    loss, steps to sit through after Ctrl-C, and a pile of records to deliver at once whenever the device had to stop.
    """

    def __init__(self, device: torch.device, in_flight: int = 8) -> None:
        self._cuda = device.type == "cuda"
        self._limit = in_flight
        self._waiting: deque[tuple[int, Sequence[str], Tensor, torch.cuda.Event | None]] = deque()
        self._done: list[tuple[int, dict[str, float]]] = []
        self._spare: list[tuple[Tensor, torch.cuda.Event]] = []

    def push(self, step: int, names: Sequence[str], values: Tensor) -> None:
        """Send `values`, fp32 [len(names)] on the device, on their way; they are read as of now.

        Raises:
            ValueError: there are not as many values as names.
        """
        if values.shape != (len(names),):
            raise ValueError(f"{len(names)} names for values of shape {tuple(values.shape)}")
        if not self._cuda:
            self._waiting.append((step, names, values.detach().clone(), None))
            return
        if len(self._waiting) >= self._limit:
            self._take(wait=True)
        host, event = self._buffer(len(names))
        host[: len(names)].copy_(values.detach(), non_blocking=True)
        event.record()
        self._waiting.append((step, names, host, event))

    def collect(self) -> list[tuple[int, dict[str, float]]]:
        """Steps that have arrived since the last call, oldest first: (step, {name: value})."""
        while self._waiting and self._take(wait=False):
            pass
        done, self._done = self._done, []
        return done

    def flush(self) -> list[tuple[int, dict[str, float]]]:
        """Wait for everything under way, then `collect`."""
        while self._waiting:
            self._take(wait=True)
        return self.collect()

    def _take(self, *, wait: bool) -> bool:
        step, names, values, event = self._waiting[0]
        if event is not None:
            if wait:
                event.synchronize()
            elif not event.query():
                return False
        self._waiting.popleft()
        self._done.append((step, dict(zip(names, values.tolist(), strict=False))))
        if event is not None:
            self._spare.append((values, event))
        return True

    def _buffer(self, size: int) -> tuple[Tensor, torch.cuda.Event]:
        for i, (host, event) in enumerate(self._spare):
            if host.numel() >= size:
                del self._spare[i]
                return host, event
        return torch.empty(max(size, 16), dtype=torch.float32, pin_memory=True), torch.cuda.Event()
