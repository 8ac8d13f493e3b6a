"""What a person sees, in a log and in a terminal."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from rich.console import Console

from eco_llm.training.hooks import progress
from eco_llm.training.hooks.progress import ProgressDisplay


def record(step: int, *, tokens_per_step: int = 100, **values: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": 10.0 / step, "lr": 1e-3, "step_time_s": 0.5, "tokens": step * tokens_per_step,
        **values,
    }  # fmt: skip


class Screen:
    """A display of which the output can be read; time stands still unless moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, terminal: bool, log_interval: int = 1) -> None:
        self.file = io.StringIO()
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)
        console = Console(file=self.file, force_terminal=terminal, width=100, soft_wrap=True, highlight=False)
        self.display = ProgressDisplay(log_interval, console)

    def text(self) -> str:
        """The output without escape sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.file.getvalue())

    def lines(self) -> list[str]:
        return self.text().splitlines()


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=False, log_interval=5)
    screen.display.on_start(1, 12)
    for step in range(1, 13):
        screen.now += 2
        screen.display.on_record(record(step))
    screen.display.on_end()
    assert screen.file.getvalue().isascii()
    assert "\x1b" not in screen.file.getvalue()
    assert screen.lines() == [
        "step      5/12  loss 2.0000  200 tok/s  lr 1.00e-03  ETA 0:14",
        "step     10/12  loss 1.0000  200 tok/s  lr 1.00e-03  ETA 0:04",
        "step     12/12  loss 0.8333  200 tok/s  lr 1.00e-03  ETA 0:00",  # the last step, due or not
    ]


def test_speed_is_that_of_the_steps_since_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=False, log_interval=2)
    screen.display.on_start(1, 100)
    for step, seconds in ((1, 1.0), (2, 3.0), (3, 0.1), (4, 0.1)):
        screen.display.on_record(record(step, tokens_per_step=1000, step_time_s=seconds))
    assert [re.search(r"([\d,]+) tok/s", line).group(1) for line in screen.lines()] == ["500", "10,000"]  # type: ignore[union-attr]


def test_time_left_after_a_resume_counts_this_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=False)
    screen.display.on_start(901, 1000)
    screen.now += 90  # ten steps of nine seconds, 90 to go
    screen.display.on_record(record(910))
    assert screen.lines()[-1].endswith("ETA 13:30")
    screen.now = 1000.0 + 20 * 3600
    screen.display.on_record(record(920))
    assert screen.lines()[-1].endswith(" ETA 80:00:00")


def test_a_validation_is_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=False, log_interval=100)
    screen.display.on_start(1, 50)
    screen.display.on_record(record(1))
    assert screen.lines() == []
    screen.display.on_record(record(2, val_loss=1.23456, val_bits_per_byte=0.98765))
    assert len(screen.lines()) == 2
    assert screen.lines()[1] == "step      2/50  validation loss 1.2346  0.9877 bits/byte"


def test_a_loss_that_is_not_finite_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=False)
    screen.display.on_start(1, 5)
    screen.display.on_record(record(1, loss=math.nan))
    assert "loss nan" in screen.text()


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_messages_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch, terminal: bool, started: bool) -> None:
    screen = Screen(monkeypatch, terminal=terminal)
    if started:
        screen.display.on_start(1, 5)
    text = "x = y[:b:] if [red] else [/red]  # :smile: " + "long " * 40 + "end"  # a sample of code, markup or not
    screen.display.on_message(text)
    screen.display.on_end()
    assert text in screen.lines()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=True, log_interval=2)
    screen.display.on_start(3, 6)
    for step in range(3, 6):
        screen.display.on_record(record(step))
    screen.display.on_record(record(6, val_loss=1.5, val_bits_per_byte=1.25))
    screen.display.on_message("saved")
    screen.display.on_end()
    screen.display.on_end()
    assert "step      6/6  validation loss 1.5000  1.2500 bits/byte" in screen.lines()
    assert "saved" in screen.lines()
    last = screen.lines()[-1]
    assert last.startswith("step 6/6")
    assert "loss 1.6667  200 tok/s" in last
    assert screen.file.getvalue().count("\x1b[?25l") == screen.file.getvalue().count("\x1b[?25h") > 0  # cursor is back


def test_the_default_console_writes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay(1)
    display.on_start(1, 1)
    display.on_record(record(1))
    display.on_message("word " * 60 + "end")
    display.on_end()
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2  # long lines are not folded
    assert out[0].startswith("step      1/1  loss 10.0000")


def test_a_sample_keeps_its_tabs_and_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    text = "def f():\n\treturn '\x07\x0c'\t# 1\n"
    ProgressDisplay(1).on_message(text)
    assert capsys.readouterr().out == text + "\n"
