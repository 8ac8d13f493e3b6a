"""C3O's sphere: hidden matrices that keep their norm. The kernels' tests are in test_c3o_triton.py."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from optim_cases import DTYPES, bits, parameters, resumed, run, set_gradients, tensors_of
from torch import nn

from eco_llm.optim.c3o import C3O

RULE: dict[str, Any] = {"lr": 1e-2, "sphere": 3.0, "weight_decay": 0.3}
both_paths = pytest.mark.parametrize("foreach", [True, False])


def norm(p: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(p.detach().double()))


@both_paths
def test_equals_the_formula(foreach: bool) -> None:
    p = nn.Parameter(torch.randn(90, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    optimizer = C3O([p], betas=(0.8, 0.9), eps=1e-3, state_dtype=torch.float64, foreach=foreach, **RULE)
    theta = p.detach().numpy().copy()
    radius, m, v = np.linalg.norm(theta), 0.0, 0.0
    for t in range(1, 8):
        set_gradients([p], t)
        assert p.grad is not None
        g = p.grad.numpy().copy()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        look = 0.8 * m / (1 - 0.8 ** (t + 1)) + 0.2 * g / (1 - 0.8**t)
        u = look / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        ahead = theta - 3.0 * 1e-2 * radius * u / np.linalg.norm(u)
        theta = radius * ahead / np.linalg.norm(ahead)
        np.testing.assert_allclose(p.detach().numpy(), theta, rtol=1e-12, atol=1e-13)
    assert optimizer.metrics()["c3o_update_to_weight"] == pytest.approx(0.03)
    assert optimizer.metrics()["c3o_trust_norm_exact"] == 1
    assert optimizer.metrics()["c3o_trust_capped"] == 0


@both_paths
@pytest.mark.parametrize(
    ("dtype", "error_bits", "within"),
    # A weight is rounded by less than 2^-7 of it, with error bits 2^-15; over thousands of weights that averages out.
    [(torch.float32, 0, 1e-6), (torch.bfloat16, 0, 2.0**-10), (torch.bfloat16, 8, 2.0**-18)],
    ids=str,
)
def test_norm_is_held(dtype: torch.dtype, error_bits: int, within: float, foreach: bool) -> None:
    from eco_llm.optim.rounding import joined_weight

    params = parameters(dtype, shapes=((63, 65), (4097,), (100, 130)))[:3]
    start = [norm(p) for p in params]
    first = [p.detach().double() for p in params]
    optimizer = C3O(params, foreach=foreach, error_bits=error_bits, **RULE)
    for i in range(200):
        run(optimizer, params, 1, start=i)
        for p, was in zip(params, start, strict=True):
            value = joined_weight(p, optimizer.state[p]["error"]) if error_bits else p
            assert norm(value) == pytest.approx(was, rel=within)
    assert all(
        norm(p.double() - q) > 0.5 * norm(q) for p, q in zip(params, first, strict=True)
    )  # and it went somewhere


@both_paths
def test_zeros_leave_zero_under_the_cap_and_a_missing_direction_decays(foreach: bool) -> None:
    zeros, still, moving = (nn.Parameter(torch.full((20, 30), x, dtype=torch.float64)) for x in (0.0, 1.0, 1.0))
    optimizer = C3O(
        [zeros, still, moving], trust_radius=0.1, trust_floor=1e-3, state_dtype=torch.float64, foreach=foreach, **RULE
    )
    twin = nn.Parameter(zeros.detach().clone())
    capped = C3O([twin], lr=1e-2, trust_radius=0.1, weight_decay=0.3, state_dtype=torch.float64, foreach=foreach)
    for i in range(4):
        set_gradients([zeros, twin, moving], i)
        still.grad = torch.zeros_like(still)
        zeros.grad = twin.grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        capped.step()
        torch.testing.assert_close(zeros, twin, rtol=1e-12, atol=1e-18)
        assert optimizer.metrics()["c3o_trust_capped"] == capped.metrics()["c3o_trust_capped"]
    assert norm(zeros) > 0
    torch.testing.assert_close(still.detach(), torch.full_like(still, (1 - 1e-2 * 0.3) ** 4))
    assert norm(moving) == pytest.approx(600**0.5, rel=1e-12)
    set_gradients([still], 0)
    optimizer.step()
    assert norm(still) == pytest.approx(600**0.5, rel=1e-12)  # back on its sphere with the first direction


@both_paths
def test_no_learning_rate_changes_no_bit(foreach: bool) -> None:
    params = parameters(torch.float32)
    optimizer = C3O(params, lr=0.0, sphere=3.0, foreach=foreach)
    before = bits([p.detach() for p in params])
    run(optimizer, params, 3)
    assert bits([p.detach() for p in params]) == before


@both_paths
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_scale_of_weights_and_gradients_does_not_matter(size: float, foreach: bool) -> None:
    """Products of such norms would leave float32's range."""
    plain, scaled = (parameters(torch.float32, shapes=((63, 65), (9, 70)))[:2] for _ in range(2))
    with torch.no_grad():
        for p in scaled:
            p.mul_(size)
    a, b = (C3O(x, eps=1e-30, foreach=foreach, trust_floor=0.0, **RULE) for x in (plain, scaled))
    for i in range(3):
        set_gradients(plain, i)
        set_gradients(scaled, i, scale=1e-8)
        a.step()
        b.step()
    for p, q in zip(plain, scaled, strict=True):
        torch.testing.assert_close(q.detach() / size, p.detach(), rtol=1e-5, atol=1e-5)


