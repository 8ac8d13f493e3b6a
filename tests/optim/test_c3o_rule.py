"""C3O's rule: the for-loop against the formulas and PyTorch's AdamW, the foreach path against the for-loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import DTYPES, RULES, assert_alike, bits, parameters, run, set_gradients, tensors_of
from torch import nn

import eco_llm.optim.c3o_foreach as foreach_module
from eco_llm.optim.c3o import C3O


@pytest.mark.parametrize("foreach", [True, False])
def test_equals_adamw_without_nesterov_trust_credit_and_clip(foreach: bool) -> None:
    ours, theirs = parameters(), parameters()
    c3o = C3O(ours, lr=1e-2, trust_radius=0.0, nesterov=False, state_dtype=torch.float64, foreach=foreach)
    adamw = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    for i in range(20):
        set_gradients(ours, i)
        set_gradients(theirs, i)
        c3o.step()
        adamw.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_fused_direction_equals_the_calls(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, called = parameters(dtype), parameters(dtype)
    a, b = (C3O(p, state_dtype=dtype, foreach=True, **RULES[name]) for p in (fused, called))
    run(a, fused, 6)
    monkeypatch.setattr(foreach_module, "adam_serves", lambda *_: False)
    run(b, called, 6)
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
        else:
            assert_alike(x, y, rounded=False)


@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_foreach_equals_for_loop(name: str, dtype: torch.dtype, state_dtype: torch.dtype | str) -> None:
    bulk, single = parameters(dtype), parameters(dtype)
    a = C3O(bulk, state_dtype=state_dtype, foreach=True, **RULES[name])
    b = C3O(single, state_dtype=state_dtype, foreach=False, **RULES[name])
    run(a, bulk, 6)
    run(b, single, 6)
    exact = dtype == state_dtype == torch.float64
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        if exact:
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
        else:
            assert_alike(x, y, rounded=torch.bfloat16 in (dtype, state_dtype) or isinstance(state_dtype, str))
    for key in ("c3o_trust_norm_skipped", "c3o_trust_norm_exact", "c3o_trust_capped"):
        assert a.metrics()[key] == b.metrics()[key]


@pytest.mark.parametrize("foreach", [True, False])
def test_nesterov_equals_nadam_without_its_momentum_schedule(foreach: bool) -> None:
    """NAdam's μ_t is b1 (1 - 0.5 · 0.96^(t · decay)): with a huge decay it is b1 in every step. PyTorch keeps the
    product of all μ in float32, whence the tolerance.
    """
    ours, theirs = parameters(), parameters()
    c3o = C3O(ours, lr=1e-2, trust_radius=0.0, state_dtype=torch.float64, foreach=foreach)
    nadam = torch.optim.NAdam(
        theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, decoupled_weight_decay=True, momentum_decay=1e6
    )
    for i in range(20):
        set_gradients(ours, i)
        set_gradients(theirs, i)
        c3o.step()
        nadam.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_every_rule_of_the_table_changes_the_result() -> None:
    results = {}
    for name in RULES:
        params = parameters()
        run(C3O(params, state_dtype=torch.float64, **RULES[name]), params, 6)
        results[name] = torch.cat([p.detach().reshape(-1) for p in params])
    for name in set(RULES) - {"plain", "cap"}:  # the default radius does not bind; "cap-binds" is its test
        assert not torch.equal(results[name], results["cap"]), name


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lr=st.floats(1e-5, 1.0),
    radius=st.sampled_from([0.0, 1e-4, 0.1, 2.0]),
    drift=st.sampled_from([0.0, 0.01, 0.5]),
    gain=st.sampled_from([0.0, 10.0]),
    b1=st.floats(0, 0.99),
    b2=st.floats(0.5, 0.999),
    exponent=st.integers(-6, 6),
)
def test_foreach_equals_for_loop_on_random_settings(
    seed: int, lr: float, radius: float, drift: float, gain: float, b1: float, b2: float, exponent: int
) -> None:
    results = []
    for foreach in (True, False):
        gen = torch.Generator().manual_seed(seed)
        shapes = [(4100,), (17, 3), ()]
        params = [nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float64)) for s in shapes]
        optimizer = C3O(
            params, lr=lr, betas=(b1, b2), trust_radius=radius, trust_norm_refresh_drift=drift, credit_gain=gain,
            state_dtype=torch.float64, foreach=foreach,
        )  # fmt: skip
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64) * 10.0**exponent
            optimizer.step()
        results.append(params)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_cap_holds_the_update_at_the_radius() -> None:
    p = nn.Parameter(torch.randn(50, 40, dtype=torch.float64))
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    optimizer = C3O([p], lr=1.0, trust_radius=0.01, state_dtype=torch.float64)
    optimizer.step()
    assert ((before - p).norm() / before.norm()).item() == pytest.approx(0.01, rel=1e-12)
    assert optimizer.metrics()["c3o_trust_capped"] == 1
    assert optimizer.metrics()["c3o_update_to_weight"] == pytest.approx(0.01)


def test_floor_lets_a_zero_tensor_leave_zero_and_no_floor_does_not() -> None:
    for floor, expected in ((1e-3, 0.1 * 1e-3 * 10), (0.0, 0.0)):
        p = nn.Parameter(torch.zeros(100, dtype=torch.float64))
        p.grad = torch.randn_like(p)
        C3O([p], lr=1.0, trust_radius=0.1, trust_floor=floor, state_dtype=torch.float64).step()
        assert p.norm().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("foreach", [True, False])
def test_credit_rewards_blocks_that_agree_with_their_past(foreach: bool) -> None:
    p = nn.Parameter(torch.zeros(3 * 4096 + 5, dtype=torch.float64))
    optimizer = C3O(
        [p],
        credit_gain=3.0,
        state_dtype=torch.float64,
        foreach=foreach,
        trust_radius=0.0,
        weight_decay=0,
        nesterov=False,
    )
    g = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(4):
        p.grad = g.clone()
        p.grad[4096:8192] *= (-1) ** i  # block 1 contradicts itself
        before = p.detach().clone()
        optimizer.step()
        if i == 0:
            assert torch.count_nonzero(optimizer.state[p]["credit"]) == 0  # no past, no credit
    e = optimizer.state[p]["credit"]
    assert e[1] < 0 < e[0]
    assert e.sum().item() == pytest.approx(0, abs=1e-12)  # centred over the tensor's blocks
    # Block 0's gradient never changed, so u is 1 in size there and the step shows s itself.
    s = (before - p).abs()[:4096].mean() / 1e-3
    assert s.item() == pytest.approx(torch.exp(3.0 * e[0]).clamp(0.5, 2.0).item(), rel=1e-5)


@pytest.mark.parametrize("foreach", [True, False])
def test_credit_leaves_one_block_tensors_alone(foreach: bool) -> None:
    plain, credited = parameters(shapes=((4096,), (9, 9))), parameters(shapes=((4096,), (9, 9)))
    run(C3O(plain, state_dtype=torch.float64, foreach=foreach), plain, 5)
    run(C3O(credited, state_dtype=torch.float64, foreach=foreach, credit_gain=9.0), credited, 5)
    assert bits([p.detach() for p in plain]) == bits([p.detach() for p in credited])


def test_credit_off_keeps_no_state() -> None:
    params = parameters()
    optimizer = C3O(params)
    run(optimizer, params, 1)
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in optimizer.state.values())


def test_result_does_not_depend_on_buckets_or_on_what_scratch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    rule: dict[str, Any] = {**RULES["credit-skip"], "state_dtype": torch.bfloat16}
    whole, split = parameters(torch.float32), parameters(torch.float32)
    run(C3O(whole, **rule), whole, 4)
    monkeypatch.setitem(foreach_module.BUCKET_ELEMENTS, "cpu", 2 * 4096)
    monkeypatch.setattr(
        torch, "empty", lambda *s, **k: torch.full(s if isinstance(s[0], int) else s[0], float("nan"), **k)
    )
    optimizer = C3O(split, **rule)
    run(optimizer, split, 4)
    assert optimizer.metrics()["c3o_foreach_groups"] > 4
    for a, b in zip(whole, split, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("foreach", [True, False])
def test_clip_norm_is_global_and_reuses_a_known_norm(foreach: bool) -> None:
    clipped, scaled, hinted = parameters(), parameters(), parameters()
    a = C3O(clipped, grad_clip=0.5, state_dtype=torch.float64, foreach=foreach)
    b = C3O(scaled, state_dtype=torch.float64, foreach=foreach)
    c = C3O(hinted, grad_clip=0.5, state_dtype=torch.float64, foreach=foreach)
    for params in (clipped, scaled, hinted):
        set_gradients(params, 0)
    torch.nn.utils.clip_grad_norm_(scaled, 0.5)
    a.step()
    b.step()
    c.grad_norm = torch.tensor(1e3, dtype=torch.float64)
    c.step()
    for x, y in zip(clipped, scaled, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=0)
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)
    assert c.grad_norm is None
    assert c.metrics()["c3o_grad_clip_scale"] == pytest.approx(0.5e-3)


@pytest.mark.parametrize("missing", ["none", "clamp", "all"])
def test_clip_value_works_whichever_foreach_clamps_exist(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def clamp(grads: list[torch.Tensor], low: float, high: float) -> None:
        calls.append(len(grads))
        for g in grads:
            g.clamp_(low, high)

    if missing == "none":
        monkeypatch.setattr(torch, "_foreach_clamp_", clamp, raising=False)
    else:
        monkeypatch.delattr(torch, "_foreach_clamp_", raising=False)
    if missing == "all":
        for name in [n for n in dir(torch) if n.startswith("_foreach_clamp")]:
            monkeypatch.delattr(torch, name)
    params, expected = parameters(), parameters()
    optimizer = C3O(params, grad_clip=0.01, grad_clip_mode="value", state_dtype=torch.float64)
    set_gradients(params, 0)
    set_gradients(expected, 0)
    for p in expected:
        p.grad.clamp_(-0.01, 0.01)
    optimizer.step()
    C3O(expected, state_dtype=torch.float64).step()
    assert bits([p.detach() for p in params]) == bits([p.detach() for p in expected])
    assert bool(calls) == (missing == "none")
    groups = optimizer.metrics()["c3o_grad_clip_foreach_groups"]
    assert groups == (0 if missing == "all" else optimizer.metrics()["c3o_foreach_groups"])
    assert (groups > 0) == (missing != "all")
