"""`fixed-point`: gradients as good as the tolerance says, and a gate for blocks that do not contract."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stack_cases import SHAPE, Build, loss_and_gradients, worst_error
from torch import Tensor

from eco_llm.instant.fixed_point import ROWS, Run, errors_by_iteration, fixed_point, iterations_needed
from eco_llm.instant.replay import Setting
from eco_llm.instant.verification import Gate
from eco_llm.model.sigma_llm import SigmaLLM


class Scale(torch.nn.Module):
    """f(x) = slope · x: y = x + f(x) is undone if |slope| < 1, the error shrinking by |slope| in each iteration."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(slope))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.slope


class Halves(torch.nn.Module):
    def __init__(self, mix: float, feed: float) -> None:
        super().__init__()
        self.mix, self.feed = Scale(mix), Scale(feed)

    @property
    def sub_layers(self) -> tuple[Scale, Scale]:
        return self.mix, self.feed


def test_errors_shrink_as_the_theory_says(device: torch.device) -> None:
    x = torch.randn(2, 9, 8, device=device)
    y, errors = errors_by_iteration(Scale(0.5).to(device), x, 6, Setting.now(x))
    torch.testing.assert_close(y, 1.5 * x)
    torch.testing.assert_close(errors, torch.tensor([0.5 ** (k + 1) for k in range(1, 7)], device=device))
    _, growing = errors_by_iteration(Scale(1.5).to(device), x, 4, Setting.now(x))
    assert (growing[1:] > growing[:-1]).all()


def test_iterations_needed() -> None:
    assert iterations_needed([0.5, 0.1, 0.01], 0.1) == 2
    assert iterations_needed([0.5, 0.1, 0.01], 0.001) is None
    assert iterations_needed([float("nan")] * 3, 1.0) is None


@pytest.mark.parametrize(("slope", "trips"), [(0.2, False), (0.9, True), (-1.5, True)])
def test_the_gate_lets_through_what_converged(slope: float, trips: bool, device: torch.device) -> None:
    blocks = [Halves(0.1, 0.1).to(device), Halves(slope, 0.1).to(device)]
    gate = Gate(3, device)
    x = torch.randn(2, 9, 8, device=device, requires_grad=True)
    y = fixed_point(Run(1, blocks, [(4, 4), (4, 4)], 1e-3), x, gate)
    y.square().sum().backward()
    exact = x.detach().clone().requires_grad_()
    z = exact
    for block in blocks:
        for f in block.sub_layers:
            z = z + f(z)
    z.square().sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    verdicts = gate.values()[3:].tolist()
    assert (verdicts[0], verdicts[2]) == (0.0, float(trips))
    assert trips or verdicts[1] == 0.0  # a block before one that failed was rebuilt from a wrong state
    if not trips:
        torch.testing.assert_close(x.grad, exact.grad, rtol=1e-2, atol=1e-4)


def contractive(model: SigmaLLM) -> SigmaLLM:
    """Late training in miniature: a large stream, to which each sub-layer adds little."""
    with torch.no_grad():
        model.embedding.weight.mul_(50)
    return model


@pytest.mark.parametrize("tolerance", [2e-3, 3e-3, 1e-4])
def test_gradients_are_as_good_as_the_tolerance(tolerance: float, build: Build, batch: tuple[Tensor, Tensor]) -> None:
    expected = loss_and_gradients(contractive(build("none")), batch)
    model = contractive(build("fixed-point", instant_reversible_tol=tolerance))
    loss_and_gradients(model, batch)
    assert model.stack.figures() == {"instant_inverted_blocks": 0}  # nothing is inverted before a probe
    said = model.review_memory(200, batch[0])
    assert len(said) == 1
    figures = model.stack.figures()
    assert figures["instant_inverted_blocks"] == 4
    ours = loss_and_gradients(model, batch, passes=1)
    values = dict(zip(*(list(part) for part in model.stack.metrics_tensor()), strict=True))  # type: ignore[arg-type]
    assert 0 < values["instant_inversion_rel_residual"] <= tolerance
    assert values["instant_tripped_blocks"] == 0
    if ours["loss"].is_cuda:  # the norm is one kernel in a whole block, PyTorch's in a half: sums in another order
        torch.testing.assert_close(ours["loss"], expected["loss"], rtol=1e-5, atol=0)
    else:
        assert torch.equal(ours["loss"], expected["loss"])
    assert 0 < worst_error(ours, expected) <= 10 * tolerance


