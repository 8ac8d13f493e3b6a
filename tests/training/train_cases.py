"""What tests of whole runs share."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.training import checkpoint
from eco_llm.training.sigma_trainer import SigmaTrainer


def plant_nan_losses(monkeypatch: pytest.MonkeyPatch, calls: tuple[int, ...]) -> None:
    """Make the model's loss NaN in these of its calls, counted from 1."""
    made = 0
    honest = SigmaLLM.loss

    def loss(self: SigmaLLM, *args: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made += 1
        value = honest(self, *args)
        return value * float("nan") if made in calls else value

    monkeypatch.setattr(SigmaLLM, "loss", loss)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(run)]


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Weights, optimizer, cursor and generators are equal, bit for bit."""
    first, second = checkpoint.load(a), checkpoint.load(b)
    assert first.step == second.step
    assert_same_tree(first.model, second.model)
    assert_same_tree(first.optimizer, second.optimizer)
    assert_same_tree(first.trainer, second.trainer)


def assert_same_tree(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tree(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_tree(x, y)
    else:
        assert a == b


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals = signal.SIGTERM) -> None:
    """The process gets a real signal in the middle of the next step."""
    turn = SigmaTrainer._turn

    def turn_with_signal(self: SigmaTrainer, number_of_step: int) -> None:
        if number_of_step == step:
            signal.raise_signal(number)
        turn(self, number_of_step)

    monkeypatch.setattr(SigmaTrainer, "_turn", turn_with_signal)
