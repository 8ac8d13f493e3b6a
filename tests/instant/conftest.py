"""The device that a test runs on, and models and batches there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stack_cases import SHAPE, Build
from torch import Tensor

from eco_llm.config import InstantConfig, SigmaConfig
from eco_llm.model.sigma_llm import SigmaLLM


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, or with `-m gpu` the GPU."""
    return torch.device(request.param)


@pytest.fixture
def build(device: torch.device) -> Build:
    """`build("mode", **settings)`: the model of SHAPE with the same weights every time."""

    def make(mode: str, shape: SigmaConfig = SHAPE, **settings: Any) -> SigmaLLM:
        torch.manual_seed(0)
        return SigmaLLM(shape, InstantConfig(instant_mode=mode, **settings)).to(device)

    return make


@pytest.fixture
def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """(inputs, targets) [2, 63]."""
    text = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(1)).to(device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()
