"""The loop keeps a device busy: on a stand-in device with a clock that only moves when somebody works or waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stand_in_trainer import output_of, stand_in_trainer

from eco_llm.perf.phases import PhaseTimer
from eco_llm.training import checkpoint
from eco_llm.training.hooks.base import Hook
from eco_llm.training.outcome import Outcome
from eco_llm.training.scalars import AsyncScalars
from eco_llm.training.step import StepOutput

STEP_S, RECORD_S, LAUNCH_S = 1.0, 0.1, 0.05
"""Of a step on the device; on the host, of a record's delivery and of a launch."""


class Device:
    """Does what is launched, in order. `idle_s` is how long it had nothing to do since the last `synchronize`."""

    def __init__(self) -> None:
        self.now = self.free_at = self.idle_s = 0.0
        self.most_ahead = 0

    def launch(self) -> None:
        self.now += LAUNCH_S
        self.idle_s += max(0.0, self.now - self.free_at)
        self.free_at = max(self.now, self.free_at) + STEP_S
        self.most_ahead = max(self.most_ahead, round((self.free_at - self.now) / STEP_S))

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)

    def mark(self) -> Mark:
        return Mark(self)


class Mark:
    """A CUDA event on the stand-in, for the timer and for AsyncScalars."""

    def __init__(self, device: Device) -> None:
        self.device, self.time = device, 0.0

    def record(self) -> None:
        self.time = max(self.device.now, self.device.free_at)

    def reached(self) -> bool:
        return self.device.now >= self.time

    def wait(self) -> None:
        self.device.wait(self.time)

    def seconds_since(self, earlier: Mark) -> float:
        return self.time - earlier.time

    query, synchronize = reached, wait


class Watcher(Hook):
    """Takes its time over a record; before some steps waits until the device is idle, as `eco_train compare` does."""

    def __init__(self, device: Device, stops: tuple[int, ...]) -> None:
        self.device, self.stops = device, stops
        self.records: list[dict[str, Any]] = []
        self.idle_s: list[float] = []

    def on_step(self, step: int) -> None:
        if step in self.stops:
            self.idle_s.append(self.device.idle_s)
            self.device.wait(self.device.free_at)
            self.device.idle_s = -LAUNCH_S  # what the first launch must cost it

    def on_record(self, record: dict[str, Any]) -> None:
        self.device.now += RECORD_S
        self.records.append(record)

    def on_end(self) -> None:
        self.idle_s.append(self.device.idle_s)


def test_the_device_never_waits_for_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty steps, after which a host that ran ahead at will would have fifty records to deliver before it launches."""
    device = Device()
    watcher = Watcher(device, stops=(1, 61))
    timer = PhaseTimer("cpu", make_mark=device.mark, host_clock=lambda: device.now, wall_clock=lambda: device.now)

    def run() -> StepOutput:
        with timer.phase("forward"):
            device.launch()
        return output_of(2.0)

    def on_stand_in(self: AsyncScalars, size: int) -> tuple[torch.Tensor, Mark]:
        return torch.empty(size), device.mark()

    monkeypatch.setattr(AsyncScalars, "_buffer", on_stand_in)
    monkeypatch.setattr(checkpoint, "save", lambda *args, **kwargs: None)
    trainer = stand_in_trainer(run, timer, [watcher], steps=120)
    trainer._scalars._cuda = True
    assert trainer.fit() == Outcome.DONE
    assert watcher.idle_s[1:] == [pytest.approx(0.0, abs=1e-9)] * 2
    assert 2 <= device.most_ahead <= 10
    rows = watcher.records
    assert [r["step"] for r in rows] == list(range(1, 121))
    assert [r["core_step_time_s"] for r in rows[1:60]] == [pytest.approx(STEP_S)] * 59
    assert [r["step_time_s"] for r in rows[1:60]] == [pytest.approx(STEP_S)] * 59  # records cost the device nothing
    whole = rows[-1]["step_time_s"] + sum(r["step_time_s"] for r in rows[:-1])
    assert whole == pytest.approx(device.free_at, abs=1e-6)
