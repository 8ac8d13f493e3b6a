"""What a person sees: a live bar in a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eco_llm.training.hooks.base import Hook


class _Screen(Console):
    """Standard output. A run goes on when the `tee` or `less` that showed it has gone."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):  # what Rich does after it has turned the output off
            super().on_broken_pipe()


class ProgressDisplay(Hook):
    """Loss, tokens a second and the time left; validation results and messages as lines of their own."""

    def __init__(self, log_interval: int, console: Console | None = None) -> None:
        self._console = console or _Screen(file=sys.stdout, highlight=False, soft_wrap=True)
        self._interval = log_interval
        self._bar: Progress | None = None
        self._last_step = 0
        self._steps, self._seconds = 0, 0.0  # since the last line

    def on_start(self, first_step: int, last_step: int) -> None:
        """Open the bar."""
        self._last_step = last_step
        self._started = time.perf_counter()
        self._first_step = first_step
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
                TimeRemainingColumn(), console=self._console, transient=False,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=last_step, completed=first_step - 1)
            self._bar.start()

    def on_record(self, record: dict[str, Any]) -> None:
        """Show one step; a line every `log_interval` steps and at the last."""
        step = record["step"]
        self._steps, self._seconds = self._steps + 1, self._seconds + record["step_time_s"]
        if step % self._interval == 0 or step == self._last_step or "val_loss" in record:
            speed = record["tokens"] / step * self._steps / self._seconds
            self._steps, self._seconds = 0, 0.0
            text = f"loss {record['loss']:.4f}  {speed:,.0f} tok/s"
            if self._bar is None:
                self._line(f"step {step:>6}/{self._last_step}  {text}  lr {record['lr']:.2e}  ETA {self._eta(step)}")
            else:
                self._bar.update(self._task, completed=step, description=text)
        elif self._bar is not None:
            self._bar.update(self._task, completed=step)
        if "val_loss" in record:
            bits = record["val_bits_per_byte"]
            self._line(
                f"step {step:>6}/{self._last_step}  validation loss {record['val_loss']:.4f}  {bits:.4f} bits/byte"
            )

    def on_message(self, text: str) -> None:
        """Show a message above the bar."""
        self._line(text)

    def on_end(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal has gone
                self._bar.stop()
            self._bar = None

    def _line(self, text: str) -> None:
        try:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, emoji=False)
            elif not self._console.quiet:
                # Not through Rich, which expands the tabs of a sample and drops its control characters.
                self._console.file.write(text + "\n")
                self._console.file.flush()
        except BrokenPipeError:
            self._console.on_broken_pipe()
        except OSError:  # a closed terminal, a full disk under a redirected log: no reason to stop training
            self._console.quiet = True

    def _eta(self, step: int) -> str:
        done = step - self._first_step + 1
        left = (time.perf_counter() - self._started) / done * (self._last_step - step)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
