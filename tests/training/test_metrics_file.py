"""metrics.jsonl: strict JSON, on the disk line by line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eco_llm.training.hooks import metrics_file
from eco_llm.training.hooks.metrics_file import MetricsFile
from eco_llm.training.run_directory import RunDirectory


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=refuse) for line in path.read_bytes().decode("ascii").split("\n")[:-1]]


def test_every_record_is_a_line_that_can_be_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    hook = MetricsFile(path)
    records = [{"step": i, "loss": i / 7, "gpu_util_percent": None, "note": "é\u2028\n"} for i in range(1, 4)]
    for i, record in enumerate(records, 1):
        hook.on_record(record)
        assert read(path) == records[:i]  # before anything is closed
    hook.on_end()
    hook.on_end()
    assert path.read_bytes().count(b"\n") == 3


def test_what_is_not_finite_is_a_string(tmp_path: Path) -> None:
    hook = MetricsFile(tmp_path / "m")
    record = {"step": 1, "loss": math.nan, "up": math.inf, "np": np.float64("nan"), "deep": {"list": [-math.inf, 1.5]}}
    hook.on_record(record)
    hook.on_end()
    assert read(tmp_path / "m") == [
        {"step": 1, "loss": "nan", "up": "inf", "np": "nan", "deep": {"list": ["-inf", 1.5]}}
    ]
    assert math.isnan(record["loss"])  # type: ignore[arg-type]  # other hooks get the number


def test_a_refused_record_leaves_no_half_line(tmp_path: Path) -> None:
    hook = MetricsFile(tmp_path / "m")
    with pytest.raises(TypeError):
        hook.on_record({"step": 1, "loss": torch.tensor(1.0)})  # writing it would wait for the device
    hook.on_record({"step": 1})
    hook.on_end()
    assert read(tmp_path / "m") == [{"step": 1}]


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        hook = MetricsFile(tmp_path / "m")
        hook.on_record({"step": step})
        hook.on_end()
    assert read(tmp_path / "m") == [{"step": 1}, {"step": 2}]


def test_after_a_torn_line_and_a_rewind_every_line_is_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics_file.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    run.rewind_metrics(1)
    hook = MetricsFile(run.metrics_file)
    hook.on_record({"step": 2})
    hook.on_end()
    assert read(run.metrics_file) == [{"step": 1}, {"step": 2}]


def test_a_checkpoint_makes_the_log_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(metrics_file.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    hook = MetricsFile(tmp_path / "m")
    hook.on_record({"step": 1})
    assert synced == []
    hook.on_checkpoint(1)
    hook.on_end()
    assert synced == [len(b'{"step": 1}\n')]
