"""`recompute` and `coupled`: the same bits as with everything stored, and a gate that nothing passes silently."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from stack_cases import SHAPE, Build, kept_bytes, loss_and_gradients
from torch import Tensor

from eco_llm.config import C3OConfig, InstantConfig, OptimizerConfig
from eco_llm.instant.coupled import coupled, coupled_stored
from eco_llm.instant.verification import Gate
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.ops.grid import RANGE, STEP, advance, checksums, retreat
from eco_llm.optim.factory import build_optimizer
from eco_llm.optim.update import Update


def stored(model: SigmaLLM, monkeypatch: pytest.MonkeyPatch) -> SigmaLLM:
    """The coupled network with everything kept, by plain autograd."""
    monkeypatch.setattr(model, "stack", StoredStack(model))
    return model


class StoredStack:
    def __init__(self, model: SigmaLLM) -> None:
        self._real = model.stack

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def __call__(self, blocks: list, x: Tensor) -> tuple[Tensor, None]:
        return coupled_stored(blocks, x, lambda f, state: f(state.view_as(state))), None


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_coupled_has_the_bits_of_the_stored_network(
    bf16: bool, passes: int, build: Build, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("coupled")
    ours = loss_and_gradients(model, batch, bf16=bf16, passes=passes)
    _, verdicts = model.stack.metrics_tensor()
    assert verdicts is not None
    assert verdicts.tolist() == [0.0] * (3 + SHAPE.n_layers)
    expected = loss_and_gradients(stored(build("coupled"), monkeypatch), batch, bf16=bf16, passes=passes)
    assert [name for name, want in expected.items() if not torch.equal(ours[name], want)] == []


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "recompute*2,none*3,recompute"])
def test_recompute_has_the_bits_of_the_stored_network(
    mode: str, bf16: bool, build: Build, batch: tuple[Tensor, Tensor]
) -> None:
    ours = loss_and_gradients(build(mode), batch, bf16=bf16, passes=2)
    expected = loss_and_gradients(build("none"), batch, bf16=bf16, passes=2)
    wrong = [name for name, want in expected.items() if not torch.equal(ours[name], want)]
    # A block's input has two readers, and plain autograd adds what they send back in an order of its own.
    assert not wrong or max((ours[n] - expected[n]).abs().max() / expected[n].abs().max() for n in wrong) < 2e-2 * bf16


def test_compiled_halves_have_the_bits_of_the_stored_network(
    build: Build, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their second run is of the graph of forward, and the stream's gradient is added up behind it."""
    model, other = build("coupled"), build("coupled")
    for one in (model, other):
        one.compile_blocks(backend="eager")
    ours = loss_and_gradients(model, batch, bf16=True)
    expected = loss_and_gradients(stored(other, monkeypatch), batch, bf16=True)
    assert [name for name, want in expected.items() if not torch.equal(ours[name], want)] == []


