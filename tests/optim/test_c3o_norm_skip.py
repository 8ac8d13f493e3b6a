"""The norm skip: its bounds always hold, its flags are counted, and it never changes an update."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import bits, parameters, run
from torch import nn

from eco_llm.optim.c3o import C3O
from eco_llm.optim.norm_skip import (
    NormCache,
    Slack,
    applied_norm_bound,
    may_skip,
    next_cache,
    update_norm_bound,
)  # fmt: skip
from eco_llm.optim.rule import Rule
from eco_llm.optim.storage import STORAGES


def directions(optimizer: C3O, p: nn.Parameter, b1: float, b2: float, eps: float) -> torch.Tensor:
    """u_t from the stored moments."""
    s = optimizer.state[p]
    t = float(s["step"])
    return (s["exp_avg"] / (1 - b1**t)) / ((s["exp_avg_sq"] / (1 - b2**t)).sqrt() + eps)


def adversarial(kind: str, t: int, u: torch.Tensor | None, shape: torch.Size, gen: torch.Generator) -> torch.Tensor:
    """Gradients that try to make |u_t| large: aligned with u, huge after long quiet, geometric, sparse, random."""
    noise = torch.randn(shape, generator=gen, dtype=torch.float64)
    if kind == "aligned":
        return noise if u is None else torch.sign(u) * noise.abs() * 10.0 ** float(noise.reshape(-1)[0])
    if kind == "spike":
        return noise * (1e6 if t % 7 == 6 else 1e-9)
    if kind == "growing":
        return noise.abs() * 3.0**t
    if kind == "fading":
        return noise.abs() * 0.2**t
    if kind == "zeros":
        return noise * (t % 3 == 0)
    return noise


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kinds=st.lists(
        st.sampled_from(["aligned", "spike", "growing", "fading", "zeros", "noise"]), min_size=1, max_size=12
    ),
    b1=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    b2=st.sampled_from([0.0, 0.5, 0.95, 0.999]),
    eps=st.sampled_from([1e-12, 1e-8, 1e-2]),
    lr=st.floats(1e-6, 0.3),
    decay=st.sampled_from([0.0, 0.1, 2.0]),
    radius=st.sampled_from([1e-3, 0.1, 3.0]),
    gain=st.sampled_from([0.0, 30.0]),
    drift=st.sampled_from([1e-6, 0.1]),
    nesterov=st.booleans(),
    foreach=st.booleans(),
)
def test_bounds_hold_and_skips_are_right(
    seed: int, kinds: list[str], b1: float, b2: float, eps: float, lr: float, decay: float, radius: float,
    gain: float, drift: float, nesterov: bool, foreach: bool,
) -> None:  # fmt: skip
    gen = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float64)) for s in ((6, 7), (4097,), ())]
    options = {
        "lr": lr, "betas": (b1, b2), "eps": eps, "weight_decay": decay, "trust_radius": radius, "credit_gain": gain,
        "nesterov": nesterov, "state_dtype": torch.float64,
    }  # fmt: skip
    optimizer = C3O(params, trust_norm_refresh_drift=drift, trust_norm_refresh_steps=4, foreach=foreach, **options)
    exact_params = [nn.Parameter(p.detach().clone()) for p in params]
    exact = C3O(exact_params, foreach=foreach, **options)
    for t, kind in enumerate(kinds * 2):
        for p, q in zip(params, exact_params, strict=True):
            u = directions(optimizer, p, b1, b2, eps) if t else None
            p.grad = adversarial(kind, t, u, p.shape, gen)
            q.grad = p.grad.clone()
        optimizer.step()
        exact.step()
        for p, q in zip(params, exact_params, strict=True):
            s = optimizer.state[p]
            assert float(directions(optimizer, p, b1, b2, eps).norm()) <= float(s["update_norm"]) * (1 + 1e-12)
            assert float(s["param_norm"]) <= float(p.detach().norm()) * (1 + 1e-12)
            assert torch.equal(p, q)  # a wrongly skipped cap would show here
        counts = optimizer.metrics()
        assert counts["c3o_trust_norm_skipped"] + counts["c3o_trust_norm_exact"] == len(params)


def test_bound_is_tight_enough_to_skip() -> None:
    """Without this, a bound of infinity would pass every test above."""
    params = parameters()
    optimizer = C3O(
        params, lr=1e-4, trust_norm_refresh_drift=0.1, trust_norm_refresh_steps=4, state_dtype=torch.float64
    )
    skipped = []
    for i in range(12):
        run(optimizer, params, 1, start=i)
        skipped.append(optimizer.metrics()["c3o_trust_norm_skipped"])
    # The first step knows no |θ|, then the cache serves 4 steps and the fifth measures.
    full = max(skipped)
    assert full >= 6
    assert [s == full for s in skipped] == [False] + [True] * 4 + [False] + [True] * 4 + [False] + [True]


@pytest.mark.parametrize("foreach", [True, False])
def test_skip_equals_exact_bit_for_bit(foreach: bool) -> None:
    for dtype, state in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2):
        exact, skipping = parameters(dtype), parameters(dtype)
        a = C3O(exact, lr=1e-3, state_dtype=state, foreach=foreach)
        b = C3O(skipping, lr=1e-3, state_dtype=state, foreach=foreach, trust_norm_refresh_drift=0.02)
        total = 0.0
        for i in range(10):
            run(a, exact, 1, start=i)
            run(b, skipping, 1, start=i)
            total += b.metrics()["c3o_trust_norm_skipped"]
        assert total > 10
        assert bits([p.detach() for p in exact]) == bits([p.detach() for p in skipping])


def test_drift_zero_never_skips_and_binding_cap_is_never_skipped() -> None:
    params = parameters()
    optimizer = C3O(params, state_dtype=torch.float64)
    run(optimizer, params, 3)
    assert optimizer.metrics()["c3o_trust_norm_skipped"] == 0
    assert "update_norm" not in optimizer.state[params[0]]

    params = parameters()
    binding = C3O(params, lr=0.5, trust_radius=1e-3, trust_norm_refresh_drift=1e-6, state_dtype=torch.float64)
    for i in range(5):
        run(binding, params, 1, start=i)
        assert binding.metrics()["c3o_trust_norm_skipped"] == 0
        assert binding.metrics()["c3o_trust_capped"] >= 8


def test_bounds_hold_for_rounded_moments_and_weights() -> None:
    params = parameters(torch.bfloat16)
    optimizer = C3O(
        params, lr=3e-3, betas=(0.9, 0.999), trust_norm_refresh_drift=0.01, state_dtype=torch.bfloat16, foreach=True
    )
    for i in range(60):
        run(optimizer, params, 1, start=i)
        for p in params:
            if p.numel():
                s = optimizer.state[p]
                assert float(p.detach().double().norm()) >= float(s["param_norm"])


@pytest.mark.parametrize("foreach", [True, False])
def test_weight_bound_survives_weights_that_all_round_the_same_way(foreach: bool) -> None:
    p = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = C3O(
        [p], lr=0.0021, weight_decay=0.0, trust_norm_refresh_drift=0.01, foreach=foreach, weight_rounding="nearest"
    )
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p == 1 - 2**-8).all()  # asked for 0.9979
    assert 9.8 < float(optimizer.state[p]["param_norm"]) <= float(p.detach().double().norm())


@pytest.mark.parametrize("stored", ["float64", "bfloat16"])
def test_direction_bound_survives_moments_rounded_the_worst_way(stored: str) -> None:
    """A zero gradient makes u_t = α_t u_{t-1} exactly, but for m rounded up and v rounded down in between."""
    rule, _, _, _ = rule_and_worst_case(0.0, 0.0)
    unit = torch.finfo(STORAGES[stored].dtype).eps
    t, sqrt_n = torch.tensor(7.0, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    before, after = ((1 - rule.beta1**s, 1 - rule.beta2**s) for s in (t - 1, t))
    m, v = 0.3, 0.2
    previous = m / before[0] / (v / before[1]).sqrt()
    moved = rule.beta1 * m * (1 + unit) / after[0] / (rule.beta2 * v * (1 - unit) / after[1]).sqrt()
    bound = update_norm_bound(
        previous, t, *after, sqrt_n, rule, Slack.of(STORAGES[stored], torch.float64, torch.float64)
    )
    assert float(moved) <= float(bound) <= float(moved) * (1 + 1e-12)


@pytest.mark.parametrize("b1", [0.0, 0.5, 0.99])
def test_nesterov_bound_is_reached_in_a_first_step(b1: float) -> None:
    """From zero moments every inequality of its proof is an equality: a term too few, or too many, would show."""
    p = nn.Parameter(torch.zeros(100, dtype=torch.float64))
    optimizer = C3O(
        [p], lr=1.0, betas=(b1, 0.7), eps=1e-30, weight_decay=0.0, trust_radius=1e9, trust_norm_refresh_drift=0.1,
        state_dtype=torch.float64,
    )  # fmt: skip
    p.grad = torch.linspace(-3, 4, 100, dtype=torch.float64)
    optimizer.step()
    one, sqrt_n = torch.ones((), dtype=torch.float64), torch.tensor(10.0, dtype=torch.float64)
    rule = Rule.from_group(optimizer.param_groups[0])
    slack = Slack.of(STORAGES["float64"], torch.float64, torch.float64)
    bias = (1 - b1) * one, (1 - 0.7) * one
    bound = update_norm_bound(0 * one, one, *bias, sqrt_n, rule, slack)
    applied = applied_norm_bound(bound, *bias, sqrt_n, rule, slack)
    moved = float(p.detach().norm())
    assert moved * (1 - 1e-12) <= float(applied) <= moved * (1 + 1e-12)
    assert moved == pytest.approx(10 * (1 + b1 / (1 + b1)))


def test_turning_the_skip_on_later_starts_from_no_knowledge() -> None:
    params = parameters()
    optimizer = C3O(params, lr=1e-4, state_dtype=torch.float64)
    run(optimizer, params, 3)
    optimizer.param_groups[0]["trust_norm_refresh_drift"] = 0.1
    run(optimizer, params, 1, start=3)
    assert optimizer.metrics()["c3o_trust_norm_skipped"] == 0
    run(optimizer, params, 1, start=4)
    assert optimizer.metrics()["c3o_trust_norm_skipped"] > 0


def rule_and_worst_case(decay: float, gain: float) -> tuple[Rule, torch.Tensor, torch.Tensor, float]:
    """A rule, θ, and a direction u along θ: the update that uses the bounds up. Last: the largest credit factor."""
    group = {
        **C3O([nn.Parameter(torch.zeros(1))], lr=0.05, weight_decay=decay, credit_gain=gain).param_groups[0],
        "trust_radius": 0.5, "trust_floor": 0.0, "trust_norm_refresh_drift": 0.1, "trust_norm_refresh_steps": 2,
    }  # fmt: skip
    theta = torch.tensor([3.0, 4.0], dtype=torch.float64)
    return Rule.from_group(group), theta, theta / theta.norm(), 2.0 if gain else 1.0


@pytest.mark.parametrize("gain", [0.0, 1.0])
@pytest.mark.parametrize("decay", [0.0, 4.0])
def test_decision_and_weight_bound_are_sharp_in_the_worst_case(decay: float, gain: float) -> None:
    """Both inequalities are equalities for an update along θ: a forgotten term would show."""
    rule, theta, along, s_max = rule_and_worst_case(decay, gain)
    limit = (1 - 0.1) * 0.5 * float(theta.norm())
    largest = (limit / 0.05 - decay * float(theta.norm())) / s_max  # |u| at which |Δ| is the limit
    one, sqrt_n = torch.ones((), dtype=torch.float64), torch.tensor(2**0.5, dtype=torch.float64)
    cache = NormCache(0 * one, theta.norm(), one)
    for size, expected in ((largest * (1 - 1e-9), True), (largest * (1 + 1e-9), False)):
        assert bool(may_skip(size * one, cache, sqrt_n, rule)) is expected
    assert not may_skip(largest / 2 * one, cache._replace(norm_age=3 * one), sqrt_n, rule)
    assert not may_skip(float("nan") * one, cache, sqrt_n, rule)

    slack = Slack.of(STORAGES["float64"], torch.float64, torch.float64)
    bound = largest / 2 * one
    moved = theta - 0.05 * (s_max * bound * along + decay * theta)
    for skip in (True, False):
        d_norm = (s_max * bound * along + decay * theta).norm()
        # The weights move by the applied direction, whatever the plain one's bound is.
        new = next_cache(
            torch.tensor(skip), bound / 4, bound, cache, d_norm, theta.norm(), one, rule, slack, plain_norm=bound / 8
        )
        of_plain = float(bound / 4 if skip else bound / 8 / (0.5 if gain else 1.0))  # credit_min
        assert of_plain <= float(new.update_norm) <= of_plain * (1 + 1e-12)
        assert float(moved.norm()) * (1 - 1e-12) <= float(new.param_norm) <= float(moved.norm())
        assert float(new.norm_age) == (2 if skip else 1)


@pytest.mark.parametrize("setting", ["trust_norm_refresh_drift", "trust_radius"])
@pytest.mark.parametrize("foreach", [True, False])
def test_bounds_do_not_outlive_a_pause_of_the_skip(foreach: bool, setting: str) -> None:
    """While it is off weights move unwatched, so bounds from before would prove what is false."""
    p = nn.Parameter(torch.full((100,), 1.0, dtype=torch.float64))
    optimizer = C3O(
        [p], lr=1e-3, weight_decay=0.0, trust_norm_refresh_drift=0.1, trust_norm_refresh_steps=1000,
        state_dtype=torch.float64, foreach=foreach,
    )  # fmt: skip
    (group,) = optimizer.param_groups
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    assert optimizer.metrics()["c3o_trust_norm_skipped"] == 1
    before, group[setting], group["lr"] = group[setting], 0.0, 0.0495
    for _ in range(20):
        optimizer.step()
    assert p.norm() < 2  # it was 10, of which 0.1 · 0.9 would have let the next step through
    group[setting] = before
    norm, theta = p.norm().item(), p.detach().clone()
    optimizer.step()
    assert (p - theta).norm().item() == pytest.approx(0.1 * norm, rel=1e-9)  # capped
    assert optimizer.metrics()["c3o_trust_norm_skipped"] == 0
