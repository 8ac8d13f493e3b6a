"""Validation: an exact mean over counted tokens, in bits per byte too, and the model's mode given back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eco_llm.config import VALIDATION_TOKENS, validation_rows
from eco_llm.runtime import Runtime
from eco_llm.training.evaluation import Validation, evaluate

CPU = Runtime(torch.device("cpu"), torch.float32, compile=False)
Batches = list[tuple[Tensor, Tensor]]


class TableModel(nn.Module):
    """Logits of a token are a row of a table; remembers how it was called."""

    def __init__(self, vocab: int = 11) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(1)))
        self.calls: list[tuple[bool, bool, bool]] = []
        self.shapes: list[tuple[int, ...]] = []

    def loss_sum(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled(inputs.device.type)))
        self.shapes.append(tuple(inputs.shape))
        logits = self.table[inputs].flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum"), (targets != -100).sum()


def score(model: nn.Module, batches: Batches, *, runtime: Runtime = CPU, bytes_per_token: float = 1.0) -> Validation:
    fake: Any = model
    return evaluate(fake, iter(batches), runtime, bytes_per_token=bytes_per_token)


def batches_of(*shapes: tuple[int, int], ignored: float = 0.0) -> Batches:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for shape in shapes:
        inputs = torch.randint(11, shape, generator=generator)
        targets = torch.randint(11, shape, generator=generator)
        targets[torch.rand(shape, generator=generator) < ignored] = -100
        batches.append((inputs, targets))
    return batches


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_the_mean_weighs_every_counted_token_alike(ignored: float) -> None:
    model = TableModel()
    batches = batches_of((4, 63), (1, 7), (3, 1), ignored=ignored)
    logits = model.table.detach().double().log_softmax(-1)
    nats = [
        -float(logits[i, t])
        for inputs, targets in batches
        for i, t in zip(inputs.flatten().tolist(), targets.flatten().tolist(), strict=True)
        if t != -100
    ]
    result = score(model, batches, bytes_per_token=3.25)
    assert result.tokens == len(nats)
    assert result.loss == pytest.approx(math.fsum(nats) / len(nats), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 3.25, rel=1e-12)


def test_a_large_batch_is_scored_in_parts() -> None:
    """What is scored at once lies beside the memory of a CUDA graph; the mean is that of the whole."""
    model, (batch,) = TableModel(), batches_of((11, VALIDATION_TOKENS // 4), ignored=0.3)
    result = score(model, [batch])
    assert [rows for rows, _ in model.shapes] == [4, 4, 3]
    inputs, targets = batch
    whole, count = model.loss_sum(inputs, targets)
    assert result.tokens == int(count)
    assert result.loss == pytest.approx(float(whole) / int(count), rel=1e-6)


PARTS = [
    (4, 512, [4]), (64, 1024, [8] * 8), (12, 1024, [6, 6]), (20, 1024, [7, 7, 6]), (9, 1024, [5, 4]), (1, 1024, [1]),
    (3, 8192, [1] * 3), (2, 9000, [1] * 2),
]  # fmt: skip


@pytest.mark.parametrize(("batch", "length", "parts"), PARTS)
def test_sequences_scored_at_once(batch: int, length: int, parts: list[int]) -> None:
    assert [len(part) for part in torch.zeros(batch).split(validation_rows(batch, length))] == parts


def test_a_uniform_guess_over_bytes_costs_eight_bits() -> None:
    model = TableModel(256)
    model.table.data.zero_()
    result = score(model, batches_of((2, 16)))
    assert result.bits_per_byte == pytest.approx(8.0, rel=1e-6)


def test_a_long_sum_keeps_its_digits() -> None:
    model = TableModel()
    one = score(model, batches_of((8, 64)))
    many = score(model, batches_of((8, 64)) * 400)  # a float32 sum of 400 like terms would drift
    assert many.loss == pytest.approx(one.loss, rel=1e-12)


@pytest.mark.parametrize("batches", [[], [(torch.zeros(2, 3).long(), torch.full((2, 3), -100))]], ids=["none", "-100"])
def test_no_token_to_score(batches: Batches) -> None:
    model = TableModel()
    with pytest.raises(ValueError, match="no token"):
        score(model, batches)
    assert model.training


def test_the_model_is_scored_in_evaluation_mode_without_gradients() -> None:
    model = TableModel()
    score(model, batches_of((1, 4), (1, 4)))
    assert model.calls == [(False, False, False)] * 2
    assert model.training
    assert torch.is_grad_enabled()
    score(model, batches_of((1, 4)), runtime=Runtime(torch.device("cpu"), torch.bfloat16, compile=False))
    assert model.calls[-1] == (False, False, True)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_given_back(training: bool) -> None:
    model = TableModel().train(training)
    score(model, batches_of((1, 4)))
    assert model.training is training
    with pytest.raises(IndexError):
        score(model, [(torch.full((1, 4), 99), torch.zeros(1, 4).long())])
    assert model.training is training


def test_a_loss_that_is_not_finite_is_reported_as_it_is() -> None:
    model = TableModel()
    model.table.data[3] = math.nan
    assert math.isnan(score(model, [(torch.full((1, 2), 3), torch.zeros(1, 2).long())]).loss)


@pytest.mark.gpu
def test_on_a_gpu_in_bf16() -> None:
    model = TableModel()
    batches = batches_of((4, 63), (2, 5), ignored=0.2)
    expected = score(model, batches)
    runtime = Runtime(torch.device("cuda"), torch.bfloat16, compile=False)
    got = score(model.cuda(), [(a.pin_memory(), b.pin_memory()) for a, b in batches], runtime=runtime)
    assert got.tokens == expected.tokens
    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
