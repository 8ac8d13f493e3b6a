"""`--memory-report`: when it is written, and what a run does with the flag."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eco_llm.cli.main import main
from eco_llm.perf.memory import Counters, Known, MemoryLedger
from eco_llm.training.hooks.memory_report import MemoryReport
from eco_llm.training.step import TrainStep


class Fixed:
    """An allocator at rest."""

    def __init__(self, captured: bool) -> None:
        self.captured, self.reads = captured, 0

    def read(self) -> Counters:
        self.reads += 1
        return Counters(2**30, 2**31, 2**31)

    def reset_peak(self) -> None:
        pass

    def capturing(self) -> bool:
        return self.captured


class Recorded:
    """A snapshot that is a line of text."""

    def __init__(self) -> None:
        self.recording = False

    def start(self) -> None:
        self.recording = True

    def write(self, path: Path) -> bool:
        if not self.recording:
            return False
        self.recording = False
        path.write_text("snapshot")
        return True


class Run:
    """A hook and the step that tells it where it is."""

    def __init__(self, folder: Path, mode: Any, *, graph: bool = False) -> None:
        self.folder, self.said, self.graph = folder, list[str](), graph
        self.allocator = Fixed(graph)
        ledger = MemoryLedger(self.allocator, lambda: Known(2**20, 0, 2**20))
        self.hook = MemoryReport(mode, ledger, Recorded(), folder, {"gpu": None}, self.said.append)

    def points(self) -> None:
        for point in ("begin", "forward", "backward", "opt_step"):
            self.hook.at(point)

    def train(self, last: int) -> Run:
        self.hook.on_start(1, last)
        for step in range(1, last + 1):
            if self.graph and step == 1:
                self.points()  # the capture, in `prepare`
            self.hook.on_step(step)
            if not self.graph:
                self.points()
        self.hook.on_end()
        return self

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "memory.json").read_text())
        return found


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_once_reports_one_steady_step_and_then_reads_nothing(tmp_path: Path, steps: int) -> None:
    run = Run(tmp_path, "once").train(steps)
    assert run.report()["peak_gib"] == 2.0
    assert run.report()["environment"] == {"gpu": None}
    assert run.report()["measured"] == "in an eager step"
    assert (tmp_path / "memory_snapshot.pickle").read_text() == "snapshot"
    assert len([line for line in run.said if line.startswith("memory, GiB")]) == 1
    assert run.allocator.reads == 5 * min(steps, 2)
    assert not (tmp_path / "memory_steps.jsonl").exists()


def test_step_reports_every_step(tmp_path: Path) -> None:
    run = Run(tmp_path, "step").train(4)
    rows = [json.loads(line) for line in (tmp_path / "memory_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["weights_gib"] == 2**-10 for row in rows)
    assert len([line for line in run.said if line.startswith("memory, GiB")]) == 4
    assert run.report()["snapshot"] == "memory_snapshot.pickle"


@pytest.mark.parametrize("mode", ["once", "step"])
def test_a_graph_is_reported_as_it_was_captured(tmp_path: Path, mode: str) -> None:
    run = Run(tmp_path, mode, graph=True).train(3)
    assert run.report()["measured"] == "while the CUDA graph was captured"
    assert run.allocator.reads == 5
    assert len([line for line in run.said if line.startswith("memory, GiB")]) == 1


def test_a_run_that_breaks_before_a_step_leaves_its_snapshot(tmp_path: Path) -> None:
    run = Run(tmp_path, "once")
    run.hook.on_start(1, 3)
    run.hook.at("begin")
    run.hook.on_end()
    assert (tmp_path / "memory_snapshot.pickle").exists()
    assert not (tmp_path / "memory.json").exists()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_tells_of_its_points(
    accumulate: int, tiny_flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    honest = TrainStep.__init__

    def init(self: TrainStep, *args: Any, **kwargs: Any) -> None:
        honest(self, *args, **kwargs, at=told.append)

    monkeypatch.setattr(TrainStep, "__init__", init)
    assert main(["train", *tiny_flags(f"--steps 2 --grad-accum {accumulate}")]) == 0
    assert told == ["begin", *["forward", "backward"] * accumulate, "opt_step"] * 2


@pytest.mark.parametrize("mode", ["once", "step"])
def test_a_cpu_is_refused_before_anything_is_written(
    mode: str, tiny_flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny_flags("--steps 1"), "--memory-report", mode]) == 2
    error = capsys.readouterr().err
    assert "--memory-report" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["on", "off"])
def test_a_run_on_a_gpu(graph: str, tiny_flags: Callable[..., list[str]], tmp_path: Path) -> None:
    flags = [*tiny_flags("--steps 4"), "--device", "cuda", "--cuda-graph", graph, "--memory-report", "once"]
    assert main(["train", *flags]) == 0
    perf = tmp_path / "run" / "perf"
    found = json.loads((perf / "memory.json").read_text())
    numbers = ("weights", "gradients", "optimizer", "activations", "temporary", "fragmentation")
    assert all(found[f"{name}_gib"] >= 0 for name in numbers)
    assert found["weights_gib"] > 0
    assert found["gradients_gib"] == pytest.approx(found["weights_gib"], rel=0.01)
    assert found["optimizer_gib"] >= 2 * found["weights_gib"]
    assert found["activations_gib"] > 0
    before = found["weights_gib"] + found["optimizer_gib"] + found["other_gib"]
    assert found["peak_gib"] <= found["reserved_gib"]
    assert found["peak_gib"] >= before + found["activations_gib"]
    assert ("captured" in found["measured"]) == (graph == "on")
    assert (perf / "memory_snapshot.pickle").stat().st_size > 1000
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["memory_peak_gib"] >= found["peak_gib"]
    assert torch.cuda.max_memory_allocated() > 0
