"""Real runs to report on: two that differ in the optimizer, and one that died of a planted out-of-memory error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eco_llm.cli.main import main
from eco_llm.model.sigma_llm import SigmaLLM

NASTY = '<script>alert(1)</script> & "quotes" | pipe `tick` [link](x) \x1b[31mred'
"""A message as a driver might write it, and as somebody who means harm would."""


@pytest.fixture(scope="session")
def trained(tiny: list[str], corpus: Path, data_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `before`, `after` and `died`. Copy before changing anything."""
    folder = tmp_path_factory.mktemp("report")
    places = ["--data", str(corpus), "--data-cache", str(data_cache), "--eval-interval", "20"]
    window = ["--perf-profile-enable", "--perf-warmup-steps=5", "--perf-measure-steps=10", "--perf-profiler-steps=2"]

    def train(name: str, *more: str) -> int:
        return main([*tiny, *places, "--steps", "60", *window, *more, "--output-dir", str(folder / name)])

    assert train("before") == 0
    assert train("after", "--optimizer", "adamw", "--save-interval", "30") == 0
    with pytest.MonkeyPatch.context() as patch:
        plant_out_of_memory(patch, call=30)
        assert train("died", "--eval-interval", "0") == 3
    return folder


def plant_out_of_memory(patch: pytest.MonkeyPatch, *, call: int) -> None:
    """The model's loss runs out of memory in this call, counted from 1."""
    made, honest = 0, SigmaLLM.loss

    def loss(self: SigmaLLM, *args: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made += 1
        if made == call:
            raise torch.OutOfMemoryError(NASTY)
        return honest(self, *args)

    patch.setattr(SigmaLLM, "loss", loss)


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Callable[..., list[Path]]:
    """`runs("before", "after")`: this test's own copies, without the checkpoints."""

    def copies(*names: str) -> list[Path]:
        leave = shutil.ignore_patterns("checkpoints", "tb", "*.gz")
        return [Path(shutil.copytree(trained / name, tmp_path / name, ignore=leave)) for name in names]

    return copies


def lines_of(run: Path) -> list[dict[str, Any]]:
    """A run's log, every line of it whole."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
