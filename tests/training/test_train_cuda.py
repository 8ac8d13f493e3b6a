"""Whole runs on a GPU: the same promises, and that the host never waits for the device between logs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import plant_nan_losses

from eco_llm.cli.main import main
from eco_llm.training import checkpoint
from eco_llm.training.hooks.base import Hook
from eco_llm.training.sigma_trainer import SigmaTrainer

pytestmark = pytest.mark.gpu

Flags = Callable[..., list[str]]


def on_cuda(flags: list[str]) -> list[str]:
    return [*flags, "--device", "cuda", "--batch-size", "4", "--seq-len", "64"]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_no_step_between_logs_synchronises(tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 5 to 20 run with PyTorch raising on every synchronising call, loop, loader and hooks included."""

    class Guard(Hook):
        def on_step(self, step: int) -> None:
            torch.cuda.set_sync_debug_mode("error" if 5 <= step <= 20 else "default")

        def on_end(self) -> None:
            torch.cuda.set_sync_debug_mode("default")

    original = SigmaTrainer.__init__

    def with_guard(self: SigmaTrainer, **kwargs: Any) -> None:
        original(self, **{**kwargs, "hooks": [*kwargs["hooks"], Guard()]})

    monkeypatch.setattr(SigmaTrainer, "__init__", with_guard)
    settings = "--steps 24 --eval-interval 0 --save-interval 1000 --grad-accum 2"
    assert main(on_cuda(tiny_flags(settings))) == 0
    rows = records(tmp_path / "run")
    assert [r["step"] for r in rows] == list(range(1, 25))
    assert all(r["loss"] > 0 and r["phase_backward_s"] > 0 for r in rows)


@pytest.mark.parametrize("optimizer", ["c3o", "adamw"])
def test_non_finite_steps_change_nothing_without_the_host_looking(
    optimizer: str, tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_nan_losses(monkeypatch, calls=(3, 4))
    settings = f"--steps 6 --save-interval 1 --keep-checkpoints 9 --eval-interval 0 --optimizer {optimizer}"
    settings += " --cuda-graph off"  # calls are counted here, and a graph has none; tests/training/test_graph_cuda.py
    assert main(on_cuda(tiny_flags(settings))) == 0
    states = [checkpoint.load(p) for p in checkpoint.listing(tmp_path / "run" / "checkpoints")]
    for name, value in states[1].model.items():
        assert torch.equal(value, states[3].model[name])
    assert not torch.equal(states[3].model["embedding.weight"], states[4].model["embedding.weight"])
    assert [r["skipped_steps"] for r in records(tmp_path / "run")] == [0, 0, 1, 2, 2, 2]


def test_stopping_and_resuming_goes_on_where_it_was(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU sums may be taken in another order, so losses are close, not equal."""
    settings = "--steps 10 --save-interval 4 --eval-interval 0"
    assert main(on_cuda(tiny_flags(settings, run="whole"))) == 0
    turn = SigmaTrainer._turn

    def turn_with_signal(self: SigmaTrainer, step: int) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        turn(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(SigmaTrainer, "_turn", turn_with_signal)
        assert main(on_cuda(tiny_flags(settings, run="parts"))) == 143
    assert main(on_cuda(tiny_flags(settings, run="parts"))) == 0
    whole, parts = records(tmp_path / "whole"), records(tmp_path / "parts")
    assert [r["step"] for r in parts] == [r["step"] for r in whole]
    for a, b in zip(whole, parts, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-2)


@pytest.mark.parametrize("compile_flag", ["--torch-compile", "--no-torch-compile"])
def test_bf16_training_learns_and_times_its_phases(compile_flag: str, tiny_flags: Flags, tmp_path: Path) -> None:
    # Without a graph, whose phases tests/training/test_graph_cuda.py adds up on steps long enough: the host's way
    # from one mark to the next is tens of microseconds, and a replay of this model takes under a millisecond.
    settings = f"--steps 60 --lr 1e-2 --eval-interval 30 --save-interval 1000 --cuda-graph off {compile_flag}"
    assert main(on_cuda(tiny_flags(settings))) == 0
    rows = records(tmp_path / "run")
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]
    assert (resolved["device"], resolved["compute_dtype"]) == ("cuda:0", "bfloat16")
    assert sum(r["loss"] for r in rows[-5:]) / 5 < rows[0]["loss"] - 0.7
    late = rows[20:28]  # no validation, no compilation
    phases = sum(r["phase_data_s"] + r["phase_train_s"] for r in late)
    assert phases == pytest.approx(sum(r["core_step_time_s"] for r in late), rel=0.02)
    assert rows[-1]["memory_peak_gib"] > 0


def test_a_gpu_out_of_memory_is_reported_as_such(tiny_flags: Flags, tmp_path: Path) -> None:
    """A real allocation failure: a cap of a thousandth of the card, which the first steps exceed."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        huge = "--d-model 512 --n-heads 8 --batch-size 64 --seq-len 1024 --steps 2 --eval-interval 0"
        assert main([*on_cuda(tiny_flags()), *huge.split()]) == 3
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (path,) = (tmp_path / "run" / "errors").glob("crash_*.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["kind"] == "out_of_memory"
    assert report["memory"]["device_total_bytes"] > 0


def test_sample_and_evaluate_on_the_gpu(tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(on_cuda(tiny_flags("--steps 2 --sample-tokens 5"))) == 0
    assert main(["sample", "--run", str(tmp_path / "run"), "--tokens", "5"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--batches", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0


def test_a_run_imports_no_compiler(tiny_flags: Flags) -> None:
    """The import takes seconds of every start. In a process of its own, with its threads and caches."""
    code = (
        "import sys; from eco_llm.cli.main import main; code = main(sys.argv[1:])\n"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules))); sys.exit(code)\n"
    )
    flags = on_cuda(tiny_flags("--steps 2 --no-torch-compile --sample-tokens 0"))
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
