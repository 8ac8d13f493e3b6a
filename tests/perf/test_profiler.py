"""StepProfiler: the trace can be read, names the phases, and the table adds up."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from eco_llm.perf.phases import PhaseTimer
from eco_llm.perf.profiler import StepProfiler


def train(device: str, perf_dir: Path, steps: int, traced: int) -> tuple[StepProfiler, list[bool]]:
    timer = PhaseTimer(device)
    profiler = StepProfiler(traced, device, perf_dir, (timer,), rows=5)
    weight = torch.randn(64, 64, device=device, requires_grad=True)
    weight.sum().backward()
    profiler.start()
    finished = []
    for _ in range(steps):
        timer.begin_step()
        with timer.phase("forward"):
            loss = (weight @ weight).square().sum()
        with timer.phase("backward"):
            loss.backward()
        timer.mark_core_end()
        timer.end_step()
        finished.append(profiler.end_step())
    profiler.stop()
    assert not timer.annotate
    return profiler, finished


def check(profiler: StepProfiler, perf_dir: Path, operation: str) -> None:
    table = profiler.table
    assert table is not None
    json.dumps(table, allow_nan=False)
    assert [p.name for p in perf_dir.iterdir()] == [table["trace"]] == ["trace.json.gz"]
    with gzip.open(perf_dir / "trace.json.gz", "rt", encoding="utf-8") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert {"eco/forward", "eco/backward"} <= set(names)
    assert 0 < len(table["rows"]) <= 5
    milliseconds = [row["self_ms"] for row in table["rows"]]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert sum(milliseconds) <= table["total_ms"] * (1 + 1e-9)
    assert table["rows"][0]["percent"] == pytest.approx(100 * milliseconds[0] / table["total_ms"])
    assert any(operation in row["name"] for row in table["rows"])
    mebibytes = [row["self_mib"] for row in table["memory_rows"]]
    assert 0 < len(mebibytes) <= 5
    assert mebibytes == sorted(mebibytes, reverse=True)
    assert mebibytes[-1] > 0
    assert not any(row["name"].startswith("eco/") for row in table["rows"] + table["memory_rows"])


def test_traces_the_asked_steps_on_cpu(tmp_path: Path) -> None:
    profiler, finished = train("cpu", tmp_path, steps=4, traced=2)
    assert finished == [False, True, False, False]
    check(profiler, tmp_path, "aten::mm")
    assert profiler.table is not None
    assert (profiler.table["steps"], profiler.table["clock"]) == (2, "self_cpu_time")
    mm = next(row for row in profiler.table["rows"] if row["name"] == "aten::mm")
    assert mm["calls"] == 2 * 3  # one product forward and two backward, in each of two steps
    taken = next(row for row in profiler.table["memory_rows"] if row["name"] == "aten::mm")
    assert taken["self_mib"] == pytest.approx(2 * 3 * 64 * 64 * 4 / 2**20)


def test_training_that_ends_early_still_leaves_its_trace(tmp_path: Path) -> None:
    profiler, finished = train("cpu", tmp_path, steps=1, traced=5)
    assert finished == [False]
    assert profiler.table is not None
    assert profiler.table["steps"] == 1


def test_phases_are_not_named_without_a_profiler() -> None:
    timer = PhaseTimer("cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as trace:
        timer.begin_step()
        with timer.phase("forward"):
            torch.ones(3) + 1
    assert not [event for event in trace.key_averages() if event.key.startswith("eco/")]


@pytest.mark.gpu
def test_traces_kernels_on_cuda(tmp_path: Path) -> None:
    profiler, finished = train("cuda", tmp_path, steps=3, traced=2)
    assert finished == [False, True, False]
    assert profiler.table is not None
    assert profiler.table["clock"] == "self_device_time"
    assert not any(row["name"].startswith("aten::") for row in profiler.table["rows"]), "kernels, not operators"
    check(profiler, tmp_path, "")
