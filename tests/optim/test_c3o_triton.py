"""C3O's Triton path against the for-loop. On a GPU: `pytest -m gpu`; in Triton's interpreter, here or anywhere:
`TRITON_INTERPRET=1 pytest -m gpu tests/optim/test_c3o_triton.py`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import assert_alike, bits, set_gradients, tensors_of
from torch import Tensor, nn

from eco_llm.config import OptimizerConfig
from eco_llm.optim.c3o import C3O
from eco_llm.optim.rounding import FIRST_MOMENT, SECOND_MOMENT, dithered_bfloat16, joined_weight
from eco_llm.optim.update import Update

pytestmark = pytest.mark.gpu
NEVER = 1 << 20  # patience that no test exhausts
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu_only = pytest.mark.skipif(INTERPRETED, reason="needs CUDA itself")

# 0-dim, one element, odd, around a credit block, two chunks of the kernels and a bit, empty.
SHAPES = ((), (1,), (63,), (4095,), (4097,), (33, 1000), (0,), (2, 3, 5))
RULES: dict[str, dict[str, Any]] = {
    "default": {"grad_clip": 1.0},
    "no-cap": {"trust_radius": 0.0},
    "cap-binds": {"trust_radius": 1e-3, "lr": 1e-2, "grad_clip": 0.5},
    "skip": {"trust_norm_refresh_drift": 0.05, "trust_norm_refresh_steps": 3, "lr": 3e-3, "grad_clip": 1.0},
    "value": {"grad_clip": 0.01, "grad_clip_mode": "value"},
    "no-momentum": {"betas": (0.0, 0.999), "weight_decay": 0.0},
    "no-second": {"betas": (0.9, 0.0), "eps": 1e-3, "trust_norm_refresh_drift": 0.1},
    "sphere": {"sphere": 3.0, "lr": 1e-2, "grad_clip": 1.0},
    "sphere-no-cap": {"sphere": 3.0, "lr": 1e-2, "trust_radius": 0.0},
    "plain": {"nesterov": False, "grad_clip": 1.0},
    "plain-skip": {"nesterov": False, "trust_norm_refresh_drift": 0.05, "trust_norm_refresh_steps": 3, "lr": 3e-3},
    "plain-sphere": {"nesterov": False, "sphere": 3.0, "lr": 1e-2},
}
TYPES: tuple[tuple[torch.dtype, torch.dtype | str], ...] = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, "int8"),
    (torch.bfloat16, "int8"),
    (torch.float32, "int4"),
    (torch.bfloat16, "int4"),
)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's CPU tensors take the kernels too."""
    pytest.importorskip("triton")
    from eco_llm.optim import c3o_triton

    monkeypatch.setattr(c3o_triton, "PATIENCE", 1)  # in few steps, guesses both right and wrong
    if INTERPRETED:
        monkeypatch.setattr(C3O, "_force_kernels", True)
        # Fewer, larger operations: the interpreter's cost is their number. 4-bit codes take twice this.
        monkeypatch.setattr(c3o_triton, "TILE", 4096)


