"""Moments in 8 and 4 bits, dithered bfloat16 weights and their error bits: codes, bytes, bounds, training."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from optim_cases import bits, parameters, resumed, run, tensors_of
from torch import Tensor, nn

from eco_llm.config import C3OConfig, OptimizerConfig
from eco_llm.errors import UserError
from eco_llm.optim.c3o import C3O
from eco_llm.optim.factory import build_optimizer
from eco_llm.optim.rounding import RATIO, SECOND_MOMENT, joined_weight, split_weight, thresholds
from eco_llm.optim.rule import BLOCK
from eco_llm.optim.storage import GROUP, STORAGES, code_moments, coded_moments, decode, encode

CODED = ("int8", "int4")
CODES = [(name, kind) for name in CODED for kind in ("ratio", "second")]


def groups_of(kind: str, rows: int = 64) -> Tensor:
    """Values over many octaves, [rows, GROUP]; not negative for `second`."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(rows, GROUP, generator=gen) * torch.exp(2 * torch.randn(rows, GROUP, generator=gen))
    return x.square() if kind == "second" else x


# ---- codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CODES)
def test_codes_are_unbiased_over_steps_and_within_one_code(name: str, kind: str) -> None:
    code = getattr(STORAGES[name], kind)
    x = groups_of(kind)
    position = torch.arange(x.numel()).view(x.shape) % BLOCK
    total, worst = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    steps = 1024
    for t in range(steps):
        codes, scale = encode(x, thresholds(position, torch.tensor(t), RATIO), code)
        back = decode(codes, scale, code).double()
        total += back
        worst = torch.maximum(worst, (back - x).abs())
    unit = scale.double()[:, None]
    offset = unit if code.signed else 0.0
    spacing = 2.0**-code.mantissa * (x.double().abs() + offset)  # one step, or a little less
    floor = torch.zeros_like(unit) if code.signed else unit  # what is under the smallest code becomes it
    inside = x.double().abs() >= floor
    assert ((worst <= spacing * (1 + 1e-6)) | ~inside).all()
    assert ((total / steps - x).abs() <= 0.01 * spacing + 1e-6 * x.abs())[inside].all()
    if not code.signed:
        assert (back[~inside] <= (1 + 2.0**-code.mantissa) * unit.expand(x.shape)[~inside]).all()
        assert (back[x > 0] > 0).all()


@pytest.mark.parametrize("name", CODED)
def test_m_is_unbiased_though_it_is_coded_relative_to_a_rounded_v(name: str) -> None:
    storage = STORAGES[name]
    gen = torch.Generator().manual_seed(0)
    v = torch.rand(8, GROUP, generator=gen) + 0.5
    m = torch.randn(8, GROUP, generator=gen) * v.sqrt() * 0.3
    position = torch.arange(m.numel()).view(m.shape)
    mean_m, mean_v = torch.zeros(m.shape, dtype=torch.float64), torch.zeros(m.shape, dtype=torch.float64)
    steps = 2048
    for t in range(steps):
        stored, _ = code_moments(m, v, position, torch.tensor(t), storage)
        back_m, back_v = coded_moments(stored, storage)
        mean_m += back_m.double() / steps
        mean_v += back_v.double() / steps
    one_code = 2.0**-storage.ratio.mantissa * (m.abs() + float(m.abs().max()) / storage.ratio.span)  # type: ignore[union-attr]
    assert ((mean_m - m).abs() / one_code).max() < 0.02
    assert ((mean_v - v).abs() / v).max() < 0.01


