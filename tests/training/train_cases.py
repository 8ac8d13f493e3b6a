"""What tests of whole runs share."""

from __future__ import annotations

import pytest
import torch

from eco_llm.model.sigma_llm import SigmaLLM


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