def parameters(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(1)
    values = [torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes] + [torch.zeros(5, 7)]
    return [nn.Parameter(v.to(DEVICE, dtype)) for v in values]


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def run(optimizer: C3O, params: list[nn.Parameter], steps: int, start: int = 0) -> None:
    for i in range(start, start + steps):
        set_gradients(params, i)
        optimizer.step()


def check_close(a: list[Tensor], b: list[Tensor], dtype: torch.dtype, state: torch.dtype | str) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.isfinite(x).all()
        assert_alike(x, y, rounded=torch.bfloat16 in (dtype, state) or isinstance(state, str))


def served_whole(optimizer: C3O) -> bool:
    return optimizer._kernel_metrics is not None


@pytest.mark.parametrize(("dtype", "state"), TYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_equals_for_loop(
    name: str, dtype: torch.dtype, state: torch.dtype | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eco_llm.optim import c3o_triton

    monkeypatch.setattr(c3o_triton, "PATIENCE", NEVER)  # a guess may leave a metric, compared here, at the last factor
    ours, theirs = parameters(dtype), parameters(dtype)
    rule = RULES[name]
    if dtype == torch.bfloat16 and isinstance(state, str):
        # Clipping rounds the for-loop's gradients (below), which codes would show as other codes all over.
        rule = {key: value for key, value in rule.items() if "clip" not in key}
    a, b = C3O(ours, state_dtype=state, **rule), C3O(theirs, state_dtype=state, foreach=False, **rule)
    for i in range(5):
        run(a, ours, 1, start=i)
        run(b, theirs, 1, start=i)
        assert served_whole(a)
        left, right = a.metrics(), b.metrics()
        for key in ("c3o_trust_norm_skipped", "c3o_trust_norm_exact", "c3o_trust_capped"):
            assert left[key] == right[key], (key, i)
        assert left["c3o_grad_clip_scale"] == pytest.approx(right["c3o_grad_clip_scale"], rel=1e-5)
        if not a.param_groups[0]["trust_norm_refresh_drift"]:
            # The for-loop rounds the clip factor to the gradients' type, the kernels do not.
            rel = 1e-2 if dtype == torch.bfloat16 else 1e-4
            assert left["c3o_update_to_weight"] == pytest.approx(right["c3o_update_to_weight"], rel=rel)
    if dtype == torch.bfloat16 and a.param_groups[0]["grad_clip"]:
        # The for-loop clips bfloat16 gradients in place: factor, product and limit are rounded. Not in the kernels.
        for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
            torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-6 * float(y.abs().max()) if y.numel() else 0.0)
    else:
        check_close(tensors_of(a), tensors_of(b), dtype, state)


def test_groups_keep_their_own_settings_and_types() -> None:
    def make(foreach: bool | None) -> tuple[list[nn.Parameter], C3O]:
        sets = [
            parameters(shapes=((40, 50), (9,))),
            parameters(torch.bfloat16, ((70,), ())),
            parameters(shapes=((5,),)),
            parameters(shapes=((60, 70), (11,))),
            parameters(shapes=((50, 70), (12,))),
            parameters(shapes=((30, 80),)),
        ]
        groups = [
            {"params": sets[0], "lr": 1e-2, "weight_decay": 0.3},
            {"params": sets[1], "betas": (0.5, 0.9), "trust_radius": 1e-3},
            {"params": sets[2], "trust_radius": 0.0, "state_dtype": torch.bfloat16},
            {"params": sets[3], "lr": 3e-3, "nesterov": False, "trust_norm_refresh_drift": 0.05},
            {"params": sets[4], "lr": 3e-3, "trust_norm_refresh_drift": 0.05},
            {"params": sets[5], "lr": 3e-3, "trust_norm_refresh_drift": 0.05, "sphere": 2.0},  # beside a skip: one kind
        ]
        return [p for s in sets for p in s], C3O(groups, grad_clip=0.1, foreach=foreach)

    (ours, a), (theirs, b) = make(None), make(False)
    run(a, ours, 4)
    run(b, theirs, 4)
    assert served_whole(a)
    exact = [p for group in (0, 3, 4, 5) for p in a.param_groups[group]["params"]]
    strict = {x.data_ptr() for p in exact for x in (p, *a.state[p].values())}
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        rel = 2e-5 if x.data_ptr() in strict else 2**-6
        torch.testing.assert_close(x, y, rtol=rel, atol=rel * float(y.abs().max()) if y.numel() else 0.0)
    left, right = a.metrics(), b.metrics()
    assert left["c3o_trust_capped"] == right["c3o_trust_capped"] > 0
    assert left["c3o_trust_norm_skipped"] == right["c3o_trust_norm_skipped"] == 4  # of both groups, but for the zeros


def test_parameters_without_gradients_are_left_alone_and_join_later() -> None:
    ours = parameters(shapes=((5,), (6, 7), (4099,)))
    theirs = copies(ours)
    a, b = C3O(ours, grad_clip=1.0, **{"lr": 3e-3}), C3O(theirs, grad_clip=1.0, lr=3e-3, foreach=False)
    for i in range(7):
        for params, optimizer in ((ours, a), (theirs, b)):
            set_gradients(params, i)
            for k, p in enumerate(params):
                if (i + k) % 3 == 0 or i < k:
                    p.grad = None
            optimizer.step()
        assert {k for k, p in enumerate(ours) if p in a.state} == {k for k, p in enumerate(theirs) if p in b.state}
    check_close(tensors_of(a), tensors_of(b), torch.float32, torch.float32)


@pytest.mark.parametrize(("dtype", "state"), TYPES, ids=str)
@pytest.mark.parametrize("rule", [{}, {"trust_norm_refresh_drift": 0.05}, {"sphere": 2.0}], ids=str)
def test_refused_steps_change_no_bit(dtype: torch.dtype, state: torch.dtype | str, rule: dict[str, Any]) -> None:
    params = parameters(dtype)
    with torch.no_grad():
        params[2][:2] = torch.tensor([0.0, -0.0])
    optimizer = C3O(params, state_dtype=state, grad_clip=1.0, **rule)
    run(optimizer, params, 2)
    before, metrics = bits(tensors_of(optimizer)), optimizer.metrics()
    for bad in (float("nan"), float("inf"), 0.5):
        set_gradients(params, 3)
        for p in params:
            assert p.grad is not None
            p.grad.fill_(bad)
        optimizer.found_inf = torch.ones((), device=DEVICE)
        optimizer.step()
        del optimizer.found_inf
        assert bits(tensors_of(optimizer)) == before
        _, applied = optimizer.guarded_step(torch.tensor(1.0 if bad != 0.5 else float("nan"), device=DEVICE))
        assert not applied
        assert bits(tensors_of(optimizer)) == before
    assert optimizer.metrics() == metrics
    set_gradients(params, 4)
    assert optimizer.guarded_step(torch.ones((), device=DEVICE))[1]
    assert bits(tensors_of(optimizer)) != before


@pytest.mark.parametrize(("dtype", "state"), TYPES, ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
def test_skip_equals_exact_bit_for_bit(nesterov: bool, dtype: torch.dtype, state: torch.dtype | str) -> None:
    exact, skipping = parameters(dtype), parameters(dtype)
    rule: dict[str, Any] = {"lr": 1e-3, "state_dtype": state, "grad_clip": 1.0, "nesterov": nesterov}
    a, b = C3O(exact, **rule), C3O(skipping, trust_norm_refresh_drift=0.02, **rule)
    total = 0.0
    for i in range(6):
        run(a, exact, 1, start=i)
        run(b, skipping, 1, start=i)
        total += b.metrics()["c3o_trust_norm_skipped"]
    assert total > 10
    assert bits([p.detach() for p in exact]) == bits([p.detach() for p in skipping])
    for p, q in zip(exact, skipping, strict=True):
        if p.numel():
            assert bits([a.state[p]["exp_avg"]]) == bits([b.state[q]["exp_avg"]])


def guarded_steps(
    optimizer: C3O, scales: list[float], patience: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[bytes]], list[tuple[float, float]]]:
    """For each step, with gradients of that scale: all bits; and whether anything was measured in turn 1, in turn 2."""
    from eco_llm.optim import c3o_triton

    monkeypatch.setattr(c3o_triton, "PATIENCE", patience)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found, turns = [], []
    for i, scale in enumerate(scales):
        set_gradients(params, i, scale=scale)
        params[1].grad = None if i % 2 else params[1].grad  # known to the plan, in some steps absent
        norm, applied = optimizer.guarded_step(torch.zeros((), device=DEVICE))
        assert applied
        counts = [value for key, value in optimizer.metrics().items() if key != "c3o_update_to_weight"]
        found.append(bits([*tensors_of(optimizer), norm, torch.tensor(counts)]))
        assert optimizer._kernel_metrics is not None
        first, second = optimizer._kernel_metrics._control[2:4].tolist()
        turns.append((first, second))
    return found, turns


MIXED: dict[str, list[dict[str, Any]]] = {
    "exact": [{"grad_clip": 1.0}],
    "value": [{"grad_clip": 0.01, "grad_clip_mode": "value"}],
    "groups": [{"grad_clip": 1.0}, {"grad_clip": 0.0}, {"grad_clip": 20.0, "sphere": 3.0, "lr": 1e-2}],
    "sphere beside skip": [{"grad_clip": 1.0, "sphere": 3.0}, {"grad_clip": 1.0, "trust_norm_refresh_drift": 0.05}],
    "plain beside nesterov": [{"grad_clip": 1.0, "nesterov": False}, {"grad_clip": 1.0, "sphere": 3.0}],
}


@pytest.mark.parametrize(("dtype", "state"), [TYPES[0], TYPES[3], TYPES[5], TYPES[6]], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_measuring_before_the_norm_is_known_changes_no_bit(
    name: str, dtype: torch.dtype, state: torch.dtype | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess that the clip factor is the last one, right or wrong, against the norm first in every step."""
    clipped = (False, False, True, True, False, True)
    found: dict[int, list[list[bytes]]] = {}
    turns: dict[int, list[tuple[float, float]]] = {}
    for patience in (NEVER, 0, 1):
        groups = [{"params": parameters(dtype, ((63,), (), (17, 1000))), **rule} for rule in MIXED[name]]
        optimizer = C3O(groups, lr=3e-3, state_dtype=state)
        found[patience], turns[patience] = guarded_steps(
            optimizer, [1.0 if large else 1e-4 for large in clipped], patience, monkeypatch
        )
    assert found[NEVER] == found[0] == found[1]
    assert set(turns[NEVER]) == {(0.0, 1.0)}
    # A tensor of float32 moments without Nesterov always waits for the norm; one of zeros, whose cap binds, and one on
    # a sphere are measured again whenever the factor is another.
    waits = float(name == "plain beside nesterov" and state == torch.float32)
    changes = [name != "value" and (now or (i > 0 and clipped[i - 1])) for i, now in enumerate(clipped)]
    assert turns[0] == [(1.0, max(waits, float(change))) for change in changes]
    assert turns[1][:2] == [(0.0, 1.0), (1.0, waits)]
    assert turns[1][2] == (1.0, max(waits, float(changes[2])))


@pytest.mark.parametrize(("dtype", "state"), [TYPES[0], TYPES[3], TYPES[5], TYPES[6]], ids=str)
@pytest.mark.parametrize("radius", [0.2, 0.012, 0.0062, 0.0055, 0.005, 0.003])
def test_a_guess_holds_where_the_cap_is_idle_whatever_the_factor(
    radius: float, dtype: torch.dtype, state: torch.dtype | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is clipped, by another factor. |Δ| of lr 5e-3 is about 0.0055 |θ|: idle, near its cap, and capped."""
    found, turns = {}, {}
    for patience in (NEVER, 0):
        params = parameters(dtype, ((63,), (5,), (17, 1000)))[:-1]
        optimizer = C3O(params, lr=5e-3, state_dtype=state, grad_clip=1.0, trust_radius=radius)
        found[patience], turns[patience] = guarded_steps(
            optimizer, [1.0, 1.1, 0.98, 1.15, 1.0, 1.01], patience, monkeypatch
        )
        assert radius > 0.003 or optimizer.metrics()["c3o_trust_capped"] == 2  # one has no gradient
    assert found[NEVER] == found[0]
    if radius == 0.2:
        assert turns[0][1:] == [(1.0, 0.0)] * 5
    if radius == 0.003:
        assert turns[0][1:] == [(1.0, 1.0)] * 5


@pytest.mark.parametrize(("radius", "measured_again"), [(4.0, False), (0.006, True), (0.004, True)])
def test_a_guess_far_from_the_factor_is_not_believed_near_the_cap(
    radius: float, measured_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tensor's gradient is ten times as large for one step, and so is the factor's denominator: what was
    measured with the last factor says little of the direction, and a check that took it as it is would be wrong.
    """
    from eco_llm.optim import c3o_triton

    found: dict[int, list[list[float]]] = {NEVER: [], 0: []}
    capped: dict[int, float] = {}
    again: list[float] = []
    for patience in (NEVER, 0):
        monkeypatch.setattr(c3o_triton, "PATIENCE", patience)
        p = nn.Parameter(torch.ones(64, device=DEVICE))
        other = nn.Parameter(torch.ones(4, device=DEVICE))
        groups = [{"params": [p], "trust_radius": radius}, {"params": [other], "trust_radius": 0.0}]
        optimizer = C3O(groups, lr=1e-2, weight_decay=0.0, grad_clip=1.0)
        for step, norm in enumerate((1.4, 1.4, 1.4, 14.0, 1.4)):
            p.grad = torch.linspace(-1, 1, 64, device=DEVICE) * 1e-2 * (-1) ** step
            other.grad = torch.full((4,), norm / 2, device=DEVICE)
            optimizer.step()
            found[patience].append(p.tolist())
            capped[patience] = optimizer.metrics()["c3o_trust_capped"]
            assert optimizer._kernel_metrics is not None
            again.append(optimizer._kernel_metrics._control[3].item())
    assert found[NEVER] == found[0]
    assert capped[NEVER] == capped[0]
    assert any(again[-2:]) == measured_again


@pytest.mark.parametrize("nesterov", [True, False])
def test_directions_of_two_clip_factors_are_bounded_by_each_other(nesterov: bool) -> None:
    """docs/c3o.md, "Before the norm is known", elementwise and in float64, on adversarial moments."""
    gen = torch.Generator().manual_seed(0)
    b1, b2, eps = 0.9, 0.95, 1e-8

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen).double() * 10.0 ** torch.randint(-6, 3, shape, generator=gen)

    m, g, t = values(40_000), values(40_000), torch.randint(1, 50, (40_000,), generator=gen).double()
    v = values(40_000).square() * (torch.rand(40_000, generator=gen) < 0.8)
    g[:1000], m[:1000], v[:1000] = 1.0, 0.0, 0.0
    c, measured = torch.rand(40_000, generator=gen).double(), torch.rand(40_000, generator=gen).double()
    bias1, bias2 = 1 - b1**t, 1 - b2**t
    ahead = b1 * bias1 / (1 - b1 + b1 * bias1)

    def direction(c: Tensor) -> Tensor:
        first, second = b1 * m + (1 - b1) * c * g, b2 * v + (1 - b2) * (c * g).square()
        over = (second / bias2).sqrt() + eps
        plain = first / bias1
        return ((ahead * plain + (1 - b1) / bias1 * c * g) if nesterov else plain) / over

    least = torch.minimum(c / measured, measured / c)
    most = (1 - b1) / bias1 * (bias2 / (1 - b2)).sqrt() * (1 + ahead if nesterov else 1.0)
    bound = (direction(measured).abs() + (1 / least - 1) * most) / least
    assert (direction(c).abs() <= bound * (1 + 1e-12)).all()
    assert (direction(c).abs() > 0.9 * bound).any()


@pytest.mark.parametrize("state", [torch.float32, "int4"], ids=str)
def test_norms_of_any_gradients_are_right_whichever_kernel_sums_them(
    state: torch.dtype | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty orders of magnitude beside each other, none at all, too large to square, infinite, NaN."""
    from eco_llm.optim import c3o_triton

    gen = torch.Generator().manual_seed(0)
    n = 16384 + 70
    wide = torch.randn(n, generator=gen) * 10.0 ** torch.linspace(-15, 15, n)[torch.randperm(n, generator=gen)]
    cases = [wide, torch.zeros(n), torch.full((n,), 1e30), torch.where(torch.arange(n) == 5, torch.inf, wide)]
    cases.append(torch.where(torch.arange(n) == n - 1, torch.nan, wide))
    found = []
    for patience in (0, 1 << 20):
        monkeypatch.setattr(c3o_triton, "PATIENCE", patience)
        p = nn.Parameter(torch.ones(n, device=DEVICE))
        optimizer = C3O([p], state_dtype=state, grad_clip=1e30)
        for g in cases:
            p.grad = g.to(DEVICE)
            before = bits([p.detach()])
            norm, applied = optimizer.guarded_step(torch.zeros((), device=DEVICE))
            want = g.double().norm() if bool(g.abs().max() < 1e18) else g.norm()
            torch.testing.assert_close(norm.cpu(), want.float(), rtol=2e-7, atol=0, equal_nan=True)
            assert bool(applied) == bool(torch.isfinite(norm))
            assert bool(applied) or bits([p.detach()]) == before
            found.append(bits([norm, p.detach()]))
        assert optimizer._kernel_metrics is not None
        assert float(optimizer._kernel_metrics._control[2]) == float(patience == 0)  # guessed
    assert found[: len(cases)] == found[len(cases) :]


@pytest.mark.parametrize("name", ["skip", "sphere"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, "int8", "int4"], ids=str)
@pytest.mark.parametrize("order", ["kernels-first", "foreach-first"])
def test_state_moves_between_paths(order: str, state: torch.dtype | str, name: str) -> None:
    first, second = (None, True) if order == "kernels-first" else (True, None)
    rule: dict[str, Any] = {"state_dtype": state, **RULES[name]}
    straight, before = parameters(), parameters()
    whole, a = C3O(straight, foreach=first, **rule), C3O(before, foreach=first, **rule)
    run(whole, straight, 6)
    run(a, before, 3)
    after = copies(before)
    b = C3O(after)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for group in b.param_groups:
        group["foreach"] = second
    for p, q in zip(before, after, strict=True):
        for name, value in a.state.get(p, {}).items():
            assert torch.equal(value, b.state[q][name])
            assert value.dtype == b.state[q][name].dtype
    run(b, after, 3, start=3)
    assert served_whole(b) == (second is None)
    check_close(tensors_of(whole), tensors_of(b), torch.float32, state)


@pytest.mark.parametrize("name", ["default", "sphere"])
def test_resume_is_exact(name: str) -> None:
    straight, before = parameters(), parameters()
    a, b = C3O(straight, **RULES[name]), C3O(before, **RULES[name])
    run(a, straight, 6)
    run(b, before, 3)
    after = copies(before)
    c = C3O(after)
    c.load_state_dict(copy.deepcopy(b.state_dict()))
    run(c, after, 3, start=3)
    assert bits(tensors_of(a)) == bits(tensors_of(c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sphere_holds_the_norm_beside_groups_without_one(dtype: torch.dtype) -> None:
    """One launch each for both kinds of group; a tensor of zeros, and one without gradients at first."""
    shapes, within = ((33, 1000), (4097,), (70, 3)), {torch.float32: 1e-6, torch.bfloat16: 2.0**-9}[dtype]

    def make(foreach: bool | None) -> tuple[list[nn.Parameter], list[nn.Parameter], C3O]:
        held, free = parameters(dtype, shapes), parameters(dtype, ((50, 60),))
        groups = [{"params": held, "sphere": 2.0}, {"params": free, "trust_radius": 1e-3}]
        return held, free, C3O(groups, lr=1e-2, foreach=foreach)

    (held, free, a), (held_too, free_too, b) = make(None), make(False)
    start = [float(p.detach().double().norm()) for p in held]
    for i in range(20 if INTERPRETED else 200):
        for params, optimizer in (([*held, *free], a), ([*held_too, *free_too], b)):
            set_gradients(params, i)
            if i < 2:
                params[1].grad = None
            optimizer.step()
        assert served_whole(a)
        for p, norm in zip(held[:3], start, strict=False):
            assert float(p.detach().double().norm()) == pytest.approx(norm, rel=within)
        if i < 2:
            assert held[1] not in a.state or float(a.state[held[1]]["sphere_radius"]) == -1
        if i == 5:
            check_close(tensors_of(a), tensors_of(b), dtype, torch.float32)
    assert held[3].detach().norm() > 0  # the zeros left zero, under the cap
    assert float(a.state[held[3]]["sphere_radius"]) == 0
    assert "sphere_radius" not in a.state[free[0]]
    counts = a.metrics(), b.metrics()
    assert counts[0]["c3o_trust_norm_exact"] == counts[1]["c3o_trust_norm_exact"] == 6
    assert counts[0]["c3o_trust_capped"] == counts[1]["c3o_trust_capped"]
    assert counts[0]["c3o_update_to_weight"] == pytest.approx(counts[1]["c3o_update_to_weight"], rel=1e-3)


def test_sphere_without_a_direction_or_a_learning_rate_keeps_to_the_cap() -> None:
    """Decided in the kernel: a gradient of zeros decays, lr 0 changes no bit, and the radius is remembered."""
    p = nn.Parameter(torch.randn(50, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    optimizer = C3O([p], lr=0.0, sphere=0.5, weight_decay=0.1)
    start = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert bits([p.detach()]) == bits([start])
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    torch.testing.assert_close(p.detach(), start * 0.99, rtol=1e-6, atol=0)
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    kept = p.detach().clone()
    optimizer.step()
    assert bits([p.detach()]) == bits([kept])
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert float(p.detach().double().norm()) == pytest.approx(float(start.double().norm()), rel=1e-6)


@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_nesterov_may_change_between_steps(drift: float) -> None:
    """It is compiled in, so another plan must take over; the bounds of the norm skip are those of both."""
    ours, theirs = parameters(), parameters()
    a = C3O(ours, lr=3e-3, trust_norm_refresh_drift=drift)
    b = C3O(theirs, lr=3e-3, trust_norm_refresh_drift=drift, foreach=False)
    for i, nesterov in enumerate((True, False, False, True, True)):
        for params, optimizer in ((ours, a), (theirs, b)):
            optimizer.param_groups[0]["nesterov"] = nesterov
            run(optimizer, params, 1, start=i)
        assert served_whole(a)
        assert a.metrics()["c3o_trust_norm_skipped"] == b.metrics()["c3o_trust_norm_skipped"]
    check_close(tensors_of(a), tensors_of(b), torch.float32, torch.float32)


@pytest.mark.parametrize("kind", ["host", "device"])
def test_lr_may_be_a_tensor(kind: str) -> None:
    ours, theirs = parameters(), parameters()
    a = C3O(ours, lr=torch.tensor([0.1], device="cpu" if kind == "host" else DEVICE))
    b = C3O(theirs, lr=0.1)
    for i, lr in enumerate((1e-3, 3e-3, 2e-4)):
        a.param_groups[0]["lr"].fill_(lr)
        b.param_groups[0]["lr"] = lr
        run(a, ours, 1, start=i)
        run(b, theirs, 1, start=i)
    assert served_whole(a)
    assert bits(tensors_of(a)) == bits(tensors_of(b))


def test_unfit_gradients_and_groups_take_the_other_paths() -> None:
    """A transposed gradient for one step, a group with credit, one on the for-loop, float64: same results."""

    def make(foreach: bool | None) -> tuple[list[nn.Parameter], C3O]:
        sets = [parameters(shapes=((40, 50),)) for _ in range(3)] + [parameters(torch.float64, ((6,),))]
        groups: list[dict[str, Any]] = [
            {"params": sets[0]},
            {"params": sets[1], "credit_gain": 5.0},
            {"params": sets[2], "foreach": False},
            {"params": sets[3]},
        ]
        return [p for s in sets for p in s], C3O(groups, grad_clip=0.1, foreach=foreach)

    (ours, a), (theirs, b) = make(None), make(False)
    for i in range(4):
        for params, optimizer in ((ours, a), (theirs, b)):
            set_gradients(params, i)
            if i == 2:
                assert params[0].grad is not None
                params[0].grad = params[0].grad.T.contiguous().T
            optimizer.step()
    assert not served_whole(a)
    check_close(tensors_of(a), tensors_of(b), torch.float32, torch.float32)
    for key, value in b.metrics().items():
        if "groups" not in key:
            assert a.metrics()[key] == pytest.approx(value, rel=1e-4), key


def test_rounding_of_moments_gives_the_same_bits_as_pytorch() -> None:
    """A gradient of zero leaves b m and b v to round: the products are single operations, exact on both sides."""
    ours = parameters(shapes=((5000,),))
    a = C3O(ours, lr=0.0, betas=(0.5, 0.5), state_dtype=torch.bfloat16)
    run(a, ours, 1)
    p = ours[0]
    for step in range(2, 9):
        m, v = (a.state[p][name].float() * 0.5 for name in ("exp_avg", "exp_avg_sq"))
        p.grad = torch.zeros_like(p)
        a.step()
        position = torch.arange(5000, device=DEVICE) % 4096
        t = torch.tensor(float(step), device=DEVICE)
        # halving is exact, so nothing is discarded; the next test covers rounding up
        assert bits([a.state[p]["exp_avg"]]) == bits([dithered_bfloat16(m, position, t, FIRST_MOMENT)])
        assert bits([a.state[p]["exp_avg_sq"]]) == bits([dithered_bfloat16(v, position, t, SECOND_MOMENT)])


def test_dither_uses_position_and_step_as_pytorch_does() -> None:
    """From zero moments v = (w g) g and m = w g are one product and one rounded product: known to the bit."""
    for steps_before in (0, 70000):
        ours = parameters(shapes=((9000,),))
        p = ours[0]
        a = C3O(ours, lr=0.0, betas=(0.9, 0.95), state_dtype=torch.bfloat16)
        p.grad = torch.zeros_like(p)
        for other in ours[1:]:
            other.grad = None
        a.step()
        a.state[p]["step"].fill_(steps_before)
        p.grad = torch.randn(9000, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        a.step()
        position = torch.arange(9000, device=DEVICE) % 4096
        t = torch.tensor(float(steps_before + 1), device=DEVICE)
        w1, w2 = torch.tensor(1 - 0.9, device=DEVICE), torch.tensor(1 - 0.95, device=DEVICE)
        m, v = w1 * p.grad, (w2 * p.grad) * p.grad
        assert bits([a.state[p]["exp_avg"]]) == bits([dithered_bfloat16(m, position, t, FIRST_MOMENT)])
        assert bits([a.state[p]["exp_avg_sq"]]) == bits([dithered_bfloat16(v, position, t, SECOND_MOMENT)])


def test_norm_and_verdict() -> None:
    params = parameters()
    optimizer = C3O(params, grad_clip=0.5)
    set_gradients(params, 0)
    want = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    kept = [p.grad.clone() for p in params if p.grad is not None]
    norm, applied = optimizer.guarded_step(torch.zeros((), device=DEVICE))
    torch.testing.assert_close(norm, want, rtol=1e-6, atol=0)
    assert applied
    assert applied.dtype == torch.bool
    set_gradients(params, 1)
    optimizer.guarded_step(torch.zeros((), device=DEVICE))
    torch.testing.assert_close(norm, want, rtol=1e-6, atol=0)  # not overwritten
    set_gradients(params, 0)
    for p, g in zip(params, kept, strict=True):
        assert torch.equal(p.grad, g)
    optimizer.grad_norm = torch.tensor(1e3, device=DEVICE)
    optimizer.step()
    assert optimizer.metrics()["c3o_grad_clip_scale"] == pytest.approx(0.5e-3)


def test_prepared_for_capture_steps_as_before_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of `make_capturable` that needs no graph: parameters without a gradient, moving gradients, learning rates."""
    from eco_llm.optim import c3o_triton

    # A new table, made when a parameter joins, has seen no step; and a guess may leave a metric at the last factor.
    monkeypatch.setattr(c3o_triton, "PATIENCE", NEVER)
    ours, theirs = parameters(), parameters()
    config = OptimizerConfig()
    a, b = Update(C3O(ours, grad_clip=1.0), config), Update(C3O(theirs, grad_clip=1.0), config)
    before = bits([p.detach() for p in ours])
    assert a.capturable
    a.make_capturable()
    a.make_capturable()
    assert bits([p.detach() for p in ours]) == before
    static = a.metrics_tensor()[1]
    for i, lr in enumerate((1e-3, 2e-3, 5e-4)):
        for update, params in ((a, ours), (b, theirs)):
            update.set_lr(lr)
            set_gradients(params, i)
            params[3].grad = params[3].grad if i == 2 else None
            update.step(torch.zeros((), device=DEVICE))
        assert bits([p.detach() for p in ours]) == bits([p.detach() for p in theirs])
        ours_now, theirs_now = dict(zip(a.metrics_tensor()[0], static.tolist(), strict=True)), b.metrics()
        for key in theirs_now:
            assert "groups" in key or ours_now[key] == pytest.approx(theirs_now[key]), key
    saved = a.state_dict()
    assert all(isinstance(group["lr"], float) for group in saved["param_groups"])
    a.load_state_dict(saved)
    assert isinstance(a.optimizer.param_groups[0]["lr"], Tensor)


@pytest.mark.parametrize("state", ["float32", "int8", "int4"])
@pytest.mark.parametrize(("rounding", "error_bits"), [("nearest", 0), ("dithered", 0), ("dithered", 8)])
def test_bfloat16_weights_are_rounded_as_in_the_for_loop(rounding: str, error_bits: int, state: str) -> None:
    rule: dict[str, Any] = {"state_dtype": state, "weight_rounding": rounding, "error_bits": error_bits, "lr": 1e-4}
    ours, theirs = (parameters(torch.bfloat16, ((70,), (4097,), (3, 200))) for _ in range(2))
    a, b = C3O(ours, **rule), C3O(theirs, foreach=False, **rule)
    for i in range(4):
        run(a, ours, 1, start=i)
        run(b, theirs, 1, start=i)
        assert served_whole(a)
    for p, q in zip(ours, theirs, strict=True):
        assert set(a.state[p]) == set(b.state[q])
        values = (p.detach(), q.detach())
        if error_bits:
            values = joined_weight(values[0], a.state[p]["error"]), joined_weight(values[1], b.state[q]["error"])
        differs = (values[0].double() - values[1].double()).abs() / values[1].double().abs().clamp(min=1e-3)
        assert differs.gt(2.0**-16 if error_bits else 0.0).double().mean() < 0.01
        assert differs.max() <= (2.0**-7 if error_bits == 0 else 2.0**-13)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 4096 + 129, 16384 + 64])
def test_codes_of_a_first_step_are_those_of_pytorch(name: str, n: int) -> None:
    """From zero moments m and v are single products, so the codes must be equal but where fma rounds once, not twice.

    Adversarial groups: all zero, one huge element, subnormal, alternating signs, powers of two.
    """
    gen = torch.Generator().manual_seed(0)
    g = torch.randn(n, generator=gen) * torch.exp(3 * torch.randn(n, generator=gen))
    rows = g[: n // 64 * 64].view(-1, 64)
    for i, row in enumerate(rows):
        if i % 6 == 1:
            row.zero_()
        elif i % 6 == 2:
            row[i % 64] = 1e12
        elif i % 6 == 3:
            row.mul_(1e-30)
        elif i % 6 == 4:
            row.copy_(2.0 ** torch.arange(-32, 32) * (-1) ** torch.arange(64))
    ours, theirs = (nn.Parameter(torch.zeros(n, device=DEVICE)) for _ in range(2))
    a, b = C3O([ours], state_dtype=name), C3O([theirs], state_dtype=name, foreach=False)
    for p, optimizer in ((ours, a), (theirs, b)):
        p.grad = g.to(DEVICE)
        optimizer.step()
    assert served_whole(a)
    for key, x in a.state[ours].items():
        y = b.state[theirs][key]
        assert x.shape == y.shape
        nibbles = [(x, y)] if name == "int8" or x.dtype != torch.uint8 else [(x & 15, y & 15), (x >> 4, y >> 4)]
        for left, right in nibbles:
            wrong = (left.double() != right.double()) & ~torch.isclose(
                left.double(), right.double(), rtol=2**-7, atol=1
            )
            assert not wrong.any(), key
            assert (left.double() != right.double()).double().mean() <= (0.002 if n > 999 else 0), key


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_nothing_past_a_tensors_end_is_written(name: str) -> None:
    """Rows of an arena have room past each tensor's end; what is there must not reach a scale, nor be written to."""
    sizes = ((4096 + 65,), (100,))
    ours = parameters(shapes=sizes)
    a = C3O(ours, state_dtype=name)
    run(a, ours, 1)
    (arena,) = a._plan.arenas
    saved = bits(tensors_of(a))
    for codes in (arena.exp_avg, arena.exp_avg_sq):
        for i in range(len(arena.params)):
            rows = codes.view(-1)[arena.first[i] * codes.shape[1] : arena.first[i + 1] * codes.shape[1]]
            rows[arena.moment_view(codes, i).numel() :] = 0xFF
    assert bits(tensors_of(a)) == saved
    theirs = copies(ours)
    b = C3O(theirs)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    run(a, ours, 2, start=1)
    run(b, theirs, 2, start=1)
    assert bits(tensors_of(a)) == bits(tensors_of(b))
    for codes in (arena.exp_avg, arena.exp_avg_sq):
        for i in range(len(arena.params)):
            rows = codes.view(-1)[arena.first[i] * codes.shape[1] : arena.first[i + 1] * codes.shape[1]]
            assert (rows[arena.moment_view(codes, i).numel() :] == 0xFF).all()


def test_loops_over_tensors_take_a_second_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last of many tensors is measured: after the norm is known, before, and, on a wrong guess, twice."""
    from eco_llm.optim import c3o_triton

    monkeypatch.setattr(c3o_triton, "_SUM_LANES", 256)  # the norm's sum, of a number a tensor here
    count = 300 if INTERPRETED else 1100  # `_some` takes 256 at a time, the metrics 1024
    ours, theirs = (parameters(shapes=[(2,)] * count)[:-1] for _ in range(2))

    def make(params: list[nn.Parameter], **path: Any) -> C3O:
        groups = [{"params": params[:-1], "trust_radius": 0.0}, {"params": params[-1:], "trust_radius": 1e-3}]
        return C3O(groups, lr=1e-2, grad_clip=1.0, **path)

    a, b = make(ours), make(theirs, foreach=False)
    turns = []
    for i, scale in enumerate((1e-2, 1e-2, 1.0)):  # the last one is clipped
        for params, optimizer in ((ours, a), (theirs, b)):
            set_gradients(params, i, scale=scale)
            optimizer.step()
        assert served_whole(a)
        left, right = a.metrics(), b.metrics()
        assert left["c3o_trust_norm_exact"] == right["c3o_trust_norm_exact"] == 1
        assert left["c3o_trust_capped"] == right["c3o_trust_capped"] == 1
        assert left["c3o_update_to_weight"] == pytest.approx(right["c3o_update_to_weight"], rel=1e-4)
        assert left["c3o_grad_clip_scale"] == pytest.approx(right["c3o_grad_clip_scale"], rel=1e-5)
        assert a._kernel_metrics is not None
        assert a._kernel_metrics.params[-1] is ours[-1]
        turns.append(tuple(a._kernel_metrics._control[2:4].tolist()))
    assert right["c3o_grad_clip_scale"] < 1
    assert turns == [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]
    check_close(tensors_of(a), tensors_of(b), torch.float32, torch.float32)


def test_addresses_are_read_by_as_many_programs_as_they_need() -> None:
    params = parameters(shapes=((3,),))
    optimizer = C3O(params)
    run(optimizer, params, 1)
    assert optimizer._kernel_metrics is not None
    host = torch.randint(-(2**63), 2**63 - 1, (1500,), generator=torch.Generator().manual_seed(0))
    there = torch.full((2048,), -1, device=DEVICE)
    optimizer._kernel_metrics._read_addresses(host if INTERPRETED else host.pin_memory(), there)
    assert torch.equal(there[:1500].cpu(), host)
    assert (there[1500:] == -1).all()


# ---- CUDA itself --------------------------------------------------------------------------------------------------


@on_gpu_only
@pytest.mark.parametrize("rule", [{}, {"trust_norm_refresh_drift": 0.05}, {"sphere": 2.0}], ids=str)
def test_update_never_synchronises(rule: dict[str, Any]) -> None:
    params = parameters()
    update = Update(C3O(params, grad_clip=1.0, **rule), OptimizerConfig())
    loss = torch.zeros((), device=DEVICE)
    for i in range(2):
        set_gradients(params, i)
        update.step(loss)
    grads = [[torch.randn_like(p) for p in params] for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr, new in zip((1e-3, 2e-3, 3e-3), grads, strict=True):
            for p, g in zip(params, new, strict=True):
                p.grad = g  # moved: the table of addresses changes
            update.set_lr(lr)
            result = update.step(loss)
            update.metrics_tensor()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.applied


def launches(step: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if e.device_type.name == "CUDA" and "Mem" not in e.key)


@on_gpu_only
@pytest.mark.parametrize(
    ("rule", "launches_of_a_step"),
    [({}, 7), ({"sphere": 2.0}, 7), ({"trust_norm_refresh_drift": 0.05}, 5), ({"trust_radius": 0.0}, 3)],
)
def test_launches_do_not_depend_on_the_number_of_tensors(rule: dict[str, float], launches_of_a_step: int) -> None:
    counts = []
    for tensors in (4, 400):
        params = parameters(shapes=[(31, 33)] * tensors)
        update = Update(C3O(params, grad_clip=1.0, **rule), OptimizerConfig())
        loss = torch.zeros((), device=DEVICE)
        set_gradients(params, 0)
        update.step(loss)
        counts.append(launches(lambda update=update, loss=loss: update.step(loss)))  # type: ignore[misc]
    assert counts[0] == counts[1] == launches_of_a_step


@on_gpu_only
@pytest.mark.parametrize(
    "kind",
    [
        "c3o", "c3o-skip", "c3o-bf16", "c3o-bf16-skip", "c3o-int8-skip", "c3o-int4", "c3o-sphere", "c3o-int8-sphere",
        "c3o-plain", "adamw",
    ],
)  # fmt: skip
def test_captured_and_replayed_equals_eager_bit_for_bit(kind: str) -> None:
    """Gradients come from a real backward inside the graph; one parameter has none; the learning rate changes."""

    def make() -> tuple[nn.Module, Update]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 40)).to(DEVICE)
        params: list[Any] = [*model.parameters(), nn.Parameter(torch.ones(7, device=DEVICE))]
        config = OptimizerConfig(optimizer="adamw" if kind == "adamw" else "c3o")
        if kind == "adamw":
            return model, Update(torch.optim.AdamW(params, lr=1e-3, fused=True), config)
        rule: dict[str, Any] = {"trust_norm_refresh_drift": 0.05 if "skip" in kind else 0.0}
        rule["sphere"] = 3.0 if "sphere" in kind else 0.0
        rule["nesterov"] = "plain" not in kind
        names = {"bf16": "bfloat16", "int8": "int8", "int4": "int4"}
        rule["state_dtype"] = next((name for key, name in names.items() if key in kind), "float32")
        return model, Update(C3O(params, grad_clip=0.05, **rule), config)

    def turn(model: nn.Module, update: Update, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = (model(x) - x).square().mean()
        loss.backward()
        return (loss, *update.step(loss))

    (eager, a), (captured, b) = make(), make()
    x = torch.zeros(16, 40, device=DEVICE)
    # Warm up cuBLAS and autograd on a side stream, without stepping.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            (captured(x) - x).square().mean().backward()
            b.zero_grad()
    torch.cuda.current_stream().wait_stream(side)
    assert b.capturable
    b.make_capturable()
    if kind == "adamw":
        a.make_capturable()  # PyTorch's kernel takes a number as float64, a tensor as float32
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, norm, applied = turn(captured, b, x)
    static = b.metrics_tensor()[1]
    gen = torch.Generator().manual_seed(1)
    for i in range(6):
        # Gradients are clipped, or not: guesses that they are not are right in the third step, wrong in the last.
        data = (1.0, 1e-3, 1e-3, 1.0, 1e-3, 1.0)[i] * torch.randn(16, 40, generator=gen).to(DEVICE)
        if i == 3:
            data[0, 0] = float("inf")
        for update in (a, b):
            update.set_lr(1e-3 * (i + 1))
        x.copy_(data)
        graph.replay()
        a.zero_grad()
        want = turn(eager, a, data)
        assert bool(applied) == bool(want[2]) == (i != 3)
        assert bits([p.detach() for p in eager.parameters()]) == bits([p.detach() for p in captured.parameters()])
        if i != 3:
            assert bits([loss, norm]) == bits([want[0], want[1]])
        if kind != "adamw":
            assert static.tolist() == pytest.approx(list(a.metrics().values()))
    state = {k: v for k, v in b.optimizer.state.items() if len(v)}
    assert all(torch.isfinite(t).all() for s in state.values() for t in s.values())
    assert float(b.optimizer.state[next(captured.parameters())]["step"]) == 5


# ---- compiled, not run: needs Triton's compiler, no GPU -----------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("nesterov", "sphere", "plain"),
    [(False, False, False), (True, False, True), (True, True, False), (True, True, True)],  # the last: the GPU profile
)
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("float32", False), ("bfloat16", False), ("bfloat16", True), ("int8", True), ("int4", False), ("int4", True)
    ],
)  # fmt: skip
def test_passes_compile_for_every_card_and_need_little_shared_memory(
    name: str, error: bool, nesterov: bool, sphere: bool, plain: bool, capability: int
) -> None:
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from eco_llm.optim import c3o_triton
    from eco_llm.optim.c3o_kernels import passes, plan
    from eco_llm.optim.c3o_triton import _A, _PLAN, _T, CHUNK, SHARES, TICKETS, TILE, WARPS, stages
    from eco_llm.optim.storage import STORAGES

    storage = STORAGES[name]
    stored = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}.get(storage.dtype, tl.uint8)
    constants: dict[str, Any] = {
        "P": tl.bfloat16, "G": tl.bfloat16, "S": stored, "BITS": storage.bits, "ERROR": error, "DITHER": True,
        "R": storage.ratio.mantissa if storage.ratio else 0, "V": storage.second.mantissa if storage.second else 0,
        "R_SPAN": storage.ratio.span if storage.ratio else 1.0,
        "V_SPAN": storage.second.span if storage.second else 1.0,
        "WATCH": storage.bits > 0, "CLAMP": True, "SPHERE": sphere, "NESTEROV": nesterov,
        "PLAIN": plain, "ADVANCE": name == "float32" and not nesterov,
        "ALIGN": 16, "CHUNK": CHUNK, "TILE": TILE * (2 if storage.bits == 4 else 1), "COLUMNS": len(_T), "PLAN": _PLAN,
        "EARLY": True, "PATIENCE": 8, "BLOCK": 4096, "ARENA_COLUMNS": len(_A), "SLACK": 1e-6,
        "DRAFT": False, "SKIPS": True, "MEASURED": True, "KNOWN": False, "GUARD": True, "FLAG": True,
        "TICKETS": TICKETS, "LANES": c3o_triton._LANES, "SUM_LANES": c3o_triton._SUM_LANES, "SHARES": SHARES,
        "STAGES": stages(torch.bfloat16, storage, error, 100 * 1024),
    }  # fmt: skip
    pointers = {
        "chunks": "*i32", "grads": "*i64", "tensors": "*i64", "plan": "*fp32", "partials": "*fp32", "arenas": "*fp64",
        "arena_of": "*i32", "span": "*i32", "stats": "*fp32", "control": "*fp32", "squares": "*fp32",
        "tickets": "*i32", "turns": "*i32", "summary": "*fp32", "known_norm": "*fp32", "loss": "*fp32",
        "found_inf": "*fp32", "lr_at": "*i64", "norm_out": "*fp32", "applied_out": "*u8",
    }  # fmt: skip
    kernels = (
        plan._plan_kernel, plan._trust_kernel, plan._stored_norm_kernel, passes._measure_kernel, passes._update_kernel
    )  # fmt: skip
    for kernel in kernels:
        signature, constexprs, attributes = {}, {}, {}
        for i, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument], constexprs[argument] = "constexpr", constants[argument]
            else:
                signature[argument] = pointers.get(argument, "i32")
                if argument in pointers:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constexprs, attributes)
        warps = c3o_triton._PLAN_WARPS if kernel is plan._plan_kernel else WARPS
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        # In the 100 KB of a consumer card's multiprocessor four programs fit, with three or four tiles each under way,
        # or with 4 bits three, for which its registers have room.
        assert compiled.metadata.shared <= (32 if storage.bits == 4 else 24) * 1024
