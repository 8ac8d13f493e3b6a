"""Whole runs with `--weights-dtype bf16` and `--gradient-release`: saved, resumed, used, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import plant_nan_losses

from eco_llm.cli.main import main
from eco_llm.training import checkpoint
from eco_llm.training.tree import split_tensors

Flags = Callable[..., list[str]]
RELEASE = "--gradient-release --grad-clip 0"


def learned(run: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(r["step"], r["loss"], r["skipped_steps"], r.get("val_loss")) for r in rows]


def saved(run: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """The newest checkpoint's tensors, weights and optimizer, and what of it is plain data."""
    newest = checkpoint.load(checkpoint.listing(run / "checkpoints")[-1])
    tensors = dict(newest.model)
    plain = split_tensors({"optimizer": newest.optimizer, "trainer": newest.trainer}, tensors, "rest")
    return tensors, plain


def assert_same_end(a: Path, b: Path) -> None:
    (first, plain), (second, other) = saved(a), saved(b)
    assert plain == other
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("flags", ["", "--dtype bf16 --no-tie-embeddings --optimizer adamw"])
def test_bf16_weights_resume_bit_for_bit_and_are_loaded(
    flags: str, tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for run, steps in (("whole", (8,)), ("parts", (4, 8))):
        for last in steps:
            schedule = "--schedule constant --warmup-steps 0 --eval-interval 4"
            words = f"--weights-dtype bf16 {schedule} --steps {last} {flags}"
            assert main(tiny_flags(words, run=run)) == 0
    assert "bf16 weights" in capsys.readouterr().out
    assert learned(tmp_path / "parts") == learned(tmp_path / "whole")
    assert_same_end(tmp_path / "parts", tmp_path / "whole")
    weights = checkpoint.load(checkpoint.listing(tmp_path / "whole" / "checkpoints")[-1]).model
    assert {(t.ndim == 2, t.dtype) for t in weights.values()} == {(True, torch.bfloat16), (False, torch.float32)}

    before = learned(tmp_path / "whole")
    assert main(tiny_flags(f"{schedule} --steps 9 {flags}", run="whole")) == 2
    assert "--weights-dtype bf16 → fp32" in capsys.readouterr().err
    assert learned(tmp_path / "whole") == before

    run = ["--run", str(tmp_path / "whole"), "--device", "cpu"]
    assert main(["evaluate", *run, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    if not flags:  # evaluation computes in the device's own type, and over all batches
        assert main(["evaluate", *run, "--json", "--batches", "2"]) == 0
        assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(before[-1][3], abs=1e-5)
    assert 0 < result["val_loss"] < 6
    assert main(["sample", *run, "--tokens", "3"]) == 0


@pytest.mark.parametrize("flags", ["--weights-dtype fp32", "--weights-dtype bf16 --dtype bf16", "--optimizer adamw"])
def test_release_trains_the_same_model_and_may_be_switched(
    flags: str, tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags += " --steps 6 --eval-interval 3 --schedule constant --save-interval 3"
    assert main(tiny_flags(f"{flags} --grad-clip 0", run="ordinary")) == 0
    assert main(tiny_flags(f"{flags} {RELEASE}", run="released")) == 0
    assert "inside backward" in capsys.readouterr().out
    assert learned(tmp_path / "released") == learned(tmp_path / "ordinary")
    assert_same_end(tmp_path / "released", tmp_path / "ordinary")
    for run, first, then in (("on-off", RELEASE, "--grad-clip 0"), ("off-on", "--grad-clip 0", RELEASE)):
        assert main(tiny_flags(f"{flags} {first} --steps 3", run=run)) == 0
        assert main(tiny_flags(f"{flags} --steps 6 {then}", run=run)) == 0
        assert_same_end(tmp_path / run, tmp_path / "ordinary")


def test_a_released_step_with_a_bad_loss_is_skipped_and_counted(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_nan_losses(monkeypatch, (2,))
    assert main(tiny_flags(f"--steps 4 --eval-interval 0 {RELEASE}")) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["skipped_steps"] for r in rows] == [0, 1, 1, 1]
    assert all(t.isfinite().all() for t in saved(tmp_path / "run")[0].values() if t.is_floating_point())


def test_phases_of_a_released_step_add_up(tiny_flags: Flags, tmp_path: Path) -> None:
    assert main(tiny_flags(f"--steps 6 --eval-interval 0 {RELEASE}")) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    gaps = [1 - (r["phase_data_s"] + r["phase_train_s"]) / r["core_step_time_s"] for r in rows]
    assert -1e-6 < min(gaps) < 0.05, gaps  # another process may take the CPU between two phases
    shares = [r["phase_opt_step_s"] / r["phase_backward_s"] for r in rows]
    assert min(shares) < 0.2, shares  # the updates' time is in backward; left is the summing up of what they report


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--gradient-release", "--grad-clip-mode value or --grad-clip 0"),
        (f"{RELEASE} --grad-accum 2", "--grad-accum 1"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    flags: str, reason: str, tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(tiny_flags(f"--steps 2 {flags}")) == 2
    message = capsys.readouterr().err
    assert "--gradient-release" in message
    assert reason in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["--torch-compile", "--no-torch-compile"])
@pytest.mark.parametrize("optimizer", ["c3o", "adamw"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_cuda_graphs_replay_released_steps(
    weights: str, optimizer: str, compiled: str, tiny_flags: Flags, tmp_path: Path, deterministic: None
) -> None:
    fixed = f"--device cuda --batch-size 4 --seq-len 64 --steps 12 --eval-interval 0 --grad-clip 0 {compiled}"
    fixed += f" --weights-dtype {weights} --optimizer {optimizer}"
    for run, flags in {
        "ordinary": "--cuda-graph off",
        "eager": "--cuda-graph off --gradient-release",
        "graph": "--cuda-graph on --gradient-release",
    }.items():
        assert main(tiny_flags(f"{fixed} {flags}", run=run)) == 0
    settings = json.loads((tmp_path / "graph" / "config.json").read_text(encoding="utf-8"))
    assert settings["resolved"]["cuda_graph"] is True
    for run in ("eager", "graph"):
        assert learned(tmp_path / run) == learned(tmp_path / "ordinary")
        assert_same_end(tmp_path / run, tmp_path / "ordinary")


@pytest.mark.gpu
def test_cuda_profiled_steps_of_a_released_graph_run_eagerly(
    tiny_flags: Flags, tmp_path: Path, deterministic: None
) -> None:
    fixed = "--device cuda --batch-size 4 --seq-len 64 --steps 12 --eval-interval 0 --grad-clip 0"
    profile = "--perf-profile-enable --perf-warmup-steps 2 --perf-measure-steps 4 --perf-profiler-steps 2"
    assert main(tiny_flags(f"{fixed} --cuda-graph off", run="ordinary")) == 0
    assert main(tiny_flags(f"{fixed} --cuda-graph on --gradient-release {profile}", run="graph")) == 0
    assert learned(tmp_path / "graph") == learned(tmp_path / "ordinary")