def test_more_iterations_for_a_smaller_tolerance(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    counts = []
    for tolerance in (1e-2, 3e-3, 1e-4):
        model = contractive(build("fixed-point", instant_reversible_tol=tolerance))
        model.review_memory(200, batch[0])
        counts.append(model.stack.figures()["instant_inversion_iters"])
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_blocks_that_do_not_contract_are_recomputed(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    model = build("fixed-point", instant_reversible_tol=1e-5, instant_max_iters=2)  # as initialised: not one contracts
    model.review_memory(200, batch[0])
    assert model.stack.figures() == {"instant_inverted_blocks": 0}
    expected = loss_and_gradients(build("none"), batch)
    assert worst_error(loss_and_gradients(model, batch), expected) < 1e-6


def test_a_trip_refuses_the_step_and_falls_back(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    model = contractive(build("fixed-point"))
    model.review_memory(200, batch[0])
    with torch.no_grad():  # the weights move far away from what was probed
        model._blocks()[3].mixer.out_proj.weight.mul_(200)
    found = loss_and_gradients(model, batch)
    assert model.stack.guard(found["loss"]).isnan()
    names, values = model.stack.metrics_tensor()
    assert values is not None
    record = model.stack.observe(dict(zip(names, values.tolist(), strict=True)))
    assert record["instant_gate_trips"] >= 1
    assert not any(name.startswith("instant_tripped_block_") for name in record)
    assert model.stack.review_due(208)
    said = model.review_memory(208, batch[0])
    assert any("block 3" in text and "not applied" in text for text in said), said
    expected = build("none")
    expected.load_state_dict(model.state_dict())
    ours = loss_and_gradients(model, batch)
    assert model.stack.guard(ours["loss"]).isfinite()
    assert worst_error(ours, loss_and_gradients(expected, batch)) < 0.05


def test_after_trips_a_block_must_do_better(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    model = contractive(build("fixed-point"))
    model.review_memory(200, batch[0])
    before = model.stack.state_dict()["iterations"]
    for step in (208, 216, 224, 232, 240, 248):
        for _ in range(8):  # one event lasts until the review
            model.stack.observe({"loss": 1.0, "instant_tripped_block_0": 1.0})
        model.review_memory(step, batch[0])
        assert model.stack.state_dict()["iterations"][0] is None
    assert model.stack.state_dict()["trips"][0] == 48
    assert model.stack.state_dict()["strikes"] == [4, 0, 0, 0, 0, 0]
    model.review_memory(400, batch[0])
    after = model.stack.state_dict()["iterations"]
    assert sum(after[0]) > sum(before[0])
    assert after[1:] == before[1:]


def test_decisions_fall_with_the_settings_that_they_rest_on(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    model = contractive(build("fixed-point", instant_reversible_tol=0.1))
    model.review_memory(200, batch[0])
    saved = model.stack.state_dict()
    assert model.stack.figures()["instant_inverted_blocks"] == 4
    same, stricter = build("fixed-point", instant_reversible_tol=0.1), build("fixed-point", instant_reversible_tol=2e-3)
    same.stack.load_state_dict(saved)
    assert same.stack.state_dict() == saved
    stricter.stack.load_state_dict(saved)
    assert stricter.stack.figures()["instant_inverted_blocks"] == 0
    assert not stricter.stack.review_due(200)
    assert stricter.stack.review_due(208)  # a probe that the mode has not had yet


def test_what_is_kept_is_one_output_a_run(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    from stack_cases import kept_bytes

    shape = dataclasses.replace(SHAPE, n_layers=12, mamba_ratio=12, attention_ratio=0)
    model = contractive(build("fixed-point", shape))
    x = model.embedding(batch[0])
    one = batch[0].numel() * SHAPE.d_model * 4
    assert kept_bytes(model, lambda: model.stack(model._blocks(), x)) == 12 * one  # recomputed: no probe yet
    model.review_memory(200, batch[0])
    assert model.stack.figures()["instant_inverted_blocks"] == 12
    kept = kept_bytes(model, lambda: model.stack(model._blocks(), x))
    assert kept == one + 12 * ROWS // 64 * 63 * SHAPE.d_model * 4  # 126 rows, every second
