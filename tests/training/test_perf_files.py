"""The perf hook: what is written when, and which steps are profiled."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eco_llm.config import PerfConfig
from eco_llm.perf.phases import PhaseTimer, StepTimes
from eco_llm.training.hooks.perf_window import PerfFiles

BASELINE, BOTTLENECKS, TRACE = "baseline_throughput.json", "window_10m_bottlenecks.json", "trace.json.gz"


class Run:
    """A hook fed with made-up steps of one second, 0.8 s of it in the core."""

    def __init__(self, folder: Path, *, warmup: int = 1, measure: int = 2, profiled: int = 0, enable: bool = True):
        self.folder = folder
        self.said: list[str] = []
        config = PerfConfig(
            perf_profile_enable=enable,
            perf_warmup_steps=warmup,
            perf_measure_steps=measure,
            perf_profiler_steps=profiled,
        )
        self.timer = PhaseTimer("cpu")
        self.hook = PerfFiles(
            config, folder, self.timer, device="cpu", tokens_per_step=100, environment={"gpu": None},
            say=self.said.append, memory=lambda: {"process_rss_gib": 1.5},
        )  # fmt: skip

    def train(self, first: int, last: int, *, late: int = 1, stop_after: int | None = None) -> Run:
        """Steps `first` to `last`, records `late` steps behind as in training; work is done between on_step calls."""
        self.hook.on_start(first, last)
        end = stop_after or last
        for step in range(first, end + 1):
            self.hook.on_step(step)
            torch.ones(4).exp().sum().item()
            self.hook.on_step_end(step)
            if step - late >= first:
                self.hook.on_record(self.record(step - late))
        for step in range(max(first, end - late + 1), end + 1):
            self.hook.on_record(self.record(step))
        self.hook.on_end()
        return self

    @staticmethod
    def record(step: int) -> dict[str, Any]:
        times = StepTimes(
            step=step, phase_data_s=0.1, phase_forward_s=0.2, phase_backward_s=0.3, phase_opt_step_s=0.1,
            phase_zero_grad_s=0.05, phase_optim_s=0.45, phase_train_s=0.65, core_step_time_s=0.8, step_time_s=1.0,
            data_host_s=0.1, started_at=1e9 + step, ended_at=1e9 + step + 1,
        )  # fmt: skip
        return {**dataclasses.asdict(times), "loss": 1.0, "gpu_util_percent": 50.0 + step, "tokens": 100 * step}

    def read(self, name: str) -> dict[str, Any]:
        content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content

    def written(self) -> set[str]:
        return {p.name for p in self.folder.iterdir()} if self.folder.exists() else set()


def test_a_complete_window(tmp_path: Path) -> None:
    run = Run(tmp_path, warmup=3, measure=4).train(1, 9)
    report = run.read(BASELINE)
    assert (report["first_step"], report["last_step"], report["warmup_steps"], report["measure_steps"]) == (4, 7, 3, 4)
    assert report["avg_effective_tokens_per_s"] == pytest.approx(100.0)
    assert report["avg_core_tokens_per_s"] == pytest.approx(125.0)
    assert report["avg_phase_optim_s"] == pytest.approx(0.45)
    assert report["avg_gpu_util_percent"] == pytest.approx(55.5)
    assert report["environment"] == {"gpu": None}
    assert report["device_time_mode"] == "host"
    assert report["profiled_steps_in_window"] == 0
    assert report["validations_in_window"] == 0
    assert report["memory"] == {"process_rss_gib": 1.5}
    assert [s["step"] for s in report["samples"]] == [4, 5, 6, 7]
    assert run.said == [f"perf window of 4 steps: 100.0 tokens/s effective, 125.0 core → {BASELINE}"]
    rolling = run.read(BOTTLENECKS)
    assert rolling["memory"] == {"process_rss_gib": 1.5}
    assert rolling["avg_gpu_util_percent"] == pytest.approx(55.0)
    assert rolling["avg_gpu_power_watts"] is None
    assert (rolling["steps"], rolling["first_step"], rolling["last_step"], rolling["profiler"]) == (9, 1, 9, None)
    assert run.written() == {BASELINE, BOTTLENECKS}


def test_a_window_of_one_step_without_warmup_and_without_a_folder(tmp_path: Path) -> None:
    run = Run(tmp_path / "perf", warmup=0, measure=1).train(1, 1)
    assert run.read(BASELINE)["samples"][0]["step"] == 1


def test_the_window_of_a_resumed_run_begins_with_it(tmp_path: Path) -> None:
    run = Run(tmp_path).train(101, 105)
    assert (run.read(BASELINE)["first_step"], run.read(BASELINE)["last_step"]) == (102, 103)


def test_a_window_that_cannot_be_finished(tmp_path: Path) -> None:
    run = Run(tmp_path, warmup=5, measure=5).train(11, 13)
    assert run.said == ["perf window: only 3 steps are left; it will not be complete"]
    assert run.written() == {BOTTLENECKS}
    assert run.read(BOTTLENECKS)["steps"] == 3


def test_without_the_flag_only_the_rolling_file_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path, enable=False, profiled=2).train(1, 5)
    assert run.written() == {BOTTLENECKS}
    assert run.said == []


@pytest.mark.parametrize("profiled", [0, 2])
def test_no_record_no_file(tmp_path: Path, profiled: int) -> None:
    run = Run(tmp_path / "perf", profiled=profiled)
    run.hook.on_start(1, 9)
    run.hook.on_end()
    assert run.written() == set()
    Run(tmp_path / "perf", profiled=profiled).hook.on_end()  # training never started
    assert run.written() == set()


def test_the_rolling_file_is_rewritten_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("eco_llm.training.hooks.perf_window.time.monotonic", lambda: now)
    run = Run(tmp_path, enable=False)
    run.hook.on_start(1, 99)
    seen = []
    for step, now in ((1, 1000.0), (2, 1020.0), (3, 1031.0), (4, 1060.0), (5, 1062.0)):  # noqa: B007
        run.hook.on_record(run.record(step))
        seen.append(run.read(BOTTLENECKS)["steps"])
    assert seen == [1, 1, 3, 3, 5]
    run.hook.on_end()


@pytest.mark.parametrize(
    ("last", "inside", "said"), [(9, 2, "; 2 validations inside"), (6, 1, "; 1 validation inside")]
)
def test_validations_inside_the_window_are_named(tmp_path: Path, last: int, inside: int, said: str) -> None:
    """That of the run's last step comes after it, and counts in no window."""
    run = Run(tmp_path, warmup=1, measure=5)
    run.hook.on_start(1, last)
    for step in range(1, last + 1):
        scored = {"val_loss": 2.0} if step in (1, 4, 6) else {}
        run.hook.on_record(run.record(step) | scored)
    assert run.read(BASELINE)["validations_in_window"] == inside
    assert said in run.said[-1]


