"""PerfWindow and RollingWindow: exact numbers on made-up steps, and the files they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eco_llm.files import replacing, write_json
from eco_llm.perf.phases import StepTimes
from eco_llm.perf.window import GpuState, PerfWindow, RollingWindow, rates


def step(number: int, scale: float = 1.0, ended_at: float | None = None) -> StepTimes:
    ended = 1000.0 + number if ended_at is None else ended_at
    return StepTimes(
        step=number, phase_data_s=0.5 * scale, phase_forward_s=2.0 * scale, phase_backward_s=5.0 * scale,
        phase_opt_step_s=1.0 * scale, phase_zero_grad_s=0.5 * scale, phase_optim_s=6.5 * scale,
        phase_train_s=8.5 * scale, core_step_time_s=9.5 * scale, step_time_s=10.0 * scale,
        data_host_s=0.25 * scale, started_at=ended - 10.0 * scale, ended_at=ended,
    )  # fmt: skip


def test_window_leaves_out_warmup_and_stops_after_its_last_step() -> None:
    window = PerfWindow(2, 3, 100, mode="host", sync_boundaries=False)
    assert [window.add(step(n)) for n in range(1, 8)] == [False, False, False, False, True, False, False]
    report = window.report({})
    assert (report["first_step"], report["last_step"], report["measure_steps"]) == (3, 5, 3)
    assert [sample["step"] for sample in report["samples"]] == [3, 4, 5]


def test_average_rates_are_total_tokens_over_total_time() -> None:
    window = PerfWindow(0, 2, 1000, mode="events", sync_boundaries=True)
    window.add(step(1, scale=1.0), GpuState(80.0))
    window.add(step(2, scale=3.0), validated=True)
    report = window.report({"device": "cuda"})
    assert report["avg_effective_tokens_per_s"] == pytest.approx(2000 / 40.0)
    assert report["avg_core_tokens_per_s"] == pytest.approx(2000 / 38.0)
    assert report["avg_effective_tokens_per_s"] != pytest.approx((100.0 + 100 / 3) / 2)  # the mean of rates
    assert report["avg_step_time_s"] == pytest.approx(20.0)
    assert report["avg_core_step_time_s"] == pytest.approx(19.0)
    phases = {"data": 1.0, "forward": 4.0, "backward": 10.0, "opt_step": 2.0, "zero_grad": 1.0}
    for name, seconds in {**phases, "optim": 13.0, "train": 17.0}.items():
        assert report[f"avg_phase_{name}_s"] == pytest.approx(seconds)
    assert (report["avg_gpu_util_percent"], report["gpu_util_samples"]) == (80.0, 1)
    assert report["validations_in_window"] == 1
    assert (report["device_time_mode"], report["sync_boundaries"]) == ("events", True)
    assert report["environment"] == {"device": "cuda"}
    assert report["started"] == "1970-01-01T00:16:31.000+00:00"
    assert report["ended"] == "1970-01-01T00:16:42.000+00:00"


def test_unknown_utilisation_is_null_not_zero() -> None:
    window = PerfWindow(0, 1, 1, mode="host", sync_boundaries=False)
    window.add(step(1))
    for key in ("avg_gpu_util_percent", "avg_gpu_power_watts", "gpu_memory_used_gib"):
        assert window.report({})[key] is None


def test_incomplete_window_has_no_report(tmp_path: Path) -> None:
    window = PerfWindow(0, 2, 1, mode="host", sync_boundaries=False)
    window.add(step(1))
    with pytest.raises(RuntimeError, match="1 of 2"):
        window.write(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_rates_of_one_step() -> None:
    assert rates(step(1), 190) == {"core_tokens_per_s": 20.0, "effective_tokens_per_s": 19.0}


def test_bottlenecks_are_shares_of_the_step_sorted() -> None:
    window = RollingWindow(100, mode="host", sync_boundaries=False)
    for n in range(4):
        window.add(step(n))
    report = window.report({}, {"rows": []})
    assert [(s["stage"], s["percent"]) for s in report["stages"]] == [
        ("train", pytest.approx(85.0)), ("data", pytest.approx(5.0)), ("other", pytest.approx(5.0)),
        ("loop", pytest.approx(5.0)),
    ]  # fmt: skip
    assert report["dominant_stage"] == "train"
    assert [s["stage"] for s in report["optimizer_phase"]] == ["backward", "opt_step", "zero_grad"]
    assert report["optimizer_phase"][0]["percent"] == pytest.approx(100 * 5 / 6.5)
    assert report["optimizer_phase"][0]["avg_seconds"] == pytest.approx(5.0)
    assert [(s["stage"], s["percent"]) for s in report["train_phase"]] == [
        ("optim", pytest.approx(100 * 6.5 / 8.5)),
        ("forward", pytest.approx(100 * 2 / 8.5)),
    ]
    assert report["avg_effective_tokens_per_s"] == pytest.approx(10.0)
    assert report["profiler"] == {"rows": []}


def test_old_steps_leave_the_rolling_window_and_memory_is_bounded() -> None:
    window = RollingWindow(1, mode="host", sync_boundaries=False, seconds=600.0)
    for n in range(20_000):  # 2,000 seconds, ten steps each
        window.add(step(n, scale=0.01, ended_at=n / 10), GpuState(gpu_power_watts=n, gpu_memory_used_gib=20_000 - n))
    report = window.report({})
    assert report["avg_gpu_power_watts"] == pytest.approx((13_990 + 19_999) / 2)
    assert report["gpu_memory_used_gib"] == 20_000 - 13_990
    assert (report["first_step"], report["last_step"]) == (13_990, 19_999)
    assert report["steps"] == 6010
    assert len(window._buckets) == 601


def test_a_step_longer_than_the_window_is_still_reported() -> None:
    window = RollingWindow(1, mode="host", sync_boundaries=False, seconds=600.0)
    window.add(step(1, ended_at=0.0))
    window.add(step(2, ended_at=5000.0))
    assert (window.report({})["first_step"], window.report({})["steps"]) == (2, 1)


def test_empty_rolling_window_has_no_report() -> None:
    with pytest.raises(RuntimeError, match="no step"):
        RollingWindow(1, mode="host", sync_boundaries=False).report({})


def test_files_are_strict_json_where_the_report_says(tmp_path: Path) -> None:
    window = PerfWindow(0, 1, 1, mode="host", sync_boundaries=False)
    window.add(step(1))
    rolling = RollingWindow(1, mode="host", sync_boundaries=False)
    rolling.add(step(1))
    assert window.write(tmp_path / "perf", {}) == tmp_path / "perf" / "baseline_throughput.json"
    assert rolling.write(tmp_path / "perf", {}) == tmp_path / "perf" / "window_10m_bottlenecks.json"
    for path in (tmp_path / "perf").iterdir():
        json.loads(path.read_text(encoding="utf-8"))


def test_write_json_replaces_whole_files_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"é": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})
    with pytest.raises(OSError, match="disk"):
        _fail_half_way(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def _fail_half_way(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise OSError("disk full")
