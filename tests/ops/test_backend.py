"""Which implementation serves a device, and the reason that is printed."""

from __future__ import annotations

import sys

import pytest
import torch

from eco_llm.config import SigmaConfig
from eco_llm.model.serving import serving_kernels
from eco_llm.ops import backend
from eco_llm.ops.onednn import products_by

CUDA = torch.device("cuda", 0)


@pytest.fixture
def cuda_machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a Hopper card, Triton and a C compiler."""
    backend.kernels_for.cache_clear()
    monkeypatch.setattr(backend, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "_c_compiler", lambda: "gcc")
    yield monkeypatch
    backend.kernels_for.cache_clear()


def test_a_cpu_takes_the_reference() -> None:
    assert backend.kernels_for(torch.device("cpu")).name == "reference"


def test_a_cpu_names_the_library_of_its_products() -> None:
    served = serving_kernels(SigmaConfig(), torch.device("cpu"), torch.float32)
    assert served.name == "reference"
    assert served.why.endswith(f"float32 products by {products_by().name}: {products_by().why}")
    assert "products" not in serving_kernels(SigmaConfig(), torch.device("cpu"), torch.bfloat16).why


def test_cuda_takes_the_kernels(cuda_machine: pytest.MonkeyPatch) -> None:
    assert backend.kernels_for(CUDA).name == "triton"


def test_no_triton_an_old_card_and_no_compiler_are_named(cuda_machine: pytest.MonkeyPatch) -> None:
    for attribute, value, reason in (
        (("find_spec"), lambda name: None, "triton-windows"),
        ("_c_compiler", lambda: None, "C compiler"),
    ):
        if attribute == "_c_compiler" and not sys.platform.startswith("linux"):
            continue
        with cuda_machine.context() as patch:
            patch.setattr(backend, attribute, value)
            backend.kernels_for.cache_clear()
            served = backend.kernels_for(CUDA)
            assert served.name == "reference"
            assert reason in served.why
    cuda_machine.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    backend.kernels_for.cache_clear()
    assert "Ampere" in backend.kernels_for(CUDA).why


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"mamba_head_dim": 32}, "head width of 32"), ({"mamba_state_dim": 256}, "state size of 256"),
     ({"mamba_expand": 16}, "inner width of 12288")],
)  # fmt: skip
def test_a_shape_that_the_mixer_does_not_take_is_named(
    change: dict[str, int], reason: str, cuda_machine: pytest.MonkeyPatch
) -> None:
    assert serving_kernels(SigmaConfig(), CUDA, torch.bfloat16).name == "triton"
    served = serving_kernels(SigmaConfig(**change), CUDA, torch.bfloat16)
    assert served.name == "reference"
    assert reason in served.why
    assert serving_kernels(SigmaConfig(**change, mamba_ratio=0), CUDA, torch.bfloat16).name == "triton"
