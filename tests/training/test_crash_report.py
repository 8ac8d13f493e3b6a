"""Crash reports: strict JSON whatever happened, never one over another, and out-of-memory told apart."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eco_llm.config import TrainConfig, to_dict
from eco_llm.training import crash
from eco_llm.training.crash import write_crash_report
from eco_llm.training.outcome import Outcome, is_out_of_memory


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def report_of(folder: Path, error: BaseException, **kwargs: Any) -> dict[str, Any]:
    """Write a report and read it back as strict JSON."""
    arguments: dict[str, Any] = {"step": 7, "last_record": None, "config": {}} | kwargs
    path = write_crash_report(folder, error, **arguments)
    assert path.parent == folder
    report = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert isinstance(report, dict)
    return report


def raised(function: Any, *arguments: Any) -> BaseException:
    """What calling `function` raises, traceback included."""
    try:
        function(*arguments)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_the_report_tells_what_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["eco_train", "--steps", "3"])
    record = {"step": 6, "loss": 1.5}
    report = report_of(tmp_path / "errors", raised(int, "seven"), last_record=record, config=to_dict(TrainConfig()))
    assert (report["kind"], report["exception"], report["step"]) == ("exception", "ValueError", 7)
    assert "seven" in report["message"]
    assert any("in raised" in line for line in report["traceback"])
    assert report["last_metrics"] == record
    assert report["config"]["training"]["steps"] == 1000
    assert report["command"] == ["eco_train", "--steps", "3"]
    assert 0 < report["memory"]["host_resident_bytes"] < report["memory"]["host_total_bytes"]
    assert report["versions"]["torch"] == torch.__version__


def test_the_cause_is_in_the_trace(tmp_path: Path) -> None:
    def fail() -> None:
        try:
            int("inner")
        except ValueError as error:
            raise RuntimeError("outer") from error

    text = "".join(report_of(tmp_path, raised(fail))["traceback"])
    assert "inner" in text
    assert "outer" in text


def test_numbers_that_are_not_json(tmp_path: Path) -> None:
    record = {"loss": math.nan, "deep": [{"norm": -math.inf}], "np": np.float64("inf"), "t": torch.tensor(1), ("k",): 1}
    report = report_of(tmp_path, ValueError("x"), last_record=record, config={"path": Path("p"), "lr": math.inf})
    assert report["last_metrics"] == {
        "loss": "nan", "deep": [{"norm": "-inf"}], "np": "inf", "t": "tensor(1)", "('k',)": 1,
    }  # fmt: skip
    assert report["config"] == {"path": repr(Path("p")), "lr": "inf"}


def test_a_command_line_that_is_no_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["eco_train", "caf\udce9"])
    assert report_of(tmp_path, ValueError("\udcff"))["command"] == ["eco_train", "caf\udce9"]


def test_crashes_of_one_second_do_not_overwrite_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash.time, "strftime", lambda form: "20260101T000000")
    paths = [write_crash_report(tmp_path, ValueError(str(i)), step=7, last_record=None, config={}) for i in range(3)]
    assert len(set(paths)) == 3
    assert [json.loads(p.read_text(encoding="utf-8"))["message"] for p in paths] == ["0", "1", "2"]
    assert all(p.match("crash_*.json") for p in paths)


def test_a_dead_device_is_reported_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", dead)
    memory = report_of(tmp_path, ValueError("x"))["memory"]
    assert memory["device_allocated_bytes"] == 5
    assert "illegal memory access" in memory["device_error"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 2))
    memory = report_of(tmp_path, ValueError("x"))["memory"]
    assert (memory["device_free_bytes"], memory["device_total_bytes"]) == (1, 2)
    assert "device_error" not in memory


# -- out of memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(1 << 50, dtype=torch.uint8), lambda: np.empty(1 << 50), lambda: [None] * (1 << 60)],
    ids=["torch", "numpy", "python"],
)
def test_memory_that_this_machine_does_not_have(tmp_path: Path, allocate: Any) -> None:
    error = raised(allocate)
    assert is_out_of_memory(error)
    assert report_of(tmp_path, error)["kind"] == "out_of_memory"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        torch.cuda.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."),  # Windows
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_other_ways_to_say_so(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
        ValueError("out of memory"),
        OSError(28, "No space left on device"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_not_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_exit_codes() -> None:
    assert {o.name: int(o) for o in Outcome} == {
        "DONE": 0, "CRASHED": 1, "OUT_OF_MEMORY": 3, "NOT_FINITE": 4,
            "HUNG_UP": 129, "INTERRUPTED": 130, "TERMINATED": 143,
    }  # fmt: skip


@pytest.mark.gpu
def test_a_gpu_that_is_full(tmp_path: Path) -> None:
    error = raised(lambda: torch.empty(1 << 50, dtype=torch.uint8, device="cuda"))
    report = report_of(tmp_path, error)
    assert (report["kind"], report["exception"]) == ("out_of_memory", "OutOfMemoryError")
    assert report["memory"]["device_total_bytes"] > report["memory"]["device_allocated_bytes"]


@pytest.mark.gpu
def test_a_gpu_that_is_dead(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, torch\n"
        "from eco_llm.training.crash import write_crash_report\n"
        "try:\n"
        "    kept = torch.zeros(2, device='cuda')\n"
        "    kept[torch.tensor([99], device='cuda')].tolist()\n"  # a device-side assertion
        "except Exception as error:\n"
        "    write_crash_report(pathlib.Path(sys.argv[1]), error, step=1, last_record=None, config={})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    (path,) = tmp_path.glob("crash_*.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    assert "device-side assert" in report["message"], done.stderr
    assert "device-side assert" in report["memory"]["device_error"]
    assert report["memory"]["device_allocated_bytes"] > 0
