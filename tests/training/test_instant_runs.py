"""Whole runs in every memory mode: what INSTANT decides survives a resume, and a trip harms nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_graph import SHAPE, Parts, StandIn, parts, train
from torch import Tensor
from train_cases import assert_same_checkpoint, assert_same_tree, losses, records, stop_after

from eco_llm.cli.main import main
from eco_llm.instant import stack
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.training import checkpoint
from eco_llm.training.graph import GraphedStep

Flags = Callable[..., list[str]]

STEADY = "--lr 1e-4 --eval-interval 0"
MODES = [
    "recompute", "coupled", "compress", "fixed-point --instant-reversible-tol 0.1", "none,compress,recompute",
]  # fmt: skip


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reviews and probes early enough for runs of a dozen steps."""
    monkeypatch.setattr(stack, "GATE_REVIEW", 2)
    monkeypatch.setattr(stack, "EARLY_PROBES", (2,))


@pytest.mark.parametrize("mode", MODES)
def test_stopping_and_resuming_changes_nothing(
    mode: str, often: None, tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probing = "--instant-int4-probe-interval 4 --instant-error-threshold 0.9"
    if mode.startswith("fixed-point"):  # as late in training: a large stream, to which each sub-layer adds little
        reset = SigmaLLM.reset_parameters

        def large_stream(self: SigmaLLM) -> None:
            reset(self)
            with torch.no_grad():
                self.embedding.weight.mul_(50)

        monkeypatch.setattr(SigmaLLM, "reset_parameters", large_stream)
    settings = f"--steps 8 --save-interval 3 {STEADY} --grad-accum 2 {probing} --instant-mode {mode}"
    assert main(tiny_flags(settings, run="whole")) == 0
    with monkeypatch.context() as patched:
        stop_after(4, patched)
        assert main(tiny_flags(settings, run="parts")) == 143
    assert main(tiny_flags(settings, run="parts")) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_checkpoint(
        tmp_path / "whole" / "checkpoints" / "step_00000008", tmp_path / "parts" / "checkpoints" / "step_00000008"
    )
    last = records(tmp_path / "whole")[-1]
    if mode == "compress":
        assert last["instant_bits"] == 4
        assert last["instant_compression_ratio"] > 3
    if mode.startswith("fixed-point"):
        assert last["instant_inverted_blocks"] >= 1
        assert last["instant_inversion_iters"] >= 1
        assert 0 < last["instant_inversion_rel_residual"] <= 0.1
    if mode == "coupled":
        assert last["instant_gate_trips"] == 0
        assert last["instant_reconstruction_error"] == 0


def test_a_run_may_go_on_in_another_mode_but_not_in_another_form(
    tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(tiny_flags(f"--steps 2 {STEADY}")) == 0
    assert main(tiny_flags(f"--steps 4 {STEADY} --instant-mode recompute")) == 0
    assert main(tiny_flags(f"--steps 6 {STEADY} --instant-mode compress")) == 0
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    resumed = json.loads((tmp_path / "run" / "config.json").read_text())["resumed"]
    assert [entry["changed"]["instant_mode"] for entry in resumed] == [["none", "recompute"], ["recompute", "compress"]]
    assert main(tiny_flags(f"--steps 8 {STEADY} --instant-mode coupled")) == 2
    assert "--instant-mode compress → coupled" in capsys.readouterr().err


def test_the_coupled_form_is_remembered(tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = "--steps 4 --lr 1e-2 --eval-interval 4 --sample-tokens 0 --instant-mode coupled"
    assert main(tiny_flags(settings)) == 0
    expected = records(tmp_path / "run")[-1]["val_loss"]
    capsys.readouterr()
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--batches", "2", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_run_of_the_earlier_coupled_network_is_refused(
    tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Never continued or read as the network of now; what it left stays as it is."""
    settings = f"--steps 2 {STEADY} --instant-mode coupled"
    assert main(tiny_flags(settings)) == 0
    file = tmp_path / "run" / "config.json"
    content = json.loads(file.read_text())
    assert content["resolved"].pop("coupled_form") == "blocks"
    file.write_text(json.dumps(content))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    run = ["--run", str(tmp_path / "run"), "--device", "cpu"]
    for command in (tiny_flags(settings), ["evaluate", *run], ["sample", *run]):
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err.strip()
        assert "as an earlier version had it" in error
        assert error.endswith("or train it anew (`eco_train train` with --no-resume or another --output-dir)")
        assert len(error.splitlines()) == 1
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert main(tiny_flags(f"{settings} --no-resume")) == 0
    assert (tmp_path / "run" / "previous" / "001" / "config.json").exists()


def test_bad_modes_are_refused_before_anything_is_written(
    tiny_flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for mode in ("fast", "none*7", "coupled,none,none"):
        assert main(tiny_flags(f"--steps 2 --instant-mode {mode}")) == 2
        error = capsys.readouterr().err.strip()
        assert "--instant-mode" in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_trip_is_counted_logged_and_not_applied(
    often: None, tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Backward rebuilds another state than forward had in steps 3 and 4; from the review on everything is kept."""
    from eco_llm.instant import coupled

    honest, forwards = coupled.retreat, 0

    def counted(blocks: object, x: Tensor, gate: object) -> Tensor:
        nonlocal forwards
        forwards += 1
        return genuine(blocks, x, gate)  # type: ignore[arg-type]

    def wrong(c: Tensor, *ys: Tensor, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
        return honest(c + 1 if forwards in (3, 4) else c, *ys, **how)

    genuine = stack.coupled
    monkeypatch.setattr(stack, "coupled", counted)
    monkeypatch.setattr(coupled, "retreat", wrong)
    settings = "--steps 8 --save-interval 1 --keep-checkpoints 9 --max-bad-steps 1 --lr 1e-2 --eval-interval 0"
    assert main(tiny_flags(f"{settings} --instant-mode coupled")) == 0
    rows = records(tmp_path / "run")
    assert [r["skipped_steps"] for r in rows] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert rows[1]["instant_gate_trips"] == 0
    assert rows[-1]["instant_gate_trips"] >= 2
    assert rows[-1]["instant_fallback"] == 1
    assert forwards == 4  # then the stored form
    states = [checkpoint.load(p).model for p in checkpoint.listing(tmp_path / "run" / "checkpoints")]
    assert torch.equal(states[1]["embedding.weight"], states[3]["embedding.weight"])
    assert not torch.equal(states[3]["embedding.weight"], states[4]["embedding.weight"])
    assert "the gate tripped at block" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["recompute", "coupled", "compress", "fixed-point", "none,recompute,none"])
def test_released_updates_are_the_ordinary_ones(mode: str, tiny_flags: Flags, tmp_path: Path) -> None:
    """An update inside backward changes weights that nested backwards still have to recompute with, or it would."""
    settings = f"--steps 4 --lr 1e-2 --eval-interval 0 --grad-clip 0 --instant-mode {mode}"
    assert main(tiny_flags(settings, run="ordinary")) == 0
    assert main(tiny_flags(f"{settings} --gradient-release", run="released")) == 0
    ends = [checkpoint.load(checkpoint.listing(tmp_path / r / "checkpoints")[-1]) for r in ("ordinary", "released")]
    assert_same_tree(ends[0].model, ends[1].model)
    assert_same_tree(ends[0].optimizer["state"], ends[1].optimizer["state"])
    assert records(tmp_path / "released")[-1]["skipped_steps"] == 0


def test_a_trip_stops_released_updates_before_they_are_made(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reconstruction is wrong: no block's update, and not the embedding's, may be applied."""
    from eco_llm.instant import coupled

    honest = coupled.retreat

    def wrong(c: Tensor, *ys: Tensor, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
        return honest(c + 1, *ys, **how)

    monkeypatch.setattr(coupled, "retreat", wrong)
    settings = "--steps 3 --save-interval 1 --keep-checkpoints 9 --lr 1e-2 --eval-interval 0 --grad-clip 0"
    assert main(tiny_flags(f"{settings} --instant-mode coupled --gradient-release")) == 0
    assert [r["skipped_steps"] for r in records(tmp_path / "run")] == [1, 2, 3]
    first, last = (checkpoint.load(checkpoint.listing(tmp_path / "run" / "checkpoints")[i]).model for i in (0, -1))
    assert_same_tree(first, last)


def test_a_gate_does_not_hide_a_loss_that_is_not_finite(
    tiny_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = SigmaLLM.loss
    monkeypatch.setattr(SigmaLLM, "loss", lambda self, *a: honest(self, *a) * float("inf"))
    assert main(tiny_flags("--steps 50 --max-bad-steps 3 --eval-interval 0 --instant-mode coupled")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["coupled", "fixed-point", "compress"])  # changes; blocks run again; hooks
def test_compiled_modes_train_to_the_same_losses(mode: str, tiny_flags: Flags, tmp_path: Path) -> None:
    settings = f"--steps 3 {STEADY} --instant-mode {mode} --instant-bits 8"
    assert main(tiny_flags(settings, run="eager")) == 0
    assert main(tiny_flags(f"{settings} --torch-compile", run="compiled")) == 0
    for (_, a, _), (_, b, _) in zip(losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True):
        assert a == pytest.approx(b, abs=1e-3 if mode == "compress" else 1e-4)
    assert records(tmp_path / "compiled")[-1]["skipped_steps"] == 0


class Discarding(StandIn):
    """A stand-in that knows whether it was given back."""

    discarded = False

    def discard(self) -> None:
        self.discarded = True


def test_a_decision_makes_the_graph_anew() -> None:
    made: list[Discarding] = []
    p: Parts = parts()

    def make(device: torch.device) -> Discarding:
        made.append(Discarding(p.parameters(), p.update.optimizer))
        return made[-1]

    asked: list[bool] = []
    prepare = p.step.prepare

    def counted(*, again: bool = False) -> None:
        asked.append(again)
        prepare(again=again)

    p.step.prepare = counted  # type: ignore[method-assign]
    step = GraphedStep(p.step, SHAPE, fall_back=None, make_graph=make)  # type: ignore[arg-type]
    train(p, step, 2)
    p.step.review = lambda number: []  # type: ignore[method-assign]
    assert step.review(2) == []
    train(p, step, 1)
    assert [m.replays for m in made] == [3]
    p.step.review = lambda number: ["changed"]  # type: ignore[method-assign]
    assert step.review(3) == ["changed"]
    assert made[0].discarded
    values = train(p, step, 2)
    assert [m.replays for m in made] == [3, 2]
    assert asked == [True, True]  # the optimizer makes anew, before each capture, what a capture uses up
    assert all(v == v for row in values for v in row)
