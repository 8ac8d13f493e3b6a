"""Claim helpers: comparisons are paired and interleaved, intervals cover the truth, evidence is complete."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    """A module of benchmarks/, which is a folder of scripts and no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


common = script("common")


def test_sides_alternate_after_warmup() -> None:
    calls: list[str] = []

    def side(name: str, value: float) -> Callable[[], float]:
        def measure() -> float:
            calls.append(name)
            return value

        return measure

    result = common.interleave(side("a", 2.0), side("b", 1.0), 3, warmup=2)
    assert "".join(calls) == "ababababab"
    assert (result.ratio, result.ratio_low, result.ratio_high) == (2.0, 2.0, 2.0)
    assert result.a == [2.0] * 3
    assert result.summary()["rounds"] == 3
    assert result.samples()[1] == {"round": 1, "a": 2.0, "b": 1.0}


def test_interval_covers_the_true_ratio_and_excludes_a_wrong_one() -> None:
    rng = np.random.default_rng(1)
    drift = iter(np.repeat(np.linspace(1.0, 1.5, 60), 2))  # both sides of a pair are slowed alike

    def side(mean: float) -> Callable[[], float]:
        return lambda: float(mean * rng.normal(1.0, 0.02) * next(drift))

    result = common.interleave(side(1.3), side(1.0), 60, warmup=0)
    assert result.ratio_low < result.ratio < result.ratio_high
    assert result.ratio_low < 1.3 < result.ratio_high
    assert result.ratio_low > 1.0


def test_useless_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rounds"):
        common.interleave(lambda: 1.0, lambda: 1.0, 1)
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            common.interleave(lambda: 1.0, lambda bad=bad: bad, 3)


def test_the_gate_stops_a_comparison_of_different_things() -> None:
    common.require_close(1.0, 1.0 + 1e-7, relative=1e-6)
    for wrong in (1.1, float("nan")):
        with pytest.raises(common.GateError, match="no speed"):
            common.require_close(1.0, wrong, relative=1e-6)


def test_seconds_of_synchronises_on_both_sides_of_the_work() -> None:
    order: list[str] = []
    measure = common.seconds_of(lambda: order.append("work"), lambda: order.append("sync"))
    assert measure() >= 0
    assert order == ["sync", "work", "sync"]


def test_hardware_slugs() -> None:
    cpu = {"logical_cores": 2, "vendor": "amd"}
    assert common.hardware_slug({"device": "cpu", "cpu": cpu, "gpu": None}) == "cpu-2c-amd"
    gpu = {"name": "NVIDIA H200"}
    assert common.hardware_slug({"device": "cuda:0", "cpu": cpu, "gpu": gpu}) == "nvidia-h200"
    with pytest.raises(ValueError, match="which"):
        common.hardware_slug({"device": "cuda", "cpu": cpu, "gpu": None})


def test_evidence_is_complete(tmp_path: Path) -> None:
    payload = {"summary": {"ratio": 1.5}, "samples": [{"round": 0, "a": 3.0, "b": 2.0}]}
    path = common.write_evidence("a_claim", payload, results=tmp_path)
    assert path.parent.parent == tmp_path
    assert path.parent.name.startswith("cpu-")
    evidence = json.loads(path.read_text(encoding="utf-8"))
    assert evidence["claim"] == "a_claim"
    assert evidence["summary"] == payload["summary"]
    assert evidence["samples"] == payload["samples"]
    assert set(evidence["processor_load"]) == {"before", "after"}
    if hasattr(os, "getloadavg"):
        assert all(0 <= load < 10_000 for load in evidence["processor_load"].values())
    assert {"date", "command", "commit", "dirty", "source_sha256", "versions", "cpu", "gpu"} <= set(
        evidence["environment"]
    )


@pytest.mark.parametrize(
    ("claim", "payload", "message"),
    [
        ("x", {"summary": {"a": 1}}, "no raw samples"),
        ("x", {"summary": {"a": 1}, "samples": []}, "no raw samples"),
        ("x", {"summary": {"a": 1}, "samples": "many"}, "no raw samples"),
        ("x", {"samples": [1]}, "no summary"),
        ("x", {"summary": {"a": 1}, "samples": [1], "environment": {}}, "filled in here"),
        ("x", {"summary": {"a": 1}, "samples": [1], "processor_load": {}}, "filled in here"),
        ("x", {"summary": {"a": float("nan")}, "samples": [1]}, "JSON"),
        ("../x", {"summary": {"a": 1}, "samples": [1]}, "lower-case"),
    ],
)
def test_worthless_evidence_is_refused(tmp_path: Path, claim: str, payload: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        common.write_evidence(claim, payload, results=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_evidence_of_a_gpu_names_it_though_this_process_did_no_work_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after start_time.py, whose trainings are processes of their own: torch is imported, CUDA not initialised."""
    import torch

    started: list[bool] = []
    card = {"name": "NVIDIA H200"}
    monkeypatch.setattr(torch.cuda, "init", lambda: started.append(True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(started))
    monkeypatch.setattr("eco_llm.perf.environment._gpu_of_torch", lambda torch, device: card)
    payload = {"summary": {"s": 1.0}, "samples": [{"s": 1.0}]}
    path = common.write_evidence("start", payload, device="cuda", results=tmp_path)
    assert path == tmp_path / "nvidia-h200" / "start.json"
    assert json.loads(path.read_text(encoding="utf-8"))["environment"]["gpu"] == card
