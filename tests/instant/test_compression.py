"""`compress`: real bytes, each tensor once, no weights; gradients unbiased and near the exact ones."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from stack_cases import SHAPE, Build, kept_bytes, loss_and_gradients, total_error
from torch import Tensor

from eco_llm.instant import compression
from eco_llm.instant.compression import Bytes, Packing, is_activation


@pytest.mark.parametrize(("bits", "limit"), [("8", 0.02), ("4", 0.35)])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_near_the_exact_ones(
    bits: str, limit: float, bf16: bool, build: Build, batch: tuple[Tensor, Tensor]
) -> None:
    expected = loss_and_gradients(build("none"), batch, bf16=bf16)
    ours = loss_and_gradients(build("compress", instant_bits=bits), batch, bf16=bf16)
    if ours["loss"].is_cuda:  # the norm is a kernel of its own, which adds up otherwise
        torch.testing.assert_close(ours["loss"], expected["loss"], rtol=1e-4 if bf16 else 1e-5, atol=0)
    else:
        assert torch.equal(ours["loss"], expected["loss"])  # forward is not touched
    assert 0 < total_error(ours, expected) < limit


def test_the_mean_over_draws_is_nearer(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    expected = loss_and_gradients(build("none"), batch)
    model, draws = build("compress", instant_bits="4"), 16
    single = total_error(loss_and_gradients(model, batch), expected)
    together = loss_and_gradients(model, batch, passes=draws)
    mean = {name: value / (1 if name == "loss" else draws) for name, value in together.items()}
    assert total_error(mean, expected) < 0.4 * single  # 0.25 if draws are independent


@pytest.mark.parametrize(("bits", "least"), [("8", 1.9), ("4", 3.5)])
def test_real_bytes(bits: str, least: float, build: Build, batch: tuple[Tensor, Tensor]) -> None:
    model = build("compress", instant_bits=bits)
    loss_and_gradients(model, batch, bf16=True)
    assert model.stack.figures()["instant_compression_ratio"] >= least


def test_a_tensor_that_two_ops_keep_is_stored_once(device: torch.device) -> None:
    sizes, draw = Bytes(), torch.zeros((), dtype=torch.int64, device=device)
    x = torch.randn(2, 63, 64, device=device, requires_grad=True)
    with Packing(8, draw, (2, 63), [], sizes):
        hidden = x * 2.0
        y = hidden.sin() + hidden.view(-1, 64).square().view(2, 63, 64) + hidden.cos()
    assert sizes.before == 2 * x.numel()
    y.sum().backward()
    assert x.grad is not None
    exact = x.detach().clone().requires_grad_()
    h = exact * 2.0
    (h.sin() + h.square() + h.cos()).sum().backward()
    assert exact.grad is not None
    assert 0 < ((x.grad - exact.grad).norm() / exact.grad.norm()).item() < 0.02


def test_a_tensor_that_changed_in_place_is_stored_anew(device: torch.device) -> None:
    sizes, draw = Bytes(), torch.zeros((), dtype=torch.int64, device=device)
    x = torch.randn(2, 63, 64, device=device)
    packing = Packing(8, draw, (2, 63), [], sizes)
    with packing:
        packing.pack(x)
        packing.pack(x)
        assert sizes.before == 2 * x.numel()
        x.add_(1.0)
        packing.pack(x)
    assert sizes.before == 4 * x.numel()


def test_what_counts_as_an_activation() -> None:
    weights = {(256, 64), (64, 64)}
    inside = [torch.empty(2, 128, 64), torch.empty(2, 4, 128, 16), torch.empty(256, 32), torch.empty(2, 128, 4, 16)]
    outside = [
        torch.empty(256, 64), torch.empty(64, 256), torch.nn.Parameter(torch.empty(256, 32)), torch.empty(2, 8, 4),
        torch.empty(2, 128, 64).long(), torch.empty(3, 128, 64), torch.empty(2, 128, 80)[..., :64],
        torch.empty(128, 64),
    ]  # fmt: skip
    assert [is_activation(x, (2, 128), weights) for x in inside] == [True] * 4
    assert [is_activation(x, (2, 128), weights) for x in outside] == [False] * 8


@pytest.mark.parametrize("mode", ["8", "4"])
def test_layout_survives(mode: str, device: torch.device) -> None:
    draw = torch.zeros((), dtype=torch.int64, device=device)
    x = torch.randn(2, 4, 128, 16, device=device).transpose(1, 2)  # dense, not contiguous
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with Packing(int(mode), draw, (2, 128), [], Bytes()):
        y = leaf.sin()
    kept = y.grad_fn._saved_self  # type: ignore[union-attr]
    assert kept.shape == leaf.shape
    assert kept.stride() == leaf.stride()
    assert ((kept - leaf).norm() / leaf.norm()).item() < 0.2


def test_what_attention_keeps_of_itself_is_not_packed(
    build: Build, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an MLA mixer one tensor is stored, its input; what its forward keeps is dropped: packing it would be waste."""
    shapes: list[int] = []
    real = compression.quantize

    def spy(x: Tensor, *args: object, **kwargs: object) -> object:
        shapes.append(x.numel())
        return real(x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(compression, "quantize", spy)
    model = build("compress", instant_bits="8")
    block, x = model._blocks()[2], torch.randn(2, 63, 64, device=batch[0].device, requires_grad=True)
    model.stack.prepare(x.device)
    packing = Packing(8, model.stack._draw(2), (2, 63), [], Bytes())
    compression.recompute_from_packed(block.mixing, x, packing)
    assert shapes == [x.numel()]
    shapes.clear()
    model.stack._compressed(block, 2, x, None)
    assert (shapes == []) == x.is_cuda
    # On CUDA norms write the codes of their results, and the MLP's op those of its gate and up.
    written = 2 * 63 * (2 * 64 + block.mlp.gate_up.out_features) if x.is_cuda else 0
    assert sum(shapes) + written == model.stack.sizes.before // 2


def test_non_finite_numbers_are_not_hidden(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    model = build("compress", instant_bits="8")
    with torch.no_grad():
        model._blocks()[1].mlp.down.weight[0, 0] = float("nan")
    found = loss_and_gradients(model, batch)
    assert found["loss"].isnan()
    assert found["embedding.weight"].isnan().any()


def test_four_bits_only_where_a_probe_allows_them(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    model = build("compress", instant_error_threshold=1.0)
    assert model.stack.figures()["instant_bits"] == 8
    assert not model.stack.review_due(7)
    assert model.stack.review_due(10)
    assert model.review_memory(10, batch[0]) == ["6 of 6 blocks are kept in 4 bits"]
    assert model.stack.figures()["instant_bits"] == 4
    strict = build("compress", instant_error_threshold=1e-6)
    assert strict.review_memory(10, batch[0]) == []
    assert strict.stack.figures()["instant_bits"] == 8
    fixed = build("compress", instant_bits="8", instant_error_threshold=1.0)
    assert not fixed.stack.review_due(200)


def test_the_probe_of_coded_blocks_sees_what_they_keep(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    """The norms' results, and what MLP and Mamba mixer keep; no stream, and of an MLA mixer its input alone."""

    class Seen(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self) -> None:
            self.tensors: list[Tensor] = []
            super().__init__(lambda t: self.tensors.append(t) or t, lambda t: t)  # type: ignore[func-returns-value]

        def add(self, x: Tensor) -> None:
            self.tensors.append(x)

    model = build("compress")
    x = torch.randn(2, 63, SHAPE.d_model, device=batch[0].device, requires_grad=True)
    for block in model._blocks():
        seen = Seen()
        y = block.watched(x, seen)
        total, delta = block(x)
        torch.testing.assert_close(y, total + delta, rtol=1e-5, atol=1e-6)
        norms = {"mlp": block.mlp_norm(x + block.mix(x)), "mixer": block.mixer_norm(x)}
        kept = [t.reshape(x.shape) for t in seen.tensors if t.numel() == x.numel() and t.shape[-1] == x.shape[-1]]
        for name, normed in norms.items():
            assert any(torch.allclose(t, normed, rtol=1e-4, atol=1e-5) for t in kept), name
        for stream in (x, x + block.mix(x)):
            assert not any(torch.equal(t, stream) for t in kept)


def test_probes_leave_no_trace_in_training(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    plain, probed = build("compress"), build("compress")
    probed.review_memory(10, batch[0])
    assert all(p.grad is None for p in probed.parameters())
    first, second = loss_and_gradients(plain, batch), loss_and_gradients(probed, batch)
    assert [name for name, want in first.items() if not torch.equal(second[name], want)] == []


def test_less_is_kept(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    """Codes and scales are kept by the hooks' result, so what autograd keeps beside them is what was not packed."""
    model, plain = build("compress", instant_bits="8"), build("none")
    x = model.embedding(batch[0])
    beside = kept_bytes(model, lambda: model.stack(model._blocks(), x))
    everything = kept_bytes(plain, lambda: plain.stack(plain._blocks(), plain.embedding(batch[0])))
    assert beside + model.stack.sizes.after < 0.6 * everything
    assert SHAPE.n_layers == 6


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def ops_write_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks take the ops that write codes; everything else is as the device has it."""
    for op in ("mamba_mixer", "swiglu"):
        monkeypatch.setattr(f"eco_llm.ops.{op}.uses_triton", lambda x: True)


@pytest.mark.gpu
@pytest.mark.usefixtures("ops_write_codes")
@pytest.mark.parametrize(("bits", "limit", "least"), [("8", 0.02, 1.9), ("4", 0.35, 3.5)])
@pytest.mark.parametrize("device", ["cpu" if INTERPRETED else "cuda"], indirect=True)
def test_what_ops_write_as_codes(
    bits: str, limit: float, least: float, build: Build, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the exact gradients, in few bytes, of which hooks and recomputation pack none."""
    packed: list[int] = []
    real = compression.quantize

    def spy(x: Tensor, *args: object, **kwargs: object) -> object:
        packed.append(x.numel())
        return real(x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(compression, "quantize", spy)
    shape = dataclasses.replace(SHAPE, n_layers=3)  # two Mamba blocks and one of MLA
    model = build("compress", shape, instant_bits=bits)
    ours = loss_and_gradients(model, batch)
    mambas = shape.mixer_pattern.count("mamba")
    assert packed == []
    assert model.stack.figures()["instant_compression_ratio"] >= least
    # Codes of what a block keeps: both norms' results, gate and up, and of a Mamba mixer y, z and xBC.
    inner = shape.mamba_inner_dim
    channels = 2 * shape.d_model + 2 * shape.mlp_dim
    everything = shape.n_layers * channels + mambas * (3 * inner + 2 * shape.mamba_state_dim)
    assert model.stack.sizes.before == 2 * 2 * 63 * everything
    expected = loss_and_gradients(build("none", shape), batch)
    torch.testing.assert_close(ours["loss"], expected["loss"], rtol=1e-5, atol=0)  # the norm is another kernel
    assert 0 < total_error(ours, expected) < limit


def test_blocks_and_forwards_draw_numbers_of_their_own(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    model = build("compress")
    model.stack.prepare(batch[0].device)
    seen = set()
    for _ in range(3):
        seen |= {int(model.stack._draw(index)) for index in range(SHAPE.n_layers)}
        model.loss(*batch)
    assert len(seen) == 3 * SHAPE.n_layers
    again = build("compress")
    again.stack.prepare(batch[0].device)
    again.stack.load_state_dict(model.stack.state_dict())
    assert [int(again.stack._draw(i)) for i in range(6)] == [int(model.stack._draw(i)) for i in range(6)]