def test_coupled_is_another_function_of_the_same_weights(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    plain, other = build("none"), build("coupled")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert not torch.allclose(plain.loss(*batch), other.loss(*batch), rtol=1e-4)


def test_the_form_is_a_leapfrog_of_whole_blocks(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    """(a, b) → (b, a + D(b)) with D(b) = block(b) − b, in plain floating point: as near as the grid is fine."""
    model, plain = build("coupled").double(), build("none").double()
    with torch.no_grad():
        for one in (model, plain):
            one.embedding.weight.mul_(1000)  # against which a step of the grid is little
        a = b = plain.embedding(batch[0])
        for block in plain._blocks():
            a, b = b, a + (sum(block(b)) - b)
        expected = plain.final_norm(a + b)
        plainly = plain.hidden(batch[0])
        found = model.hidden(batch[0])
    assert (found - expected).abs().max() < 1e-4
    assert (plainly - expected).abs().max() > 1e-3


def test_gradients_are_those_of_the_leapfrog_in_plain_floating_point(
    build: Build, batch: tuple[Tensor, Tensor]
) -> None:
    """By a judge with neither grid nor `change`: blocks as mode `none` calls them, and autograd."""

    def gradients(model: SigmaLLM, stack: Callable[[Sequence[Any], Tensor], Tensor]) -> dict[str, Tensor]:
        model = model.double()
        with torch.no_grad():
            model.embedding.weight.mul_(1000)  # against which a step of the grid is little
            for block in model._blocks():
                block.mixer.out_proj.weight.mul_(100)  # what is written is not little against what is there
                block.mlp.down.weight.mul_(100)
        x = model.embedding(batch[0])
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(x.device)
        (stack(model._blocks(), x) * weight).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def plain(blocks: Sequence[Any], x: Tensor) -> Tensor:
        a = b = x
        for block in blocks:
            a, b = b, a + (sum(block(b)) - b)
        return a + b

    expected = gradients(build("none"), plain)
    found = gradients(build("coupled"), lambda blocks, x: coupled(blocks, x, Gate(len(blocks), x.device)))
    assert found.keys() == expected.keys()
    assert len(found) == len(list(build("none").parameters())) - 1  # the final norm's has none
    worst = max(((found[name] - want).abs().max() / want.abs().max()).item() for name, want in expected.items())
    assert worst < 3e-5


def test_inference_computes_what_training_does(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    model = build("coupled")
    trained = model.loss(*batch).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.loss(*batch), trained, rtol=1e-5, atol=0)


def test_coupled_generation_reads_its_cache(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    model, ids = build("coupled"), batch[0]
    with torch.no_grad():
        whole = model(ids)
        cache = model.init_cache(ids.shape[0], ids.shape[1])
        steps = [model.prefill(ids[:, :40], cache)]
        steps += [model.step(ids[:, t], cache) for t in range(40, ids.shape[1])]
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 39:], rtol=2e-3, atol=2e-4)


class Treacherous(torch.nn.Module):
    """A sub-layer whose second run is not its first."""

    def __init__(self, change: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((8,), 0.5))
        self.change, self.runs = change, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x * self.weight + (self.change if self.runs > 2 else 0.0)


@dataclasses.dataclass
class Halves:
    mix: torch.nn.Module
    feed: torch.nn.Module

    def change(self, x: Tensor, again: Tensor, ahead: object = None) -> tuple[Tensor, Tensor]:
        mixed = self.mix(again)
        return mixed, self.feed(x + mixed)


def tripped(layers: list[Halves], x: Tensor) -> list[float]:
    gate = Gate(len(layers), x.device)
    coupled(layers, x.requires_grad_(), gate).sum().backward()
    return gate.values()[3:].tolist()


def test_the_gate_sees_one_wrong_number(device: torch.device) -> None:
    honest = [Halves(Treacherous(0.0).to(device), Treacherous(0.0).to(device)) for _ in range(3)]
    x = torch.randn(2, 5, 8, device=device)
    assert tripped(honest, x) == [0.0, 0.0, 0.0]
    layers = [Halves(Treacherous(0.0).to(device), Treacherous(0.0).to(device)) for _ in range(3)]
    shared = Treacherous(1e-3).to(device)
    layers[1].feed = layers[0].mix = shared  # runs 1 and 2 in forward, 3 and 4 in backward
    assert tripped(layers, x.detach()) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("scale", [1.0, 300.0, 5_000.0])
def test_states_come_back_wherever_they_are_in_the_range(scale: float, device: torch.device) -> None:
    """Sums that leave what float32 holds of the grid, and at last the grid itself: nothing is rebuilt wrongly."""
    layers = [Halves(Treacherous(0.0).to(device), Treacherous(0.0).to(device)) for _ in range(3)]
    x = torch.randn(2, 5, 8, device=device, generator=torch.Generator(device).manual_seed(0)) * scale
    assert tripped(layers, x) == [0.0, 0.0, 0.0]


class Poisoned:
    """`advance`, with one number of one summand made bad: of the mixer's or the MLP's, of one of its calls."""

    def __init__(self, bad: float | str) -> None:
        self.bad, self.at, self.calls = bad, -1, 0

    def __call__(self, a: Tensor, *ys: Tensor, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        if self.calls - 1 == self.at // 2:
            # In the stored form the two have been added up before.
            changed = [torch.zeros_like(y) for y in ys]
            y = changed[self.at % len(ys)]
            place = int(a[0, :60].argmax())
            # The sum alone overflows: 255 steps under the range, and a's number is larger.
            y[0, :60].view(-1)[place] = RANGE - 255 * STEP if isinstance(self.bad, str) else self.bad
            assert a.flatten()[place] > 255
            return advance(a, *changed, **how)
        return advance(a, *ys, **how)


@pytest.mark.parametrize(
    ("bad", "fallback", "bf16"),
    [
        (float("nan"), False, False), (float("nan"), True, False), (float("nan"), False, True),
        (float("inf"), False, False), (-1e38, False, True), (-2 * RANGE, True, False), (-2 * RANGE, False, True),
        ("sum", False, False), ("sum", True, True),
    ],
)  # fmt: skip
def test_no_bad_number_in_any_sub_layer_is_silent(
    bad: float | str,
    fallback: bool,
    bf16: bool,
    build: Build,
    batch: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In either half of every block: the loss is NaN, in training and inference, and no bit of a weight changes."""
    model = build("coupled")
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    settings = OptimizerConfig(lr=1e-2)
    update = Update(build_optimizer(model.parameter_groups(0.1), settings, C3OConfig(), batch[0].device.type), settings)
    model.stack._decided.fallback = fallback
    poisoned = Poisoned(bad)
    monkeypatch.setattr("eco_llm.instant.coupled.advance", poisoned)
    before = [p.detach().clone() for p in model.parameters()]
    for poisoned.at in range(2 * SHAPE.n_layers):
        poisoned.calls = 0
        found = loss_and_gradients(model, batch, bf16=bf16)
        assert poisoned.calls == SHAPE.n_layers
        assert found["loss"].isnan(), poisoned.at
        assert not update.step(model.stack.guard(found["loss"])).applied
        poisoned.calls = 0
        with torch.no_grad(), torch.autocast(batch[0].device.type, torch.bfloat16, enabled=bf16):
            assert model.loss(*batch).isnan(), poisoned.at
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    poisoned.at = -1
    good = loss_and_gradients(model, batch)["loss"]
    assert good.isfinite()
    assert update.step(model.stack.guard(good)).applied
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2 * RANGE])
def test_an_embedding_outside_the_grid_is_not_silent(bad: float, build: Build, batch: tuple[Tensor, Tensor]) -> None:
    model = build("coupled")
    with torch.no_grad():
        model.embedding.weight[batch[0][0, 0], 3] = bad
    found = loss_and_gradients(model, batch)
    assert found["loss"].isnan()
    assert model.stack.guard(found["loss"]).isnan()


def test_a_trip_makes_the_guard_nan_and_nothing_else_does(device: torch.device) -> None:
    gate, loss = Gate(2, device), torch.tensor(3.0, device=device)
    assert gate.guard(loss) == 3.0
    gate.expect_residual(1, torch.tensor(0.5, device=device), 0.5)
    assert gate.guard(loss) == 3.0
    for bad in (0.51, float("nan"), float("inf")):
        gate.begin_step()
        gate.expect_residual(1, torch.tensor(bad, device=device), 0.5)
        assert gate.guard(loss).isnan()
        assert gate.values()[3:].tolist() == [0.0, 1.0]
    gate.begin_step()
    assert gate.guard(loss) == 3.0
    c, y = torch.arange(9, dtype=torch.int32, device=device), torch.zeros(9, device=device)
    retreat(c, y, seen=checksums(c), flags=gate.flags(0))
    assert gate.guard(loss) == 3.0
    assert gate.values().tolist() == [0.0] * 5
    retreat(c, y, seen=checksums(c + 1), flags=gate.flags(0))
    assert gate.guard(loss).isnan()
    assert gate.values().tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]


def test_the_stored_form_of_fallback_has_the_same_bits(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    expected = loss_and_gradients(build("coupled"), batch)
    model = build("coupled")
    model.stack._decided.fallback = True
    ours = loss_and_gradients(model, batch)
    assert [name for name, want in expected.items() if not torch.equal(ours[name], want)] == []


def test_a_loss_that_is_not_finite_is_no_trip(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    """Nothing can be rebuilt from NaN; the step is refused, and the next good one is as if nothing had been."""
    model = build("coupled")
    weight = model._blocks()[2].mlp.down.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    found = loss_and_gradients(model, batch)
    assert model.stack.guard(found["loss"]).isnan()
    names, values = model.stack.metrics_tensor()
    assert values is not None
    record = model.stack.observe({"loss": float("nan"), **dict(zip(names, values.tolist(), strict=True))})
    assert record["instant_gate_trips"] == 0
    assert model.review_memory(8, batch[0]) == []
    with torch.no_grad():
        weight.copy_(good)
    assert model.stack.guard(loss_and_gradients(model, batch)["loss"]).isfinite()
    assert model.stack.figures() == {}


def test_coupled_rebuilds_again_some_time_after_a_trip(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    model = build("coupled")
    model.stack.observe({"loss": 1.0, "instant_tripped_block_4": 1.0})
    assert model.stack.unsaid()
    assert "every state is kept" in model.review_memory(8, batch[0])[0]
    assert model.stack.figures() == {"instant_fallback": 1}
    assert not model.stack.unsaid()
    assert model.review_memory(400, batch[0]) == []
    assert model.review_memory(408, batch[0]) == ["states are rebuilt again"]
    assert model.stack.figures() == {}


@pytest.mark.parametrize("mode", ["recompute", "coupled"])
def test_a_frozen_embedding_hides_no_gradient(mode: str, build: Build, batch: tuple[Tensor, Tensor]) -> None:
    shape = dataclasses.replace(SHAPE, tie_embeddings=False)
    free, frozen = build(mode, shape), build(mode, shape)
    frozen.embedding.requires_grad_(False)
    expected = loss_and_gradients(free, batch)
    frozen.loss(*batch).backward()
    for name, parameter in frozen.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.equal(parameter.grad, expected[name]), name


def test_kept_memory_does_not_grow_with_depth(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    def kept(mode: str, layers: int, *, fallback: bool = False) -> int:
        model = build(mode, dataclasses.replace(SHAPE, n_layers=layers))
        model.stack._decided.fallback = fallback
        x = model.embedding(batch[0])
        return kept_bytes(model, lambda: model.stack(model._blocks(), x))

    one = batch[0].numel() * SHAPE.d_model * 4
    assert kept("coupled", 12) - kept("coupled", 3) == 9 * 2 * 8  # two checksums a state
    assert kept("recompute", 12) - kept("recompute", 3) == 9 * one
    assert kept("coupled", 12, fallback=True) - kept("coupled", 3, fallback=True) == 9 * one
    assert kept("none", 12) - kept("none", 3) > 9 * 10 * one


def test_a_second_backward_says_that_it_cannot(build: Build, batch: tuple[Tensor, Tensor]) -> None:
    loss = build("coupled").loss(*batch)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran before"):
        loss.backward()


def test_modes_of_blocks_are_read_and_refused() -> None:
    from eco_llm.errors import UserError

    mixers = ("mamba", "mamba", "mla")
    assert InstantConfig(instant_mode="fixed-point").block_modes(mixers) == ("fixed-point", "fixed-point", "recompute")
    assert InstantConfig(instant_mode="none*2, compress").block_modes(mixers) == ("none", "none", "compress")
    for bad in ("", "fast", "none*4", "none*0", "none,none", "none*x", "coupled*1,none*2", "recompute*2,none*2"):
        with pytest.raises(UserError, match="--instant-mode"):
            InstantConfig(instant_mode=bad).block_modes(mixers)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_a_thousand_steps_rebuild_every_state(bf16: bool) -> None:
    """The gate looks in every step; on a GPU: test_modes_cuda.py. Random tokens of two batches, soon known by heart."""
    torch.manual_seed(0)
    model = SigmaLLM(dataclasses.replace(SHAPE, n_layers=3, vocab_size=320), InstantConfig(instant_mode="coupled"))
    model.stack.prepare(torch.device("cpu"))
    settings = OptimizerConfig(lr=1e-3)
    update = Update(build_optimizer(model.parameter_groups(0.1), settings, C3OConfig(), "cpu"), settings)
    batches = [(torch.randint(320, (1, 63)), torch.randint(320, (1, 63))) for _ in range(2)]
    losses, refused = [], 0
    for step in range(1000):
        model.stack.begin_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss(*batches[step % 2])
        loss.backward()
        refused += not update.step(model.stack.guard(loss)).applied
        update.zero_grad()
        names, values = model.stack.metrics_tensor()
        assert values is not None
        refused += int(values[names.index("instant_tripped_blocks")])
        losses.append(loss.item())
    assert refused == 0
    assert losses[-1] < losses[0] - 1
