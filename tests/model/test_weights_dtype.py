"""Matrices stored in bf16: the same draws, rounded; the loss of float32 weights of those values; half the bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eco_llm.config import SigmaConfig
from eco_llm.model.generation import generate
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.ops.cross_entropy import linear_cross_entropy
from eco_llm.ops.embedding import embed, tie

TINY = SigmaConfig(
    d_model=32, n_layers=3, n_heads=2, mamba_ratio=2, mamba_head_dim=64, mamba_state_dim=16, kv_latent_dim=12,
    rope_head_dim=4, mlp_hidden_dim=48, vocab_size=300, q_latent_dim=10, loss_chunk_tokens=64,
)  # fmt: skip
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALF_ROUNDING = 2**-8  # of one number; a sum of a few roundings is under twice that in norm
CHUNKS = pytest.mark.parametrize("chunk", [16, 4096], ids=["chunks", "one-chunk"])


def make_model(dtype: torch.dtype, device: str = "cpu", **changes: Any) -> SigmaLLM:
    torch.manual_seed(0)
    with torch.device(device):
        return SigmaLLM(SigmaConfig(**{**vars(TINY), **changes}), weights_dtype=dtype)


def twins(device: str = "cpu", **changes: Any) -> tuple[SigmaLLM, SigmaLLM]:
    """A model of bf16 matrices, and float32 weights of the same values."""
    narrow, wide = make_model(torch.bfloat16, device, **changes), make_model(torch.float32, device, **changes)
    wide.load_state_dict(narrow.state_dict())
    return narrow, wide


def batch(time: int = 63, device: str = "cpu") -> tuple[Tensor, Tensor]:
    text = torch.randint(300, (2, time + 1), generator=torch.Generator().manual_seed(3)).to(device)
    return text[:, :-1], text[:, 1:]


def test_matrices_are_the_same_draws_rounded_and_the_rest_is_float32() -> None:
    narrow, wide = make_model(torch.bfloat16, tie_embeddings=False), make_model(torch.float32, tie_embeddings=False)
    for (name, a), (_, b) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True):
        assert b.dtype == torch.float32
        assert a.dtype == (torch.bfloat16 if a.ndim == 2 else torch.float32), name
        assert torch.equal(a, b.to(a.dtype)), name
    for name in ("mixer.A_log", "mixer.dt_bias", "mixer.D", "mixer.conv1d.weight", "mixer.norm.weight"):
        assert dict(narrow.blocks[0].named_parameters())[name].dtype == torch.float32


def test_memory_is_two_bytes_a_number_of_a_matrix() -> None:
    narrow = make_model(torch.bfloat16)
    matrices = sum(p.numel() for p in narrow.parameters() if p.ndim == 2)
    vectors = narrow.num_parameters() - matrices
    assert sum(p.untyped_storage().nbytes() for p in narrow.parameters()) == 2 * matrices + 4 * vectors
    assert matrices > 0.9 * narrow.num_parameters()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@CHUNKS
def test_loss_and_gradients_are_those_of_float32_weights(
    compute: torch.dtype, tied: bool, chunk: int, device: str
) -> None:
    """A product reads the same numbers in either case, so that only the gradients' rounding differs."""
    models = twins(device, tie_embeddings=tied, loss_chunk_tokens=chunk)
    results = []
    for model in models:
        with torch.autocast(device, torch.bfloat16, enabled=compute == torch.bfloat16):
            loss = model.loss(*batch(device=device))
        loss.backward()
        results.append(loss.detach())
    assert results[0].dtype == torch.float32
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == a.dtype
        # Tied: the row's own gradient is rounded too before it is added, and bf16 products are rounded on a CPU anyway.
        assert (a.grad.float() - b.grad).norm() <= HALF_ROUNDING * b.grad.norm(), name


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_the_residual_stream_stays_float32(compute: torch.dtype) -> None:
    model = make_model(torch.bfloat16)
    kinds: set[torch.dtype] = set()
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: kinds.update((args[0].dtype, output[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
        model.loss(*batch())
        assert model(batch()[0]).dtype == compute
    assert kinds == {torch.float32}


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_generation_agrees_with_float32_weights(compute: torch.dtype) -> None:
    narrow, wide = twins()
    prompt = batch(17)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
        tokens = [generate(model, prompt, 9, temperature=0.0) for model in (narrow, wide)]
        caches = [model.init_cache(2, 20) for model in (narrow, wide)]
        logits = [model.prefill(prompt, cache) for model, cache in zip((narrow, wide), caches, strict=True)]
    assert torch.equal(*tokens)
    assert torch.equal(*logits)
    assert logits[0].dtype == compute


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head", [True, False], ids=["tied", "untied"])
def test_a_frequent_token_loses_nothing_in_bf16(device: str, head: bool) -> None:
    """2000 rows of one token: added one by one, the later half would round away."""
    weight = torch.zeros(7, 5, dtype=torch.bfloat16, device=device, requires_grad=True)
    ids = torch.full((2000,), 3, device=device)
    ids[::100] = 1
    rows = (1 + torch.rand(2000, 5, generator=torch.Generator().manual_seed(0))).to(device)
    table, output = tie(weight)
    loss = (embed(ids, table).float() * rows).sum() + (output.float().sum() if head else 0.0)
    (got,) = torch.autograd.grad(loss, weight)
    rounded = rows.to(torch.bfloat16).double()
    want = torch.zeros(7, 5, dtype=torch.float64, device=device).index_add_(0, ids, rounded) + float(head)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= 2 * HALF_ROUNDING * want).all()


@pytest.mark.parametrize("device", DEVICES)
def test_many_chunks_sum_a_bf16_weights_gradient_in_float32(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1024, 16, generator=generator).to(device, torch.bfloat16)
    weight = torch.randn(40, 16, generator=generator).to(device, torch.bfloat16).requires_grad_()
    targets = torch.randint(2, (1024,), generator=generator).to(device)
    exact = torch.autograd.grad(
        linear_cross_entropy(hidden.double(), weight.double(), targets, chunk_tokens=1024, backend="reference"), weight
    )[0]
    errors = []
    for chunk in (1024, 8):
        (got,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk), weight)
        assert got.dtype == torch.bfloat16
        errors.append(float((got.double() - exact.double()).norm() / exact.double().norm()))
    assert errors[1] <= 1.2 * max(errors[0], 2**-9), errors  # 128 chunks cost no digits


class Made(TorchDispatchMode):
    """Types in which tensors of one shape are made."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.kinds = shape, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and tuple(x.shape) == self.shape:
                self.kinds.add(x.dtype)
        return out


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_no_float32_matrix_is_made_of_the_vocabulary(tied: bool) -> None:
    """Neither a copy of the head nor a float32 gradient of it, where the batch is one chunk of the loss."""
    model = make_model(torch.bfloat16, tie_embeddings=tied, loss_chunk_tokens=4096, vocab_size=301)
    with Made((301, 32)) as made:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(*batch())
        loss.backward()
    assert made.kinds == {torch.bfloat16}


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_blocks_equal_eager_ones(compute: torch.dtype) -> None:
    eager = make_model(torch.bfloat16)
    compiled = copy.deepcopy(eager)
    compiled.compile_blocks("aot_eager")
    for model in (eager, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
            loss = model.loss(*batch())
        loss.backward()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == b.grad.dtype == a.dtype
        torch.testing.assert_close(b.grad, a.grad, rtol=2 * HALF_ROUNDING, atol=1e-4 * float(a.grad.abs().max()))