@pytest.mark.parametrize("name", CODED)
def test_zero_stays_zero_and_a_group_without_gradients_too(name: str) -> None:
    storage = STORAGES[name]
    m, v = torch.zeros(4, GROUP), torch.zeros(4, GROUP)
    m[0, 3], v[0, 3] = -1.0, 1.0
    v[1] = 2.0**-140  # under what a scale can hold: as if it were 0
    m[1] = 2.0**-71
    for t in range(50):
        stored, _ = code_moments(m, v, torch.arange(4 * GROUP).view(4, GROUP), torch.tensor(t), storage)
        back_m, back_v = coded_moments(stored, storage)
        assert torch.count_nonzero(back_m) == 1
        assert back_m[0, 3].item() == pytest.approx(-1.0, rel=2.0**-6)
        assert (back_v[0] > 0).all()  # beside a gradient v is at least the smallest code
        assert torch.count_nonzero(back_v[1:]) == 0


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_are_not_hidden(name: str, bad: float) -> None:
    storage = STORAGES[name]
    m, v = torch.randn(4, GROUP), torch.rand(4, GROUP) + 0.1
    m[1, 5] = bad
    v[2, 7] = abs(bad) if bad == bad else bad
    for pattern in (None, 0x7FFFFFFF):  # CUDA's NaN
        if pattern and bad != bad:
            m.view(torch.int32)[1, 5] = v.view(torch.int32)[2, 7] = pattern
        stored, _ = code_moments(m, v, torch.zeros(4, GROUP), torch.tensor(3), storage)
        back_m, back_v = coded_moments(stored, storage)
        assert not torch.isfinite(back_m[1]).any()
        assert not torch.isfinite(back_v[2]).any()
        assert not torch.isfinite(back_m[2]).any()
        assert torch.isfinite(back_m[[0, 3]]).all()  # not even in the group that shares the bytes of 4-bit codes
        assert torch.isfinite(back_v[[0, 1, 3]]).all()


@pytest.mark.parametrize("name", CODED)
def test_one_huge_element_does_not_break_its_group(name: str) -> None:
    """The others lose precision; none takes a step larger than Adam could."""
    p = nn.Parameter(torch.zeros(4 * GROUP))
    optimizer = C3O([p], lr=1.0, betas=(0.9, 0.95), trust_radius=0.0, weight_decay=0.0, state_dtype=name)
    gen = torch.Generator().manual_seed(0)
    for _ in range(200):
        p.grad = torch.randn(p.shape, generator=gen)
        p.grad[::GROUP] *= 1e6
        before = p.detach().clone()
        optimizer.step()
        assert (p - before).abs().max() < 3.0


def update_error(storage_of: Any, spread: float, steps: int = 200) -> float:
    """Relative rms error of u = m / sqrt(v) against exact moments; gradient sizes log-normal within a group."""
    gen = torch.Generator().manual_seed(0)
    n, b1, b2 = 64 * GROUP, 0.9, 0.95
    size = torch.exp(spread * torch.randn(n, generator=gen))
    m = v = m_kept = v_kept = torch.zeros(n)
    error = total = 0.0
    for t in range(1, steps + 1):
        g = size * torch.randn(n, generator=gen)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_new, v_new = b1 * m_kept + (1 - b1) * g, b2 * v_kept + (1 - b2) * g * g
        u, u_new = m / (v.sqrt() + 1e-8), m_new / (v_new.sqrt() + 1e-8)
        m_kept, v_kept = storage_of(m_new, v_new, torch.tensor(t))
        if t > steps // 2:
            error += float((u - u_new).square().sum())
            total += float(u.square().sum())
    return (error / total) ** 0.5


