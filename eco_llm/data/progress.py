"""How long work shows itself: a bar on a terminal, a plain line every few seconds elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID


class Progress(Protocol):
    """What long work reports to. Phases follow one another; the unit is bytes of text."""

    def start(self, label: str, total: int | None) -> None:
        """Begin a phase; `total` is None where it is not known."""

    def advance(self, amount: int) -> None:
        """`amount` more of the phase is done."""

    def close(self) -> None:
        """All phases are over, or an error ended them. May be called twice."""


class NoProgress:
    """Shows nothing."""

    def start(self, label: str, total: int | None) -> None:
        """See Progress."""

    def advance(self, amount: int) -> None:
        """See Progress."""

    def close(self) -> None:
        """See Progress."""


class PlainProgress:
    """A line when a phase begins, then at most one each `every` seconds: for logs and pipes."""

    def __init__(self, stream: TextIO, every: float = 5.0) -> None:
        self._stream, self._every = stream, every
        self._label, self._done, self._next_line = "", 0, 0.0
        self._total: int | None = None

    def start(self, label: str, total: int | None) -> None:
        """See Progress."""
        self._label, self._total, self._done = label, total, 0
        self._next_line = time.monotonic() + self._every
        self._write(f"{label} …" if total is None else f"{label}: {_mb(total)} …")

    def advance(self, amount: int) -> None:
        """See Progress."""
        self._done += amount
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self._every
            share = f" of {_mb(self._total)} ({self._done / self._total:.0%})" if self._total else ""
            self._write(f"{self._label}: {_mb(self._done)}{share}")

    def close(self) -> None:
        """See Progress."""

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class RichProgress:
    """One bar per phase, with bytes, speed and time left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: RichBar | None = None
        self._task: TaskID | None = None

    def start(self, label: str, total: int | None) -> None:
        """See Progress."""
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._bar.start()
        self._finish_phase()
        self._task = self._bar.add_task(label, total=total)

    def advance(self, amount: int) -> None:
        """See Progress."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, amount)

    def close(self) -> None:
        """See Progress."""
        if self._bar is not None:
            self._finish_phase()
            self._bar.stop()
            self._bar = self._task = None

    def _finish_phase(self) -> None:
        """Fill the bar of a phase whose total was not known, so that it stops pulsing."""
        if self._bar is not None and self._task is not None:
            task = self._bar.tasks[self._bar.task_ids.index(self._task)]
            if task.total is None:
                self._bar.update(self._task, total=max(task.completed, 1), completed=max(task.completed, 1))


def make_progress(stream: TextIO | None = None) -> Progress:
    """The progress display that suits `stream` (standard error by default)."""
    stream = stream or sys.stderr
    return RichProgress(stream) if stream.isatty() else PlainProgress(stream)


def _mb(amount: int) -> str:
    return f"{amount / 1e6:.1f} MB"
