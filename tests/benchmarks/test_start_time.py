"""The start's clock: it times the command itself, finds all that it names, and its evidence says which GPU it was."""

from __future__ import annotations

import functools
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def start_time(script: Callable[[str], Any]) -> Any:
    """benchmarks/start_time.py."""
    return script("start_time")


def test_every_call_that_is_timed_exists(start_time: Any) -> None:
    for where in start_time.CALLS.values():
        module, _, attribute = where.partition(":")
        assert callable(functools.reduce(getattr, attribute.split("."), importlib.import_module(module))), where
    for function in start_time.THREADS.values():
        assert callable(getattr(importlib.import_module("eco_llm.head_start"), function)), function


def test_imports_are_timed_and_their_end_is_told(
    start_time: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.05)\nvalue = 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[int] = []
    clock = start_time.Clock(time.time())
    after = {"slow_to_import": lambda: seen.append(sys.modules["slow_to_import"].value)}
    finder = start_time.TimedImports(clock, ("slow_to_import", "not_there_at_all"), after)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    try:
        assert importlib.util.find_spec("slow_to_import") is not None  # as head_start asks for torch: no import
        assert clock.spans == {}
        for _ in range(2):
            importlib.import_module("slow_to_import")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("not_there_at_all")
    finally:
        sys.modules.pop("slow_to_import", None)
    assert seen == [1]
    ((begin, end),) = clock.spans["import slow_to_import"]
    assert 0.05 <= end - begin <= clock.now()


def test_what_comes_after_the_last_mark_is_no_part_of_the_start(start_time: Any) -> None:
    clock = start_time.Clock(time.time())
    with clock.span("before"):
        pass
    with clock.span("across"):
        for name in start_time.MARKS:
            clock.mark(name)
    with clock.span("after"):
        pass
    assert set(clock.spans) == {"before"}


def test_a_start_is_the_command_with_clocks_in_it(
    start_time: Any, tiny_flags: Callable[..., list[str]], tmp_path: Path
) -> None:
    flags = [*tiny_flags("--steps 1 --sample-tokens 0 --device cpu"), *start_time.MODES["eager"]]
    taken = start_time.start(flags, tmp_path / "caches", tmp_path / "timed", tmp_path / "bytecode")
    parts = [taken[f"{name}_s"] for name in start_time.MARKS]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(taken["total_s"])
    assert {"import torch", "device", "data", "model", "optimizer", "environment", "core_step"} <= set(taken["spans"])
    for times in taken["spans"].values():
        for begin, end in times:
            assert 0 < begin <= end <= taken["total_s"]
    assert not taken["compiler_imported"]
    assert taken["compiler"] == {}
    assert list((tmp_path / "bytecode").rglob("sigma_trainer.*.pyc"))
    (model,) = taken["spans"]["model"]
    assert model[1] - model[0] <= taken["model_and_hooks_s"]
    assert taken["environment"]["device"] == "cpu"
    assert taken["processor_s"] > 0
    assert not (tmp_path / "timed").exists()


def _fake_start(fails_in: str = "") -> Callable[..., dict[str, Any]]:
    """A start on the second of two GPUs; in the mode whose flags hold `fails_in` it fails."""

    def start(flags: list[str], caches: Path, run: Path, bytecode: Path | None) -> dict[str, Any]:
        if fails_in and caches.name == fails_in:
            raise RuntimeError("eco_train ended with exit code 1")
        parts = {f"{name}_s": 1.0 for name in ("arguments", "import_torch", "import_trainer", "device_and_data")}
        parts |= {f"{name}_s": 1.0 for name in ("model_and_hooks", "prepare", "first_step")}
        gpu = {"name": "NVIDIA H200", "memory_gib": 139.8, "compute_capability": "9.0", "driver": None}
        environment = {"device": "cuda:1", "gpu": gpu, "command": "start_time.py --start-marks", "commit": "c0ffee"}
        spans = {"model": [[3.0, 3.5]]}
        return {
            **parts, "total_s": 7.0, "spans": spans, "compiler": {}, "caches": {}, "compiler_imported": False,
            "processor_s": 5.0 if bytecode else 6.0, "environment": environment,
        }  # fmt: skip

    return start


@pytest.fixture
def written(start_time: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where main leaves its evidence, on a machine of two GPUs none of which this process may touch."""
    common = sys.modules.get("common") or importlib.import_module("common")

    def touched() -> None:
        raise AssertionError("the process that measures others must stay off the GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", touched)
    monkeypatch.setattr(common, "write_evidence", functools.partial(common.write_evidence, results=tmp_path))
    monkeypatch.setattr(sys, "argv", ["benchmarks/start_time.py", "--rounds", "2"])
    return tmp_path / "nvidia-h200" / "start_time.json"


def test_evidence_names_the_gpu_that_the_runs_were_on(
    start_time: Any, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_time, "start", _fake_start())
    start_time.main(["--rounds", "2", "--modes", "eager,compiled_graph"])
    evidence = json.loads(written.read_text(encoding="utf-8"))
    assert evidence["environment"]["gpu"]["name"] == "NVIDIA H200"
    assert evidence["command"] == "start_time.py --rounds 2"
    kinds = ("cold", "warm", "warm_without_bytecode")
    assert set(evidence["summary"]) == {f"{m}_{s}_s" for m in ("eager", "compiled_graph") for s in kinds}
    assert [s["start"] for s in evidence["samples"]] == ["cold", "warm", "warm", "warm, no bytecode"] * 2
    assert [s["processor_s"] for s in evidence["samples"]] == [5.0, 5.0, 5.0, 6.0] * 2
    assert all("environment" not in s for s in evidence["samples"])


def test_a_mode_that_fails_leaves_the_evidence_of_those_before(
    start_time: Any, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_time, "start", _fake_start(fails_in="compiled_graph"))
    with pytest.raises(RuntimeError, match="exit code 1"):
        start_time.main(["--modes", "eager,compiled_graph"])
    assert set(json.loads(written.read_text(encoding="utf-8"))["summary"]) == {
        "eager_cold_s", "eager_warm_s", "eager_warm_without_bytecode_s"
    }  # fmt: skip