def test_what_nvml_says_of_memory_and_power_reaches_both_files(tmp_path: Path) -> None:
    run = Run(tmp_path, warmup=1, measure=2)
    run.hook.on_start(1, 4)
    gpu = {1: (3.0, 100.0), 2: (5.0, 300.0), 3: (4.0, 200.0), 4: (None, None)}
    for step, (memory, power) in gpu.items():
        known = {} if memory is None else {"gpu_memory_used_gib": memory, "gpu_power_watts": power}
        run.hook.on_record(run.record(step) | known)
    run.hook.on_end()
    window, rolling = run.read(BASELINE), run.read(BOTTLENECKS)
    assert (window["avg_gpu_power_watts"], window["gpu_memory_used_gib"]) == (250.0, 5.0)
    assert (rolling["avg_gpu_power_watts"], rolling["gpu_memory_used_gib"]) == (200.0, 5.0)
    assert window["samples"][1]["gpu_power_watts"] == 200.0


# -- the profiler ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "warmup", "measure", "profiled", "in_trace", "in_window"),
    [
        (1, 20, 3, 5, 4, range(9, 13), 0),  # room after the window
        (1, 12, 3, 5, 4, range(9, 13), 0),  # just enough
        (1, 11, 3, 5, 4, range(8, 12), 1),  # one short
        (1, 3, 1, 2, 2, range(2, 4), 2),  # the report's run
        (1, 3, 1, 2, 3, range(1, 4), 2),  # reaches into the warm-up, which is no part of the window
        (1, 3, 0, 3, 9, range(1, 4), 3),  # more than there are
        (101, 110, 2, 3, 2, range(106, 108), 0),  # resumed
        (101, 103, 1, 5, 2, range(102, 104), 2),  # resumed; the window stays incomplete
        (101, 102, 9, 5, 2, range(101, 103), 0),  # resumed; it does not even begin
    ],
)  # fmt: skip
def test_which_steps_are_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, last: int, warmup: int, measure: int, profiled: int,
    in_trace: range, in_window: int,
) -> None:  # fmt: skip
    run = Run(tmp_path, warmup=warmup, measure=measure, profiled=profiled)
    traced: list[int] = []
    at = [0]
    profiler = run.hook._profiler
    assert profiler is not None
    on_step = run.hook.on_step

    def watched(step: int) -> None:
        on_step(step)
        at[0] = step
        if run.timer.annotate:  # set while the profiler runs
            traced.append(step)

    monkeypatch.setattr(run.hook, "on_step", watched)
    run.train(first, last)
    assert traced == list(in_trace)
    assert (tmp_path / TRACE).stat().st_size > 0
    table = run.read(BOTTLENECKS)["profiler"]
    assert table["steps"] == len(in_trace)
    assert table["trace"] == TRACE
    if warmup + measure <= last - first + 1:
        assert run.read(BASELINE)["profiled_steps_in_window"] == in_window
    else:
        assert BASELINE not in run.written()
    assert any(f"its last {in_window} are profiled" in text for text in run.said) == (in_window > 0)
    # Traced steps are slow: they count in the rolling file only where they could not be kept apart from the window.
    apart = in_trace.start == first + warmup + measure
    assert run.read(BOTTLENECKS)["steps"] == last - first + 1 - (len(in_trace) if apart else 0)


def test_a_run_that_ends_early_keeps_its_trace(tmp_path: Path) -> None:
    run = Run(tmp_path, warmup=1, measure=2, profiled=5).train(1, 20, stop_after=5)
    assert run.read(BOTTLENECKS)["profiler"]["steps"] == 2
    assert (tmp_path / TRACE).exists()
    assert not run.timer.annotate


def test_a_run_that_ends_before_the_profiled_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, warmup=1, measure=2, profiled=5).train(1, 20, stop_after=2)
    assert run.read(BOTTLENECKS)["profiler"] is None
    assert run.written() == {BOTTLENECKS}