@both_paths
@pytest.mark.parametrize("on_host", [True, False], ids=["host-flag", "device-flag"])
@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES, ids=str)
def test_refused_steps_change_no_bit(
    dtype: torch.dtype, state_dtype: torch.dtype | str, foreach: bool, on_host: bool
) -> None:
    params = parameters(dtype)
    optimizer = C3O(params, state_dtype=state_dtype, foreach=foreach, grad_clip=1.0, **RULE)
    optimizer._read_flag_on_cpu = on_host
    for start in (0, 2):  # also as the first step of all
        before = bits([p.detach() for p in params]) if start == 0 else bits(tensors_of(optimizer))
        for bad in (float("nan"), float("inf"), 0.5):
            set_gradients(params, 3)
            for p in params:
                assert p.grad is not None
                p.grad.fill_(bad)
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.step()
            optimizer.found_inf = torch.tensor(0.0)
            assert bits([p.detach() for p in params] if start == 0 else tensors_of(optimizer)) == before
        assert all(float(s.get("sphere_radius", -1)) == -1 for s in optimizer.state.values()) == (start == 0)
        run(optimizer, params, 2, start=start)
        assert bits([p.detach() for p in params]) != before


@both_paths
@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES, ids=str)
def test_resume_is_exact_through_a_weights_only_file(
    dtype: torch.dtype, state_dtype: torch.dtype | str, foreach: bool
) -> None:
    through, before = parameters(dtype), parameters(dtype)
    straight, first = (C3O(x, state_dtype=state_dtype, foreach=foreach, **RULE) for x in (through, before))
    run(straight, through, 6)
    run(first, before, 3)
    second, after = resumed(first, before)
    run(second, after, 3, start=3)
    assert bits(tensors_of(straight)) == bits(tensors_of(second))
    radius = second.state[after[1]]["sphere_radius"]
    assert radius.shape == ()
    assert radius.dtype == (torch.float64 if torch.float64 in (dtype, state_dtype) else torch.float32)


@both_paths
def test_switched_on_it_takes_the_norm_of_that_step_and_switched_off_it_forgets_it(foreach: bool) -> None:
    params = parameters()
    optimizer = C3O(params, lr=0.05, state_dtype=torch.float64, foreach=foreach)
    run(optimizer, params, 3)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["sphere"]  # as saved before there was one
    resumed = C3O(params, foreach=foreach)
    resumed.load_state_dict(old)
    assert resumed.param_groups[0]["sphere"] == 0.0
    for sphere, steps in ((3.0, 2), (0.0, 2), (3.0, 2)):
        resumed.param_groups[0]["sphere"] = sphere
        now = norm(params[1])
        run(resumed, params, steps, start=10)
        if sphere:
            assert norm(params[1]) == pytest.approx(now, rel=1e-12)
            assert float(resumed.state[params[1]]["sphere_radius"]) == pytest.approx(now, rel=1e-12)
        else:
            assert norm(params[1]) != pytest.approx(now, rel=1e-4)
            assert "sphere_radius" not in resumed.state[params[1]]


@both_paths
def test_groups_with_and_without_one_step_as_they_would_alone(foreach: bool) -> None:
    a, b = parameters(), parameters()
    together = C3O([{"params": a, **RULE}, {"params": b}], state_dtype=torch.float64, foreach=foreach)
    c, d = parameters(), parameters()
    alone = [C3O(c, state_dtype=torch.float64, foreach=foreach, **RULE)]
    alone.append(C3O(d, state_dtype=torch.float64, foreach=foreach))
    for i in range(3):
        set_gradients(a, i)
        set_gradients(b, i)
        together.step()
        run(alone[0], c, 1, start=i)
        run(alone[1], d, 1, start=i)
    assert bits([p.detach() for p in a + b]) == bits([p.detach() for p in c + d])


@both_paths
def test_norms_of_a_sphere_are_never_skipped(foreach: bool) -> None:
    a, b = parameters(), parameters()
    for params, drift in ((a, 0.1), (b, 0.0)):
        optimizer = C3O(params, state_dtype=torch.float64, foreach=foreach, trust_norm_refresh_drift=drift, **RULE)
        run(optimizer, params, 4)
        assert optimizer.metrics()["c3o_trust_norm_skipped"] == 0
        assert "update_norm" not in optimizer.state[params[1]]
    assert bits([p.detach() for p in a]) == bits([p.detach() for p in b])
