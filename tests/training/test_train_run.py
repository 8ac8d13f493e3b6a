"""Whole runs of the tiny model through the command line: what must hold whatever happens to a run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import perf_evidence
import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler
from train_cases import assert_same_checkpoint, assert_same_tree, losses, plant_nan_losses, records, stop_after

from eco_llm.cli.main import main
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.perf.profiler import StepProfiler
from eco_llm.training import checkpoint
from eco_llm.training.evaluation import evaluate
from eco_llm.training.hooks.base import Hook
from eco_llm.training.hooks.metrics_file import MetricsFile
from eco_llm.training.sigma_trainer import SigmaTrainer

Flags = Callable[..., list[str]]


def phase_share(rows: list[dict[str, Any]]) -> float:
    """Share of the core step that its phases cover, in the median step: another process may take the processor between
    two phases of a step that lasts 20 ms."""
    return statistics.median((r["phase_data_s"] + r["phase_train_s"]) / r["core_step_time_s"] for r in rows)


def test_a_run_leaves_everything_it_promises(tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = tiny_flags("--steps 6 --save-interval 2 --eval-interval 3 --keep-checkpoints 2 --sample-tokens 5")
    assert main(flags) == 0
    run = tmp_path / "run"
    rows = records(run)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for r in rows:
        for name in ("data", "forward", "backward", "opt_step", "zero_grad", "optim", "train"):
            assert r[f"phase_{name}_s"] >= 0
        assert r["phase_optim_s"] == pytest.approx(
            r["phase_backward_s"] + r["phase_opt_step_s"] + r["phase_zero_grad_s"]
        )
        assert r["phase_train_s"] == pytest.approx(r["phase_forward_s"] + r["phase_optim_s"])
        assert r["core_step_time_s"] <= r["step_time_s"]
        assert r["core_tokens_per_s"] == pytest.approx(48 / r["core_step_time_s"])
        assert r["effective_tokens_per_s"] == pytest.approx(48 / r["step_time_s"])
        assert r["gpu_util_percent"] is None  # no GPU: unknown, not zero
        assert r["tokens"] == 48 * r["step"]
        assert {"c3o_foreach_groups", "c3o_grad_clip_foreach_groups", "c3o_trust_norm_skipped"} <= r.keys()
    assert [r["step"] for r in rows if "val_loss" in r] == [3, 6]
    assert all(0 < r["val_bits_per_byte"] < 10 for r in rows if "val_loss" in r)
    assert [p.name for p in checkpoint.listing(run / "checkpoints")] == ["step_00000004", "step_00000006"]
    assert json.loads((run / "config.json").read_text())["config"]["training"]["steps"] == 6
    assert list((run / "tb").glob("events.*"))
    bottlenecks = json.loads((run / "perf" / "window_10m_bottlenecks.json").read_text())
    assert bottlenecks["steps"] == 6
    assert not (run / "perf" / "baseline_throughput.json").exists()
    assert not (run / "errors").exists()
    out = capsys.readouterr().out
    assert "validation loss" in out
    assert "sample, from 'def main():'" in out


def test_phases_add_up_to_the_core_step(tiny_flags: Flags, tmp_path: Path) -> None:
    assert main(tiny_flags("--steps 8 --batch-size 8 --seq-len 96 --eval-interval 0")) == 0
    assert phase_share(records(tmp_path / "run")[2:]) == pytest.approx(1, rel=0.02)


def test_the_seed_decides_everything(tiny_flags: Flags, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main(tiny_flags(f"--steps 3 --eval-interval 0 --seed {seed}", run=name)) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_the_model_learns(tiny_flags: Flags, tmp_path: Path) -> None:
    assert main(tiny_flags("--steps 40 --lr 1e-2 --eval-interval 0 --save-interval 1000")) == 0
    curve = [loss for _, loss, _ in losses(tmp_path / "run")]
    assert sum(curve[-5:]) / 5 < curve[0] - 0.7


@pytest.mark.parametrize("optimizer", ["c3o", "adamw", "muon"])
def test_stopping_and_resuming_changes_nothing(
    optimizer: str, tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2N steps at once, and N steps, a signal, a resume and N steps: equal bit for bit."""
    settings = f"--steps 8 --save-interval 3 --eval-interval 2 --optimizer {optimizer} --grad-accum 2"
    assert main(tiny_flags(settings, run="whole")) == 0
    with monkeypatch.context() as patched:
        stop_after(4, patched)
        assert main(tiny_flags(settings, run="parts")) == 143
    assert checkpoint.step_of(checkpoint.listing(tmp_path / "parts" / "checkpoints")[-1]) == 4
    assert main(tiny_flags(settings, run="parts")) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_checkpoint(
        tmp_path / "whole" / "checkpoints" / "step_00000008", tmp_path / "parts" / "checkpoints" / "step_00000008"
    )