def through(name: str) -> Any:
    storage = STORAGES[name]
    position = torch.arange(64 * GROUP).view(-1, GROUP) % BLOCK

    def kept(m: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        stored, _ = code_moments(m.view(-1, GROUP), v.view(-1, GROUP), position, t, storage)
        back = coded_moments(stored, storage)
        return back[0].reshape(-1), back[1].reshape(-1)

    return kept


def linear(levels: int) -> Any:
    """The obvious alternative: m linear in its group, sqrt(v) linear without 0; the same dither."""
    position = torch.arange(64 * GROUP).view(-1, GROUP) % BLOCK

    def kept(m: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        m, root = m.view(-1, GROUP), v.view(-1, GROUP).sqrt()
        m_scale, v_scale = m.abs().amax(1, keepdim=True) / (levels // 2 - 1), root.amax(1, keepdim=True) / levels
        m_codes = torch.floor(m.abs() / m_scale + thresholds(position, t, RATIO) / 2**16)
        v_codes = torch.floor(root / v_scale + thresholds(position, t, SECOND_MOMENT) / 2**16).clamp(1, levels)
        return (m.sign() * m_codes * m_scale).reshape(-1), (v_codes * v_scale).square().reshape(-1)

    return kept


@pytest.mark.parametrize(("name", "levels", "spread", "gain"), [
    ("int8", 256, 1.0, 4.0), ("int8", 256, 2.0, 10.0), ("int4", 16, 0.3, 1.3), ("int4", 16, 1.0, 2.0),
])  # fmt: skip
def test_the_update_is_nearer_to_the_exact_one_than_with_linear_codes(
    name: str, levels: int, spread: float, gain: float
) -> None:
    ours, theirs = update_error(through(name), spread), update_error(linear(levels), spread)
    assert gain * ours < theirs, (ours, theirs)


# ---- the optimizer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "limit"), [("int8", 2.125), ("int4", 1.0625)])
@pytest.mark.parametrize("foreach", [True, False])
def test_state_is_as_small_as_it_says(name: str, limit: float, foreach: bool) -> None:
    p = nn.Parameter(torch.zeros(64, 1024))
    optimizer = C3O([p], state_dtype=name, foreach=foreach)
    p.grad = torch.randn_like(p)
    optimizer.step()
    state = {k: v for k, v in optimizer.state[p].items() if k != "step"}
    assert sum(v.numel() * v.element_size() for v in state.values()) <= limit * p.numel()
    memory = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in state.values()}
    assert sum(memory.values()) <= limit * p.numel()  # nothing is hidden behind the views
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert file.tell() <= limit * p.numel() + 8192


@pytest.mark.parametrize("error_bits", [0, 8])
@pytest.mark.parametrize("state_dtype", ["bfloat16", *CODED])
@pytest.mark.parametrize("foreach", [True, False])
def test_skip_equals_exact_bit_for_bit_and_bounds_hold(foreach: bool, state_dtype: str, error_bits: int) -> None:
    exact, skipping = parameters(torch.bfloat16), parameters(torch.bfloat16)
    rule: dict[str, Any] = {"lr": 1e-3, "state_dtype": state_dtype, "foreach": foreach, "error_bits": error_bits}
    a, b = C3O(exact, **rule), C3O(skipping, **rule, trust_norm_refresh_drift=0.02)
    skipped = 0.0
    for i in range(12):
        run(a, exact, 1, start=i)
        run(b, skipping, 1, start=i)
        skipped += b.metrics()["c3o_trust_norm_skipped"]
        for p in skipping:
            if p.numel():
                s = b.state[p]
                theta = joined_weight(p.detach(), s["error"]) if error_bits else p.detach()
                assert float(theta.double().norm()) >= float(s["param_norm"])
    assert skipped > 20
    assert bits([p.detach() for p in exact]) == bits([p.detach() for p in skipping])


@pytest.mark.parametrize("kind", ["noise", "spike", "sparse", "growing"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("state_dtype", CODED)
def test_direction_bound_holds_for_what_is_stored(state_dtype: str, foreach: bool, nesterov: bool, kind: str) -> None:
    """U >= |u_t| of each step's real direction, under gradients that try to cross it; and it is near enough to skip."""
    p = nn.Parameter(torch.ones(2 * BLOCK + 77))
    b1, b2, eps = 0.9, 0.95, 1e-8
    optimizer = C3O(
        [p], lr=1e-4, weight_decay=0.0, trust_norm_refresh_drift=0.1, state_dtype=state_dtype, foreach=foreach,
        nesterov=nesterov,
    )  # fmt: skip
    gen = torch.Generator().manual_seed(0)
    for t in range(1, 25):
        g = torch.randn(p.shape, generator=gen)
        if kind == "spike":
            g *= 1e4 if t % 6 == 5 else 1e-4
        elif kind == "sparse":
            g *= torch.rand(p.shape, generator=gen) < 0.02
        elif kind == "growing":
            g = g.abs() * 2.0**t
        p.grad = g
        before = p.detach().double()
        old = float(optimizer.state[p]["update_norm"]) if t > 1 else 0.0
        optimizer.step()
        direction = (before - p.detach().double()).norm() / 1e-4
        bias1, bias2 = 1 - b1**t, 1 - b2**t
        rho = (b2 * (1 - b2 ** (t - 1)) / bias2) ** 0.5
        alpha = b1 * (1 - b1 ** (t - 1)) / (bias1 * rho) if t > 1 else 0.0
        beta = (1 - b1) / bias1 * (bias2 / (1 - b2)) ** 0.5 * p.numel() ** 0.5
        bound = alpha * old + beta
        if nesterov:
            bound = b1 * bias1 / (1 - b1 ** (t + 1)) * bound + beta
        assert float(direction) <= bound * 1.01  # θ is float32: |Δ| / lr is known to about 1%
        m, v = (x.double() for x in stored_values(optimizer, p, state_dtype))
        u = (m / bias1) / ((v / bias2).sqrt() + eps)
        # 1e-5: the for-loop takes 1 - b^t in float32, off by 1e-6 in the first steps; the drift is 0.1.
        assert float(u.norm()) <= float(optimizer.state[p]["update_norm"]) * (1 + 1e-5)
        assert float(optimizer.state[p]["update_norm"]) <= 3 * p.numel() ** 0.5
    assert optimizer.metrics()["c3o_trust_norm_skipped"] == 1


def stored_values(optimizer: C3O, p: nn.Parameter, state_dtype: str) -> tuple[Tensor, Tensor]:
    from eco_llm.optim.storage import read_moments

    return read_moments(optimizer.state[p], p, STORAGES[state_dtype], torch.float32)


def test_a_state_stored_in_another_way_is_refused_by_name() -> None:
    for saved, here in (("int8", "int4"), ("float32", "int8"), ("int4", "bfloat16")):
        for foreach in (True, False):
            p = nn.Parameter(torch.zeros(300))
            first = C3O([p], state_dtype=saved, foreach=foreach)
            p.grad = torch.ones_like(p)
            first.step()
            state = first.state_dict()
            state["param_groups"][0]["state_dtype"] = here
            second = C3O([p], foreach=foreach)
            second.load_state_dict(state)
            with pytest.raises(RuntimeError, match=f"are not {here}"):
                second.step()


def test_states_saved_before_weights_were_dithered_go_on_as_they_were() -> None:
    p = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = C3O([p])
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["weight_rounding"], group["error_bits"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_rounding"] == "nearest"


def test_states_saved_before_nesterov_go_on_without_it() -> None:
    p = nn.Parameter(torch.ones(100))
    saved = C3O([p]).state_dict()
    for group in saved["param_groups"]:
        del group["nesterov"]
    optimizer = C3O([p])
    assert optimizer.param_groups[0]["nesterov"] is True
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["nesterov"] is False


def test_states_of_cautious_decay_are_refused_and_those_without_it_load() -> None:
    p = nn.Parameter(torch.ones(100))
    first = C3O([p], lr=0.5)
    p.grad = torch.ones_like(p)
    first.step()
    saved = first.state_dict()
    optimizer = C3O([p])
    saved["param_groups"][0]["cautious"] = True
    with pytest.raises(ValueError, match="cautious weight decay, which C3O no longer has"):
        optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.param_groups[0]["lr"] == 1e-3  # nothing was loaded
    assert not optimizer.state
    saved["param_groups"][0]["cautious"] = False
    optimizer.load_state_dict(saved)
    assert "cautious" not in optimizer.param_groups[0]
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("state_dtype", "int2"), ("weight_rounding", "up"), ("error_bits", 4)],
)
def test_bad_settings_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        C3O([nn.Parameter(torch.zeros(2))], **{name: value})
    with pytest.raises(ValueError, match="error_bits"):
        C3O([nn.Parameter(torch.zeros(2))], error_bits=8, weight_rounding="nearest")


def test_flags_reach_the_optimizer_and_error_bits_need_bf16_weights() -> None:
    def build(dtype: torch.dtype, **flags: Any) -> C3O:
        groups = [{"params": [nn.Parameter(torch.zeros(4, 4, dtype=dtype))], "weight_decay": 0.1, "name": "matrix"}]
        optimizer = build_optimizer(groups, OptimizerConfig(), C3OConfig(**flags), "cpu")
        assert isinstance(optimizer, C3O)
        return optimizer

    (group,) = build(torch.bfloat16, c3o_state_dtype="int4", c3o_error_bits=8).param_groups
    assert (group["state_dtype"], group["error_bits"], group["weight_rounding"]) == ("int4", 8, "dithered")
    with pytest.raises(UserError, match="--c3o-error-bits 8 extends bf16 weights"):
        build(torch.float32, c3o_error_bits=8)


# ---- weights ------------------------------------------------------------------------------------------------------


def test_weights_in_24_bits_are_exact_or_unbiased() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(1000, generator=gen) * 10.0 ** torch.randint(-20, 20, (1000,), generator=gen),
                   torch.tensor([0.0, -0.0, 1.0, 1 + 2**-15, -(2 - 2**-15), float("inf"), -float("inf")])])  # fmt: skip
    position = torch.arange(len(x))
    weight, error = split_weight(x, position, torch.tensor(5))
    kept = joined_weight(weight, error)
    assert weight.dtype == torch.bfloat16
    assert error.dtype == torch.int8
    assert (error[:-2].double().abs() <= 128).all()
    beside = (weight[:-2].double() - kept[:-2].double()).abs()
    assert (beside <= 2.0**-8 * kept[:-2].double().abs()).all()  # half a unit: the visible part is the nearest
    finite = x[:-2].double()
    assert ((kept[:-2].double() - finite).abs() <= 2.0**-15 * finite.abs()).all()
    assert bits([kept[1000:]]) == bits([x[1000:]])
    again = joined_weight(*split_weight(kept, position, torch.tensor(99)))
    assert bits([again]) == bits([kept])  # a refused step, or none, changes nothing
    mean = torch.zeros(len(finite), dtype=torch.float64)
    for t in range(1024):
        mean += joined_weight(*split_weight(x, position, torch.tensor(t)))[:-2].double() / 1024
    assert ((mean - finite).abs() <= 2e-2 * 2.0**-15 * finite.abs()).all()
    assert split_weight(torch.tensor([float("nan")]), position[:1], torch.tensor(0))[0].isnan().all()


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(("settings", "moves"), [
    ({"weight_rounding": "nearest"}, False), ({}, True), ({"error_bits": 8}, True),
])  # fmt: skip
def test_updates_under_half_a_unit_of_a_weight_add_up(settings: dict[str, Any], moves: bool, foreach: bool) -> None:
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = C3O([p], lr=1e-4, weight_decay=0.0, foreach=foreach, **settings)
    for _ in range(400):
        p.grad = torch.ones_like(p)
        optimizer.step()
    theta = p.detach() if "error" not in optimizer.state[p] else joined_weight(p.detach(), optimizer.state[p]["error"])
    moved = 1 - theta.double().mean().item()
    assert moved == (pytest.approx(0.04, rel=0.02) if moves else 0.0)


@pytest.mark.parametrize("error_bits", [0, 8])
@pytest.mark.parametrize("state_dtype", ["float32", *CODED])
@pytest.mark.parametrize("foreach", [True, False])
def test_bfloat16_weights_resume_exactly(foreach: bool, state_dtype: str, error_bits: int) -> None:
    rule: dict[str, Any] = {"state_dtype": state_dtype, "error_bits": error_bits, "foreach": foreach, "grad_clip": 1.0}
    through_, before = parameters(torch.bfloat16), parameters(torch.bfloat16)
    straight, first = C3O(through_, **rule), C3O(before, **rule)
    run(straight, through_, 6)
    run(first, before, 3)
    second, after = resumed(first, before)
    run(second, after, 3, start=3)
    assert bits(tensors_of(straight)) == bits(tensors_of(second))


# ---- training -----------------------------------------------------------------------------------------------------


def train(state_dtype: str, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> float:
    """Loss of a small network after 1,000 steps of a decaying rate on a function it can learn, mean of the last 50."""
    gen = torch.Generator().manual_seed(seed)
    w1, w2 = torch.randn(16, 64, generator=gen) / 4, torch.randn(64, 8, generator=gen) / 8
    target = (torch.randn(16, 32, generator=gen) / 4, torch.randn(32, 8, generator=gen) / 5)
    params = [nn.Parameter(w.to(dtype)) for w in (w1, w2)]
    optimizer = C3O(params, betas=(0.9, 0.95), weight_decay=0.0, grad_clip=1.0, state_dtype=state_dtype, **settings)
    losses = []
    for i in range(1000):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - i / 1000)
        x = torch.randn(64, 16, generator=gen)
        y = torch.tanh(x @ target[0]) @ target[1]
        a, b = (p.float() for p in params)
        loss = (torch.tanh(x @ a) @ b - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i >= 950:
            losses.append(loss.item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", [0])
def test_1000_steps_end_as_well_as_with_float32_but_for_weights_rounded_to_nearest(seed: int) -> None:
    exact = train("float32", seed=seed)
    assert train("int8", seed=seed) == pytest.approx(exact, rel=0.03)
    assert train("int4", seed=seed) < 1.03 * exact
    for name, error_bits in (("float32", 0), ("int4", 0), ("float32", 8)):
        assert train(name, torch.bfloat16, seed, error_bits=error_bits) < 1.05 * exact, (name, error_bits)
    assert train("float32", torch.bfloat16, seed, weight_rounding="nearest") > 1.5 * exact  # so this can fail
