"""The model on CUDA: float32 against the CPU, bf16 autocast against float32, no host sync, compiled = eager."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from eco_llm.config import SigmaConfig
from eco_llm.errors import UserError
from eco_llm.model.generation import generate
from eco_llm.model.sigma_llm import SigmaLLM

pytestmark = pytest.mark.gpu

CONFIG = SigmaConfig(
    d_model=128, n_layers=6, n_heads=2, mamba_ratio=2, mamba_state_dim=32, kv_latent_dim=32, rope_head_dim=16,
    vocab_size=512, loss_chunk_tokens=64, q_latent_dim=48,
)  # fmt: skip


def make_model(device: str = "cuda") -> SigmaLLM:
    torch.manual_seed(0)
    return SigmaLLM(CONFIG).to(device)


def batch(time: int = 200, device: str = "cuda") -> tuple[Tensor, Tensor]:
    text = torch.randint(512, (2, time + 1), generator=torch.Generator().manual_seed(1)).to(device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def loss_and_gradients(model: SigmaLLM, ids: Tensor, targets: Tensor, bf16: bool = False) -> dict[str, Tensor]:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        loss = model.loss(ids, targets)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    names = (name for name, _ in model.named_parameters())
    return {"loss": loss.detach()} | dict(zip(names, grads, strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative errors in norm. A gradient under a thousandth of all of them together is compared with that share:
    over one token, rates and queries have none at all."""
    everything = sum(want.double().norm().item() ** 2 for name, want in expected.items() if name != "loss") ** 0.5
    for name, want in expected.items():
        got, want = actual[name].double().cpu(), want.double().cpu()
        error = (got - want).norm() / want.norm().clamp(min=1e-3 * everything)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@pytest.fixture
def syncs_are_errors() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("time", [1, 63, 200])
def test_float32_equals_cpu(time: int) -> None:
    expected = loss_and_gradients(make_model("cpu"), *batch(time, "cpu"))
    assert_close(loss_and_gradients(make_model(), *batch(time)), expected, 2e-4)


@pytest.mark.parametrize("time", [1, 63, 200])
def test_bf16_autocast_is_close_to_float32(time: int) -> None:
    model = make_model()
    assert_close(loss_and_gradients(model, *batch(time), bf16=True), loss_and_gradients(model, *batch(time)), 0.1)


@pytest.mark.parametrize("time", [200, 1600])  # PyTorch's embedding has another backward above 3,072 tokens
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.usefixtures("syncs_are_errors")
def test_loss_and_backward_never_wait_for_the_device(bf16: bool, time: int) -> None:
    model, (ids, targets) = make_model(), batch(time)
    loss_and_gradients(model, ids, targets, bf16)  # first calls may initialise libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        loss = model.loss(ids, targets)
        total, count = model.loss_sum(ids, targets)
    loss.backward()
    (total / count).backward()


@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_blocks_equal_eager(bf16: bool) -> None:
    torch._dynamo.reset()
    expected = loss_and_gradients(make_model(), *batch(), bf16)
    compiled = make_model()
    compiled.compile_blocks()
    assert_close(loss_and_gradients(compiled, *batch(), bf16), expected, 0.1 if bf16 else 2e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_generation_equals_full_forward(bf16: bool) -> None:
    model, (ids, _) = make_model(), batch(80)
    with torch.no_grad():
        full = model(ids)[:, -1]
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        cache = model.init_cache(2, 80)
        model.prefill(ids[:, :70], cache)
        for t in range(70, 80):
            logits = model.step(ids[:, t], cache)
        text = generate(model, ids, 5, top_k=50, generator=torch.Generator("cuda").manual_seed(0))
    assert_close({"logits": logits}, {"logits": full}, 0.05 if bf16 else 2e-4)
    assert text.shape == (2, 85)


def test_chunk_of_256_compiles_or_is_refused() -> None:
    """torch 2.11's compiler fails inside on it; the user must not meet that trace."""
    torch.manual_seed(0)
    model = SigmaLLM(dataclasses.replace(CONFIG, mamba_chunk=256, n_layers=1)).cuda()
    if torch.__version__ < (2, 13):
        with pytest.raises(UserError, match="--mamba-chunk 256"):
            model.compile_blocks()
    else:
        torch._dynamo.reset()
        expected = loss_and_gradients(model, *batch(512), bf16=True)
        model.compile_blocks()
        assert_close(loss_and_gradients(model, *batch(512), bf16=True), expected, 0.1)
