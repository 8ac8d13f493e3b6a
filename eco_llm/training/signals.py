"""SIGINT and SIGTERM as requests: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from eco_llm.training.outcome import Outcome


class StopRequest:
    """While entered, the first signal sets `outcome`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was set outside Python
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.outcome is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.outcome is None:
            self.outcome = Outcome.INTERRUPTED if number == signal.SIGINT else Outcome.TERMINATED
