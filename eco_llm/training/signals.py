"""SIGINT, SIGTERM and SIGHUP (a closed terminal) as requests: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from eco_llm.training.outcome import Outcome

_OUTCOMES = {signal.SIGINT: Outcome.INTERRUPTED, signal.SIGTERM: Outcome.TERMINATED}
if hasattr(signal, "SIGHUP"):  # Windows has none
    _OUTCOMES[signal.SIGHUP] = Outcome.HUNG_UP


class StopRequest:
    """While entered, the first signal sets `outcome`; a second SIGINT interrupts at once.

    A signal that the parent had ignored stays ignored: that is what `nohup` asks for.
    """

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in _OUTCOMES:
                if signal.getsignal(number) is signal.SIG_IGN:
                    continue
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
            self.outcome = _OUTCOMES[signal.Signals(number)]
