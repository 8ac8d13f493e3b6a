"""The whole step as one CUDA graph: a run must not be able to tell, except by its speed."""

from __future__ import annotations

import gzip
import json
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eco_llm.cli.main import main
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.optim.update import Update, UpdateResult
from eco_llm.training import checkpoint
from eco_llm.training.hooks.base import Hook
from eco_llm.training.sigma_trainer import SigmaTrainer

pytestmark = pytest.mark.gpu

Flags = Callable[..., list[str]]


@pytest.fixture
def train(tiny_flags: Flags, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`train("name", "--flags")` trains on the GPU and returns the records."""

    def run(name: str, flags: str, expected: int = 0) -> list[dict[str, Any]]:
        fixed = "--device cuda --batch-size 4 --seq-len 64 --steps 20 --eval-interval 0 --save-interval 1000"
        assert main(tiny_flags(f"{fixed} {flags}", run=name)) == expected
        log = tmp_path / name / "metrics.jsonl"
        return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []

    return run


def learned(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What training did, to the last bit; every number of a record that is no time or place."""
    return [(r["step"], r["loss"], r["grad_norm"], r["skipped_steps"], r.get("val_loss")) for r in rows]


def resolved(run: Path) -> dict[str, Any]:
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["resolved"]
    assert isinstance(settings, dict)
    return settings


def assert_same_end(a: Path, b: Path) -> None:
    first, second = (checkpoint.load(checkpoint.listing(run / "checkpoints")[-1]) for run in (a, b))
    assert first.model.keys() == second.model.keys()
    for name, value in first.model.items():
        assert torch.equal(value, second.model[name]), name
    assert first.trainer["loader"] == second.trainer["loader"]


def with_hook(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SigmaTrainer.__init__

    def init(self: SigmaTrainer, **kwargs: Any) -> None:
        original(self, **{**kwargs, "hooks": [*kwargs["hooks"], hook]})

    monkeypatch.setattr(SigmaTrainer, "__init__", init)


@pytest.mark.parametrize(
    "flags",
    [
        "--grad-accum 1",
        "--grad-accum 2 --eval-interval 7 --save-interval 5",  # evaluation and checkpoints between replays
        "--grad-accum 2 --torch-compile --eval-interval 7",
        "--grad-accum 1 --torch-compile",
        "--optimizer adamw --grad-accum 2",
        "--dtype fp32",
        "--instant-mode recompute --grad-accum 2",
        "--instant-mode coupled --torch-compile --grad-accum 2",
        "--instant-mode compress --instant-bits 8 --torch-compile",
        "--instant-mode compress --instant-error-threshold 1 --instant-int4-probe-interval 7",  # captured anew
        "--instant-mode fixed-point --instant-reversible-tol 0.5 --instant-int4-probe-interval 7",
        "--instant-mode coupled --gradient-release --grad-clip 0 --weights-dtype bf16",
    ],
)
def test_losses_are_those_of_the_eager_step(
    flags: str, train: Callable[..., Any], tmp_path: Path, deterministic: None
) -> None:
    off = train("off", f"--cuda-graph off {flags}")
    again = train("again", f"--cuda-graph off {flags}")
    assert learned(again) == learned(off), "the eager step does not repeat itself, so nothing can equal it"
    on = train("on", f"--cuda-graph on {flags}")
    assert learned(on) == learned(off)
    assert_same_end(tmp_path / "on", tmp_path / "off")
    assert (resolved(tmp_path / "on")["cuda_graph"], resolved(tmp_path / "off")["cuda_graph"]) == (True, False)
    assert learned(on)[0][1] != learned(on)[-1][1]


def test_auto_takes_the_graph_and_says_so(
    train: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train("auto", "--steps 2")
    assert resolved(tmp_path / "auto")["cuda_graph"] is True
    assert "one CUDA graph" in capsys.readouterr().out
    train("muon", "--steps 2 --optimizer muon")
    assert resolved(tmp_path / "muon")["cuda_graph"] is False


@pytest.mark.parametrize("after", ["on", "off"])
def test_stopping_and_resuming_changes_nothing(
    after: str, train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2N steps at once, and N, a signal, a resume with or without the graph, and N."""
    settings = "--grad-accum 2 --save-interval 4"
    whole = train("whole", f"--cuda-graph on {settings}")
    turn = SigmaTrainer._turn

    def turn_with_signal(self: SigmaTrainer, step: int) -> None:
        if step == 10:
            signal.raise_signal(signal.SIGTERM)
        turn(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(SigmaTrainer, "_turn", turn_with_signal)
        train("parts", f"--cuda-graph on {settings}", expected=143)
    parts = train("parts", f"--cuda-graph {after} {settings}")
    assert learned(parts) == learned(whole)
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


def test_a_step_that_is_not_finite_changes_nothing_inside_the_graph(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = torch.ones((), device="cuda")

    class Poisoner(Hook):
        def on_step(self, step: int) -> None:
            poison.fill_(float("nan") if step in (3, 4) else 1.0)

    honest = SigmaLLM.loss
    monkeypatch.setattr(SigmaLLM, "loss", lambda self, *args: honest(self, *args) * poison)
    with_hook(Poisoner(), monkeypatch)
    rows = train("run", "--cuda-graph on --steps 6 --save-interval 1 --keep-checkpoints 9")
    assert [r["skipped_steps"] for r in rows] == [0, 0, 1, 2, 2, 2]
    states = [checkpoint.load(p).model for p in checkpoint.listing(tmp_path / "run" / "checkpoints")]
    for name, value in states[1].items():
        assert torch.equal(value, states[3][name]), name
    assert not torch.equal(states[3]["embedding.weight"], states[4]["embedding.weight"])
    for name, value in states[-1].items():
        assert torch.isfinite(value).all(), name


def test_replayed_steps_never_synchronise(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Guard(Hook):
        def on_step(self, step: int) -> None:
            torch.cuda.set_sync_debug_mode("error" if 2 <= step <= 20 else "default")

        def on_end(self) -> None:
            torch.cuda.set_sync_debug_mode("default")

    with_hook(Guard(), monkeypatch)
    rows = train("run", "--cuda-graph on --steps 22 --grad-accum 2")
    assert [r["step"] for r in rows] == list(range(1, 23))
    assert all(r["phase_backward_s"] > 0 for r in rows)


@pytest.mark.parametrize("accum", [1, 2])
def test_phases_of_a_replay_add_up_and_are_those_of_the_eager_step(accum: int, train: Callable[..., Any]) -> None:
    big = (
        "--d-model 512 --n-layers 6 --n-heads 8 --mamba-ratio 5 --mamba-head-dim 64 --mamba-state-dim 64"
        f" --vocab-size 4096 --batch-size 8 --seq-len 512 --steps 24 --grad-accum {accum}"
    )
    rows = train("on", f"--cuda-graph on {big}")[4:-1]
    covered = statistics.median((r["phase_data_s"] + r["phase_train_s"]) / r["core_step_time_s"] for r in rows)
    assert covered == pytest.approx(1, rel=0.02)
    for name in ("forward", "backward", "opt_step"):
        assert all(r[f"phase_{name}_s"] > 0 for r in rows), name
    assert statistics.median(r["phase_zero_grad_s"] for r in rows) < 1e-4
    backward, forward = (statistics.median(r[f"phase_{p}_s"] for r in rows) for p in ("backward", "forward"))
    assert 1 < backward / forward < 5


def test_profiled_steps_run_eagerly_and_change_nothing(train: Callable[..., Any], tmp_path: Path) -> None:
    plain = train("plain", "--cuda-graph on --grad-accum 2")
    window = "--perf-profile-enable --perf-warmup-steps 3 --perf-measure-steps 4 --perf-profiler-steps 3"
    assert learned(train("traced", f"--cuda-graph on --grad-accum 2 {window}")) == learned(plain)
    assert_same_end(tmp_path / "traced", tmp_path / "plain")
    with gzip.open(tmp_path / "traced" / "perf" / "trace.json.gz", "rt", encoding="utf-8") as f:
        trace = f.read()
    for name in ("eco/forward", "eco/backward", "eco/opt_step"):
        assert trace.count(f'"{name}"') >= 3, name


def uncapturable(self: Update, loss: torch.Tensor, *, honest: Any = Update.step) -> UpdateResult:
    if torch.cuda.is_current_stream_capturing():
        loss.item()
    result = honest(self, loss)
    assert isinstance(result, UpdateResult)
    return result


def test_auto_goes_on_without_a_graph_when_capture_fails_and_says_so(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    off = train("off", "--cuda-graph off --eval-interval 7")
    monkeypatch.setattr(Update, "step", uncapturable)
    assert learned(train("auto", "--eval-interval 7")) == learned(off)
    assert "could not be captured in a CUDA graph" in capsys.readouterr().out
    settings = resolved(tmp_path / "auto")
    assert settings["cuda_graph"] is False
    assert settings["cuda_graph_failure"]
    torch.manual_seed(0)  # the failed capture must not keep the default generator: sampling and dropout draw from it
    drawn = torch.rand(8, device="cuda")
    fresh = torch.rand(8, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    assert torch.equal(drawn, fresh)


def test_on_crashes_cleanly_when_capture_fails(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Update, "step", uncapturable)
    train("on", "--cuda-graph on", expected=1)
    assert "--cuda-graph off trains without a graph" in capsys.readouterr().out
    (report,) = (tmp_path / "on" / "errors").glob("crash_*.json")
    assert json.loads(report.read_text(encoding="utf-8"))["exception"] == "CaptureError"
    monkeypatch.undo()
    assert learned(train("off", "--cuda-graph on --steps 4"))[-1][0] == 4  # the process can still capture