def test_a_killed_run_resumes_from_its_checkpoint_to_the_same_end(tiny_flags: Flags, tmp_path: Path) -> None:
    settings = "--steps 60 --save-interval 10 --eval-interval 0"
    assert main(tiny_flags(settings, run="whole")) == 0
    process = subprocess.Popen([sys.executable, "-m", "eco_llm", *tiny_flags(settings, run="killed")])
    run = tmp_path / "killed"
    deadline = time.monotonic() + 120
    while len(checkpoint.listing(run / "checkpoints")) < 1 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    killed_at = records(run)[-1]["step"] if (run / "metrics.jsonl").exists() else 0
    assert 10 <= killed_at < 60
    assert main(tiny_flags(settings, run="killed")) == 0
    assert losses(run) == losses(tmp_path / "whole")
    assert_same_checkpoint(run / "checkpoints" / "step_00000060", tmp_path / "whole" / "checkpoints" / "step_00000060")


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(
    tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = "--steps 6 --save-interval 2 --eval-interval 0"
    assert main(tiny_flags(settings, run="whole")) == 0
    assert main(tiny_flags(settings, run="run")) == 0
    weights = tmp_path / "run" / "checkpoints" / "step_00000006" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert main(tiny_flags(settings, run="run")) == 0
    assert "damaged checkpoint" in capsys.readouterr().out
    assert_same_checkpoint(
        tmp_path / "run" / "checkpoints" / "step_00000006", tmp_path / "whole" / "checkpoints" / "step_00000006"
    )


def test_a_run_of_an_earlier_version_goes_on_with_the_norm_skip_switched_on(tiny_flags: Flags, tmp_path: Path) -> None:
    """0.1.0's first runs lack later settings in config.json; a norm is skipped only where that changes nothing."""
    settings = "--save-interval 4 --eval-interval 0 --schedule constant --warmup-steps 0"
    assert main(tiny_flags(f"--steps 8 {settings}", run="whole")) == 0
    assert main(tiny_flags(f"--steps 4 {settings}", run="old")) == 0
    file = tmp_path / "old" / "config.json"
    content = json.loads(file.read_text())
    del content["config"]["runtime"]["cuda_graph"], content["config"]["runtime"]["weights_dtype"]
    del content["config"]["optimizer"]["gradient_release"]
    file.write_text(json.dumps(content))
    assert main(tiny_flags(f"--steps 8 {settings} --c3o-trust-norm-refresh-drift 0.02", run="old")) == 0
    assert losses(tmp_path / "old") == losses(tmp_path / "whole")
    last = checkpoint.load(checkpoint.listing(tmp_path / "old" / "checkpoints")[-1]).optimizer
    assert last is not None
    assert {group["trust_norm_refresh_drift"] for group in last["param_groups"]} == {0.02}
    assert records(tmp_path / "old")[-1]["c3o_trust_norm_skipped"] > 0
    resolved = json.loads(file.read_text())["resolved"]
    assert resolved["kernels"] == "reference"
    assert "float32 products by" in resolved["kernels_why"]


def test_finished_runs_say_so_and_longer_ones_go_on(
    tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(tiny_flags("--steps 2 --eval-interval 0")) == 0
    capsys.readouterr()
    assert main(tiny_flags("--steps 2 --eval-interval 0")) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(tiny_flags("--steps 3 --eval-interval 0")) == 0
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3]
    resumed = json.loads((tmp_path / "run" / "config.json").read_text())["resumed"]
    assert resumed[-1]["changed"]["steps"] == [2, 3]


def test_no_resume_sets_the_earlier_run_aside_whole(tiny_flags: Flags, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(tiny_flags("--steps 2 --eval-interval 0")) == 0
    before = (run / "metrics.jsonl").read_bytes()
    assert main(tiny_flags("--steps 1 --eval-interval 0 --no-resume --lr 0.5")) == 0
    assert (run / "previous" / "001" / "metrics.jsonl").read_bytes() == before
    assert checkpoint.load(run / "previous" / "001" / "checkpoints" / "step_00000002").step == 2
    assert [r["step"] for r in records(run)] == [1]


def test_another_configuration_is_refused_and_nothing_is_touched(
    tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(tiny_flags("--steps 1 --eval-interval 0")) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert main(tiny_flags("--steps 1 --eval-interval 0 --lr 0.5")) == 2
    error = capsys.readouterr().err
    assert "--lr 0.001 → 0.5" in error
    assert error.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_changed_text_is_refused_and_the_run_is_not_touched(
    tiny_flags: Flags, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    flags = [*tiny_flags("--eval-interval 0"), "--data", str(text), "--data-cache", str(tmp_path / "cache")]
    assert main([*flags, "--steps", "1"]) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.name != ".lock"}
    (text / "more.py").write_text("x = 1\n" * 100, encoding="utf-8")
    shutil.rmtree(tmp_path / "cache")  # or it would go on with the stored tokens
    capsys.readouterr()
    assert main([*flags, "--steps", "2"]) == 2
    assert f"the text of --data {text} has changed since this run began" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.name != ".lock"} == before


def test_the_data_may_move_to_another_cache(tiny_flags: Flags, corpus: Path, tmp_path: Path) -> None:
    """After a resume with another --data-cache the run names that one: the first may be gone, the text changed."""
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    flags = [*tiny_flags("--eval-interval 0"), "--data", str(text)]
    assert main([*flags, "--steps", "1", "--data-cache", str(tmp_path / "a")]) == 0
    shutil.rmtree(tmp_path / "a")
    assert main([*flags, "--steps", "2", "--data-cache", str(tmp_path / "b")]) == 0
    (text / "more.py").write_text("x = 1\n" * 100, encoding="utf-8")
    assert main([*flags, "--steps", "3", "--data-cache", str(tmp_path / "b")]) == 0
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--batches", "1"]) == 0


def test_a_cleared_cache_does_not_end_a_run(
    tiny_flags: Flags, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    clear = SigmaTrainer._turn

    def turn(self: SigmaTrainer, number: int) -> None:
        shutil.rmtree(cache, ignore_errors=True)
        clear(self, number)

    monkeypatch.setattr(SigmaTrainer, "_turn", turn)
    places = ["--data", str(corpus), "--data-cache", str(cache)]
    assert main([*tiny_flags("--steps 4 --eval-interval 2"), *places]) == 0
    assert not cache.exists()
    assert sum("val_loss" in r for r in records(tmp_path / "run")) == 2


def test_a_run_is_scored_in_the_type_it_computed_in(
    tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(tiny_flags("--steps 2 --eval-interval 2 --eval-batches 1000 --dtype bf16")) == 0
    logged = next(r["val_loss"] for r in records(tmp_path / "run") if "val_loss" in r)
    capsys.readouterr()
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(logged, rel=1e-7)


def test_modes_are_not_chosen_for_a_device_that_the_plan_is_not_for(
    tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shape = "--mamba-head-dim 64 --mamba-state-dim 16"
    assert main(tiny_flags(f"--instant-mode auto --vram-gib 8 --device auto {shape}")) == 2
    assert "--instant-mode auto plans a CUDA GPU's memory; this run is on cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["c3o", "adamw", "muon"])
def test_non_finite_steps_are_not_applied_and_counted(
    optimizer: str, tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 4 get a NaN loss: the weights of step 2 are those of step 4, and training goes on."""
    plant_nan_losses(monkeypatch, calls=(3, 4))
    settings = f"--steps 6 --save-interval 1 --keep-checkpoints 9 --eval-interval 0 --optimizer {optimizer}"
    assert main(tiny_flags(settings)) == 0
    folder = tmp_path / "run" / "checkpoints"
    states = [checkpoint.load(p) for p in checkpoint.listing(folder)]
    assert_same_tree(states[1].model, states[3].model)
    assert_same_tree(states[1].optimizer["state"], states[3].optimizer["state"])
    assert not torch.equal(states[3].model["embedding.weight"], states[4].model["embedding.weight"])
    assert [r["loss"] for r in records(tmp_path / "run")][2:4] == ["nan", "nan"]
    assert [r["skipped_steps"] for r in records(tmp_path / "run")] == [0, 0, 1, 2, 2, 2]


def test_too_many_non_finite_steps_in_a_row_stop_the_run(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(SigmaLLM, "loss", lambda self, *a: SigmaLLM.hidden(self, a[0]).sum() * float("inf"))
    assert main(tiny_flags("--steps 50 --max-bad-steps 3 --eval-interval 0")) == 4
    assert "3 steps in a row had a non-finite loss or gradient" in capsys.readouterr().out
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3]
    assert list((tmp_path / "run" / "errors").glob("crash_*.json"))


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (RuntimeError("boom\nsecond line"), 1, "exception"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), 3, "out_of_memory"),
    ],
)
def test_a_crash_leaves_a_report_and_a_resumable_run(
    error: Exception, code: int, kind: str, tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"n": 0}
    honest = SigmaLLM.loss

    def loss(self: SigmaLLM, *args: torch.Tensor) -> torch.Tensor:
        calls["n"] += 1
        if calls["n"] == 4:
            raise error
        return honest(self, *args)

    run = tmp_path / "run"
    settings = "--steps 6 --save-interval 2 --eval-interval 0"
    with monkeypatch.context() as patched:
        patched.setattr(SigmaLLM, "loss", loss)
        assert main(tiny_flags(settings)) == code
    (path,) = (run / "errors").glob("crash_*.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["kind"] == kind
    assert report["step"] == 4
    assert report["last_metrics"]["step"] == 3
    assert report["config"]["training"]["steps"] == 6
    assert report["memory"]["host_resident_bytes"] > 0
    assert any("raise error" in line for line in report["traceback"])
    assert [r["step"] for r in records(run)] == [1, 2, 3]
    assert main(tiny_flags(settings)) == 0
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5, 6]
    assert "superseded" not in (run / "metrics.jsonl").read_text()
    assert len((run / "metrics.superseded.jsonl").read_text().splitlines()) == 1  # step 3, done again


def test_a_crash_that_cannot_be_reported_is_shown(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A full disk takes no crash report: the terminal gets what would have been in it."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MetricsFile, "on_record", full)
    monkeypatch.setattr("eco_llm.training.crash.write_json", full)
    assert main(tiny_flags("--steps 2")) == 1
    shown = capsys.readouterr()
    assert "crashed in step 2: OSError: [Errno 28] No space left on device" in shown.out
    assert "no crash report could be written: [Errno 28]" in shown.out
    assert "Traceback" in shown.err
    assert "during handling" not in shown.err.lower()


@pytest.mark.parametrize("choice", ["on", "off"])
def test_a_compiler_that_fails_is_named(
    choice: str, tiny_flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Wherever in the chain the compiler is; a run that compiles nothing gets no such advice."""
    wrong = RuntimeError("a block failed")
    wrong.__cause__ = InvalidCxxCompiler()

    def loss(self: SigmaLLM, *args: torch.Tensor) -> torch.Tensor:
        raise wrong

    monkeypatch.setattr(SigmaLLM, "loss", loss)
    monkeypatch.setattr(SigmaLLM, "compile_blocks", lambda self: None)
    assert main([*tiny_flags("--steps 1"), "--torch-compile", choice]) == 1
    assert ("use --no-torch-compile" in capsys.readouterr().out) == (choice == "on")


def test_an_interrupt_saves_at_the_step_boundary(tiny_flags: Flags, tmp_path: Path) -> None:
    """A real process, a real Ctrl-C."""
    flags = tiny_flags("--steps 100000 --save-interval 100000 --eval-interval 0")
    process = subprocess.Popen(
        [sys.executable, "-m", "eco_llm", *flags],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step ") and line.split("/")[0].split()[1] == "3":
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    process.stdout.close()
    assert process.wait(timeout=60) == 130
    assert "interrupted after step" in rest
    (path,) = checkpoint.listing(tmp_path / "run" / "checkpoints")
    assert checkpoint.load(path).step == records(tmp_path / "run")[-1]["step"] >= 3


def test_gradient_accumulation_is_a_bigger_batch(tiny_flags: Flags, tmp_path: Path) -> None:
    """The same windows in the same order; only the order of summation differs."""
    assert main(tiny_flags("--steps 3 --batch-size 4 --grad-accum 1 --eval-interval 0", run="big")) == 0
    assert main(tiny_flags("--steps 3 --batch-size 2 --grad-accum 2 --eval-interval 0", run="small")) == 0
    for (_, a, _), (_, b, _) in zip(losses(tmp_path / "big"), losses(tmp_path / "small"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_the_perf_window_writes_the_reports_files(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report's own short window: three steps, one of warm-up, two measured, two profiled.

    Its headline rate is that of its steps: what ends the run, and starting and stopping the profiler, is not in it.
    """
    window = "--perf-profile-enable --perf-warmup-steps 1 --perf-measure-steps 2 --perf-profiler-steps 2"
    clock = "--perf-device-time-mode auto --perf-sync-boundaries"
    honest, traced = checkpoint.save, []

    def save(*args: Any, **kwargs: Any) -> Path:
        traced.append(torch.autograd._profiler_enabled())
        return honest(*args, **kwargs)

    def slow(work: Callable[..., Any]) -> Callable[..., Any]:
        def after_a_while(*args: Any, **kwargs: Any) -> Any:
            traced.append(torch.autograd._profiler_enabled() and work is evaluate)
            time.sleep(0.4)
            return work(*args, **kwargs)

        return after_a_while

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr("eco_llm.training.launch.evaluate", slow(evaluate))
    monkeypatch.setattr(StepProfiler, "start", slow(StepProfiler.start))
    monkeypatch.setattr(StepProfiler, "stop", slow(StepProfiler.stop))
    assert main(tiny_flags(f"--steps 3 --no-resume --save-interval 1000 {window} {clock}")) == 0
    perf = tmp_path / "run" / "perf"
    baseline = json.loads((perf / "baseline_throughput.json").read_text())
    rows = records(tmp_path / "run")[1:]
    assert baseline["avg_effective_tokens_per_s"] == pytest.approx(2 * 48 / sum(r["step_time_s"] for r in rows))
    assert baseline["avg_core_tokens_per_s"] == pytest.approx(2 * 48 / sum(r["core_step_time_s"] for r in rows))
    for key in (
        "step_time_s",
        "core_step_time_s",
        "phase_forward_s",
        "phase_backward_s",
        "phase_opt_step_s",
        "phase_optim_s",
    ):
        assert baseline[f"avg_{key}"] == pytest.approx(sum(r[key] for r in rows) / 2)
    assert baseline["avg_effective_tokens_per_s"] > 0.7 * baseline["avg_core_tokens_per_s"]
    assert "val_loss" in rows[-1]
    assert baseline["validations_in_window"] == 0
    assert baseline["avg_gpu_util_percent"] is None
    assert baseline["profiled_steps_in_window"] == 2
    bottlenecks = json.loads((perf / "window_10m_bottlenecks.json").read_text())
    assert bottlenecks["dominant_stage"] == "train"
    assert sum(s["percent"] for s in bottlenecks["optimizer_phase"]) == pytest.approx(100)
    page = (Path(__file__).parents[2] / "docs" / "perf.md").read_text(encoding="utf-8")
    for key in (*baseline, *bottlenecks, *bottlenecks["profiler"]):
        shown = "avg_phase_*_s" if key.startswith("avg_phase_") else key
        assert f"`{shown}`" in page, f"docs/perf.md does not say what {key} is"
    for memory in (baseline["memory"], bottlenecks["memory"]):
        assert set(memory) == {"process_rss_gib", "process_peak_rss_gib"}  # no GPU: absent, not zero
        assert 0 < memory["process_rss_gib"] <= memory["process_peak_rss_gib"]
    assert bottlenecks["profiler"]["steps"] == 2
    assert not any(row["name"].startswith(("eco/", "Optimizer.")) for row in bottlenecks["profiler"]["rows"])
    assert (perf / "trace.json.gz").stat().st_size > 0
    assert not any(traced)  # neither the final validation nor the final checkpoint is in the trace


def test_a_window_before_its_trace_holds_everything(tiny_flags: Flags, tmp_path: Path) -> None:
    window = "--perf-profile-enable --perf-warmup-steps 3 --perf-measure-steps 5 --perf-profiler-steps 2"
    big = "--batch-size 8 --seq-len 96"  # the little between phases weighs less, where nothing else takes the processor
    assert main(tiny_flags(f"--steps 10 --eval-interval 0 {big} {window}")) == 0
    ranges = perf_evidence.check(tmp_path / "run", phases_within=0.1)["ranges"]
    assert ranges["eco/block_02_mla_backward"] == ranges["eco/zero_grad"] == 2


def test_a_validation_inside_the_window_is_named(
    tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    window = "--perf-profile-enable --perf-warmup-steps 1 --perf-measure-steps 2 --steps 3 --eval-interval 2"
    assert main(tiny_flags(window)) == 0
    baseline = json.loads((tmp_path / "run" / "perf" / "baseline_throughput.json").read_text())
    assert ["val_loss" in row for row in records(tmp_path / "run")] == [False, True, True]
    assert baseline["validations_in_window"] == 1
    assert "; 1 validation inside, in the effective rate" in capsys.readouterr().out


def test_torch_compile_trains_to_the_same_losses(tiny_flags: Flags, tmp_path: Path) -> None:
    assert main(tiny_flags("--steps 3 --eval-interval 0", run="eager")) == 0
    assert main(tiny_flags("--steps 3 --eval-interval 0 --torch-compile", run="compiled")) == 0
    for (_, a, _), (_, b, _) in zip(losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert json.loads((tmp_path / "compiled" / "config.json").read_text())["resolved"]["torch_compile"] is True


def test_two_trainers_cannot_share_a_run(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from eco_llm.training import launch
    from eco_llm.training.run_directory import RunDirectory

    assert main(tiny_flags("--steps 1 --eval-interval 0")) == 0
    # The second is refused before it reads a corpus.
    monkeypatch.setattr(launch, "prepare", lambda *a, **k: pytest.fail("prepared data for a run that is taken"))
    run = RunDirectory(tmp_path / "run")
    run.open()
    try:
        assert main(tiny_flags("--steps 2 --no-resume")) == 2
    finally:
        run.close()
    assert "in use by another eco_train" in capsys.readouterr().err


def test_hooks_see_records_in_order_and_before_their_checkpoint(
    tiny_flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Spy(Hook):
        def on_record(self, record: dict[str, Any]) -> None:
            seen.append(f"record {record['step']}")

        def on_checkpoint(self, step: int) -> None:
            seen.append(f"checkpoint {step}")

        def on_end(self) -> None:
            seen.append("end")

    original = SigmaTrainer.__init__

    def with_spy(self: SigmaTrainer, **kwargs: Any) -> None:
        original(self, **{**kwargs, "hooks": [*kwargs["hooks"], Spy()]})

    monkeypatch.setattr(SigmaTrainer, "__init__", with_spy)
    assert main(tiny_flags("--steps 3 --save-interval 2 --eval-interval 0")) == 0
    assert seen == ["record 1", "record 2", "checkpoint 2", "record 3", "checkpoint 3", "end"]


def test_a_hook_that_cannot_close_hides_neither_the_error_nor_the_other_hooks(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    class Stuck(Hook):
        def on_end(self) -> None:
            raise OSError("disk gone")

    class Last(Hook):
        def on_end(self) -> None:
            closed.append("last")

    original = SigmaTrainer.__init__

    def with_hooks(self: SigmaTrainer, **kwargs: Any) -> None:
        original(self, **{**kwargs, "hooks": [Stuck(), *kwargs["hooks"], Last()]})

    def broken(self: SigmaLLM, *args: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("boom")

    monkeypatch.setattr(SigmaTrainer, "__init__", with_hooks)
    with monkeypatch.context() as patched:
        patched.setattr(SigmaLLM, "loss", broken)
        assert main(tiny_flags("--steps 3", run="crashed")) == 1
    (path,) = (tmp_path / "crashed" / "errors").glob("crash_*.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["message"] == "boom"
    assert any("disk gone" in line for line in report["traceback"])
    assert closed == ["last"]
    assert main(tiny_flags("--steps 1 --eval-interval 0", run="well")) == 1  # a failure to close is a failure


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_saves_and_nohup_goes_on(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = "--steps 5 --save-interval 1000 --eval-interval 0"
    with monkeypatch.context() as patched:
        stop_after(3, patched, signal.SIGHUP)
        assert main(tiny_flags(settings)) == 129
        assert [checkpoint.step_of(p) for p in checkpoint.listing(tmp_path / "run" / "checkpoints")] == [3]
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            assert main(tiny_flags(settings, run="nohup")) == 0
        finally:
            signal.signal(signal.SIGHUP, before)
    assert records(tmp_path / "nohup")[-1]["step"] == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_does_not_stop_training(tiny_flags: Flags, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "eco_llm", *tiny_flags("--steps 3 --eval-interval 0 --sample-tokens 3")]
        subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, timeout=120)
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3]
    assert len(checkpoint.listing(tmp_path / "run" / "checkpoints")) == 1


def test_a_run_goes_on_with_its_tokens_when_its_corpus_has_changed(
    tiny: list[str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.txt").write_text((corpus / "ast.py").read_text(encoding="utf-8"), encoding="utf-8")

    def flags(data: str, steps: int) -> list[str]:
        return [*tiny, "--data", data, "--output-dir", "run", "--eval-interval", "0", "--steps", str(steps)]

    assert main(flags("mine", 2)) == 0
    (mine / "b.txt").write_text("something else entirely\n" * 50, encoding="utf-8")
    assert main(flags("mine", 3)) == 0  # the same words: what it began with
    assert records(tmp_path / "run")[-1]["step"] == 3
    capsys.readouterr()
    assert main(flags("./mine", 4)) == 2  # other words are looked up anew, and mean other text now
    assert "has changed since this run began" in capsys.readouterr().err
    (mine / "b.txt").unlink()
    assert main(flags("./mine", 4)) == 0  # another spelling of the same text


def test_fewer_steps_than_done_is_nothing_to_do(
    tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(tiny_flags("--steps 4 --eval-interval 0")) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.name != ".lock"}
    capsys.readouterr()
    assert main(tiny_flags("--steps 2 --eval-interval 0 --sample-tokens 3")) == 0
    out = capsys.readouterr().out
    assert "nothing to do: the run is at step 4" in out
    assert "sample, from" in out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.name != ".lock"} == before


def test_a_checkpoint_costs_the_loop_and_not_the_core_step(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = checkpoint.save

    def slow(*args: Any, **kwargs: Any) -> Path:
        time.sleep(0.5)
        return honest(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", slow)
    assert main(tiny_flags("--steps 6 --save-interval 2 --eval-interval 0")) == 0
    rows = records(tmp_path / "run")
    assert [r["step"] for r in rows if r["step_time_s"] > 0.5] == [3, 5]  # the turns that saved steps 2 and 4
    for r in rows[1:]:
        assert r["core_step_time_s"] < 0.5
    assert phase_share(rows[1:]) == pytest.approx(1, rel=0.1)


def test_a_steps_time_is_the_whole_turn_of_the_loop(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a record costs to deliver is in the next step's time; nothing lies between two steps."""

    class SlowLog(Hook):
        def on_record(self, record: dict[str, Any]) -> None:
            time.sleep(0.5 if record["step"] == 3 else 0.02)

    original = SigmaTrainer.__init__

    def with_slow_log(self: SigmaTrainer, **kwargs: Any) -> None:
        original(self, **{**kwargs, "hooks": [*kwargs["hooks"], SlowLog()]})

    monkeypatch.setattr(SigmaTrainer, "__init__", with_slow_log)
    window = "--perf-profile-enable --perf-warmup-steps 2 --perf-measure-steps 4"
    assert main(tiny_flags(f"--steps 6 --eval-interval 0 {window}")) == 0
    rows = records(tmp_path / "run")
    assert [r["step"] for r in rows if r["step_time_s"] > 0.5] == [4]
    assert all(r["core_step_time_s"] < r["step_time_s"] - 0.02 for r in rows[1:])
    assert all(r["core_step_time_s"] < 0.5 for r in rows)
    whole = rows[-1]["ended_at"] - rows[0]["started_at"]
    assert sum(r["step_time_s"] for r in rows) == pytest.approx(whole, rel=0.02)
    baseline = json.loads((tmp_path / "run" / "perf" / "baseline_throughput.json").read_text())
    assert baseline["avg_step_time_s"] - baseline["avg_core_step_time_s"] > (0.5 + 3 * 0.02) / 4
    assert baseline["avg_effective_tokens_per_s"] == pytest.approx(4 * 48 / sum(r["step_time_s"] for r in rows[2:]))
