"""The real training loop around a step that computes nothing, on whatever clock and device a test has made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eco_llm.config import OptimizerConfig, TrainingConfig
from eco_llm.perf.phases import PhaseTimer
from eco_llm.training.hooks.base import Hook
from eco_llm.training.sigma_trainer import SigmaTrainer
from eco_llm.training.step import StepOutput


def stand_in_trainer(
    run: Callable[[], StepOutput], timer: PhaseTimer, hooks: Sequence[Hook], *, steps: int
) -> SigmaTrainer:
    """A trainer whose core step is `run`; it never validates, and saves only at the end."""
    stack = SimpleNamespace(
        figures=dict, observe=dict, unsaid=list, state_dict=dict, review_due=lambda step: False
    )  # fmt: skip
    parts: dict[str, Any] = {
        "training": TrainingConfig(steps=steps, save_interval=10**9, eval_interval=0),
        "optimizer": OptimizerConfig(),
        "runtime": SimpleNamespace(device=torch.device("cpu")),
        "model": SimpleNamespace(stack=stack, state_dict=dict),
        "update": SimpleNamespace(set_lr=lambda lr: None, state_dict=dict),
        "loader": SimpleNamespace(state_dict=dict),
        "step": SimpleNamespace(prepare=lambda: None, run=run),
    }
    return SigmaTrainer(
        **parts, timer=timer, validate=lambda: pytest.fail("no validation"), checkpoints=Path(), hooks=hooks
    )


def output_of(loss: float, grad_norm: float = 1.0) -> StepOutput:
    """What an applied step of this loss puts out."""
    return StepOutput(("loss", "grad_norm", "applied"), torch.tensor([loss, grad_norm, 1.0]))
