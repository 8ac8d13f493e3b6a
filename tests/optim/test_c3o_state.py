"""C3O as a torch.optim.Optimizer: state, copies, groups, refusals, gating."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from optim_cases import DTYPES, RULES, bits, parameters, run, set_gradients, tensors_of
from torch import nn

from eco_llm import C3O
from eco_llm.optim.c3o_foreach import Arena
from eco_llm.optim.rounding import FIRST_MOMENT, SECOND_MOMENT, dithered_bfloat16

STATEFUL: dict[str, Any] = {**RULES["credit-skip"], "grad_clip": 1.0}


# ---- saving, copying ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES, ids=str)
def test_resume_is_exact_through_a_weights_only_file(
    dtype: torch.dtype, state_dtype: torch.dtype | str, foreach: bool
) -> None:
    through, before = parameters(dtype), parameters(dtype)
    straight = C3O(through, state_dtype=state_dtype, foreach=foreach, **STATEFUL)
    run(straight, through, 8)
    first = C3O(before, state_dtype=state_dtype, foreach=foreach, **STATEFUL)
    run(first, before, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    after = [nn.Parameter(p.detach().clone()) for p in before]
    second = C3O(after)  # settings come from the file
    second.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(before, after, strict=True):
        for name, value in first.state.get(p, {}).items():
            assert second.state[q][name].dtype == value.dtype
    run(second, after, 4, start=4)
    assert bits(tensors_of(straight)) == bits(tensors_of(second))


def test_groups_and_gradients_that_come_late_resume_exactly() -> None:
    """A group added after the first steps, and a tensor whose first gradient comes after the checkpoint."""

    def steps(optimizer: C3O, params: list[nn.Parameter], start: int, stop: int) -> None:
        for i in range(start, stop):
            set_gradients(params, i)
            params[3].grad = params[3].grad if i >= 5 else None  # first gradient in step 5
            params[4].grad = params[4].grad if i % 3 else None  # frozen now and then
            optimizer.step()

    def late(params: list[nn.Parameter]) -> dict[str, Any]:
        return {"params": params[5:], "lr": 3e-3, "weight_decay": 0.0}

    through, before = parameters(torch.float32), parameters(torch.float32)
    straight, first = C3O(through[:5], **STATEFUL), C3O(before[:5], **STATEFUL)
    for optimizer, params in ((straight, through), (first, before)):
        steps(optimizer, params, 0, 2)
        optimizer.add_param_group(late(params))
        steps(optimizer, params, 2, 4)
    assert before[3] not in first.state
    assert float(first.state[before[4]]["step"]) < float(first.state[before[0]]["step"])
    after = [nn.Parameter(p.detach().clone()) for p in before]
    second = C3O([{"params": after[:5]}, late(after)])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(straight, through, 4, 8)
    steps(second, after, 4, 8)
    assert bits(tensors_of(straight)) == bits(tensors_of(second))
    assert float(second.state[after[3]]["step"]) == 3


@pytest.mark.parametrize("foreach", [True, False])
def test_loading_does_not_tie_two_optimizers_together(foreach: bool) -> None:
    a, b = parameters(), parameters()
    first, second = (C3O(p, state_dtype=torch.float64, foreach=foreach) for p in (a, b))
    run(first, a, 2)
    second.load_state_dict(first.state_dict())
    before = bits(tensors_of(first))
    run(second, b, 2)
    assert bits(tensors_of(first)) == before


def test_state_dict_is_plain() -> None:
    params = parameters()
    optimizer = C3O(params, **STATEFUL)
    run(optimizer, params, 2)
    saved = optimizer.state_dict()
    json.dumps(saved["param_groups"])
    assert all(isinstance(v, torch.Tensor) for s in saved["state"].values() for v in s.values())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(how: str) -> None:
    params = parameters()
    optimizer = C3O(params, **STATEFUL)
    run(optimizer, params, 3)
    pair = (params, optimizer)
    twins, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    run(optimizer, params, 3, start=3)
    run(twin, twins, 3, start=3)
    assert bits(tensors_of(optimizer)) == bits(tensors_of(twin))


def test_cleared_state_starts_again() -> None:
    params = parameters()
    optimizer = C3O(params, state_dtype=torch.float64)
    run(optimizer, params, 3)
    optimizer.state.clear()
    fresh = [nn.Parameter(p.detach().clone()) for p in params]
    run(optimizer, params, 2)
    other = C3O(fresh, state_dtype=torch.float64)
    run(other, fresh, 2)
    assert bits(tensors_of(optimizer)) == bits(tensors_of(other))


# ---- parameters and groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [True, False])
def test_parameters_without_gradients_are_left_alone_and_join_later(foreach: bool) -> None:
    """Each tensor keeps its own step count, whatever the others do."""
    params = parameters(shapes=((5,), (6, 7), (4099,)))
    optimizer = C3O(params, state_dtype=torch.float64, foreach=foreach, **RULES["skip"])
    alone = [[nn.Parameter(p.detach().clone())] for p in params]
    solo = [C3O(p, state_dtype=torch.float64, foreach=foreach, **RULES["skip"]) for p in alone]
    for i in range(9):
        set_gradients(params, i)
        for k, p in enumerate(params):
            if (i + k) % 3 == 0 or i < k:
                p.grad = None
            else:
                alone[k][0].grad = p.grad.clone()
                solo[k].step()
        optimizer.step()
    for p, (q,), s in zip(params, alone, solo, strict=True):
        assert torch.equal(p, q)
        assert float(optimizer.state[p]["step"]) == float(s.state[q]["step"])


def test_moments_do_not_move_when_the_set_of_gradients_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = C3O(params)
    run(optimizer, params, 1)
    built = []
    monkeypatch.setattr(Arena, "__init__", lambda *a, **k: built.append(a))
    home = optimizer.state[params[1]]["exp_avg"].data_ptr()
    before = optimizer._buckets
    run(optimizer, params, 2, start=1)
    assert optimizer._buckets is before  # cached while the set stays
    set_gradients(params, 3)
    params[0].grad = None
    optimizer.step()
    assert not built
    assert optimizer.state[params[1]]["exp_avg"].data_ptr() == home


def test_groups_keep_their_own_settings() -> None:
    a, b = parameters(), parameters()
    mixed = C3O([{"params": a, "lr": 1e-2, "name": "matrix"}], state_dtype=torch.float64)
    mixed.add_param_group({"params": b, "weight_decay": 0.0, "betas": (0.5, 0.9), "foreach": False})
    c, d = parameters(), parameters()
    one = C3O(c, lr=1e-2, state_dtype=torch.float64)
    two = C3O(d, weight_decay=0.0, betas=(0.5, 0.9), foreach=False, state_dtype=torch.float64)
    for i in range(3):
        set_gradients(a, i)
        set_gradients(b, i)
        mixed.step()
        run(one, c, 1, start=i)
        run(two, d, 1, start=i)
    assert bits([p.detach() for p in a + b]) == bits([p.detach() for p in c + d])
    assert mixed.param_groups[0]["name"] == "matrix"


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(shape: tuple[int, ...], foreach: bool) -> None:
    a, b = parameters(), parameters()
    by_tensor = C3O(a, lr=torch.full(shape, 0.01, dtype=torch.float64), state_dtype=torch.float64, foreach=foreach)
    by_number = C3O(b, lr=0.01, state_dtype=torch.float64, foreach=foreach)
    run(by_tensor, a, 3)
    run(by_number, b, 3)
    assert bits([p.detach() for p in a]) == bits([p.detach() for p in b])


def test_closure_runs_with_gradients_enabled() -> None:
    p = nn.Parameter(torch.ones(3))

    def closure() -> torch.Tensor:
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert C3O([p]).step(closure) == 3.0
    assert (p < 1).all()


def test_step_with_no_gradients_does_nothing() -> None:
    params = parameters()
    optimizer = C3O(params)
    optimizer.step()
    assert len(optimizer.state) == 0
    assert set(optimizer.metrics().values()) == {0.0}
    assert set(C3O([{"params": []}, {"params": params}]).metrics().values()) == {0.0}


def test_sparse_and_complex_are_refused() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        C3O(table.parameters()).step()
    with pytest.raises(ValueError, match="real floating point"):
        C3O([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0), ("lr", float("nan")), ("lr", torch.zeros(2)), ("betas", (1.0, 0.9)), ("betas", (0.9, -0.1)),
        ("eps", 0.0), ("weight_decay", float("inf")), ("trust_radius", -1.0), ("trust_floor", float("nan")),
        ("sphere", float("nan")), ("sphere", 1e3),
        ("trust_norm_refresh_drift", 1.0), ("trust_norm_refresh_steps", 0), ("credit_gain", -1.0),
        ("credit_min", 0.0), ("credit_max", 0.5), ("credit_beta", 1.0), ("grad_clip", float("nan")),
        ("grad_clip_mode", "both"), ("state_dtype", torch.float16),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        C3O([nn.Parameter(torch.zeros(2))], **{name: value})
    with pytest.raises(ValueError, match=name):
        C3O([{"params": [nn.Parameter(torch.zeros(2))], name: value}])


# ---- bfloat16 state -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [True, False])
def test_bfloat16_second_moment_decays_where_rounding_to_nearest_stalls(foreach: bool) -> None:
    p = nn.Parameter(torch.zeros(500))
    optimizer = C3O([p], lr=0.0, betas=(0.9, 0.999), state_dtype=torch.bfloat16, foreach=foreach)
    p.grad = 10 ** torch.linspace(-3, 3, 500)
    optimizer.step()
    start = optimizer.state[p]["exp_avg_sq"].double()
    stuck = start.to(torch.bfloat16)
    p.grad.zero_()
    for _ in range(700):
        optimizer.step()
        stuck = (stuck.float() * 0.999).to(torch.bfloat16)
    assert torch.equal(stuck.double(), start)
    ratio = optimizer.state[p]["exp_avg_sq"].double() / (start * 0.999**700)
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.01)
    assert ratio.min() > 0.9
    assert ratio.max() < 1.1


def test_rounding_is_unbiased_over_steps_and_within_one_unit() -> None:
    x = torch.tensor([1 + 0.3 * 2**-7, -(2 + 0.8 * 2**-6), 1.5, 0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    position = torch.arange(8)
    for stream in (FIRST_MOMENT, SECOND_MOMENT):
        rounded = torch.stack([dithered_bfloat16(x, position, torch.tensor(float(t)), stream) for t in range(4096)])
        torch.testing.assert_close(rounded.double().mean(0)[:5], x.double()[:5], rtol=1e-5, atol=0)
        assert set(rounded[:, 0].tolist()) == {1.0, 1 + 2**-7}
        assert (rounded[:, 2] == 1.5).all()
        assert bits([rounded[0, 3:5].float()]) == bits([x[3:5]])
        assert (rounded[:, 5] == float("inf")).all()
        assert (rounded[:, 6] == -float("inf")).all()
        assert rounded[:, 7].isnan().all()


def test_the_two_moments_of_an_element_are_never_rounded_alike() -> None:
    """Halfway between neighbours, thresholds half a period apart send exactly one of two equal values up."""
    x = torch.full((4096,), 1 + 0.5 * 2**-7)
    for step in range(5):
        up = [
            dithered_bfloat16(x, torch.arange(4096), torch.tensor(step), s) > 1 for s in (FIRST_MOMENT, SECOND_MOMENT)
        ]
        assert (up[0] ^ up[1]).all()


def test_rounding_keeps_nan_of_every_pattern() -> None:
    """CUDA makes 0x7FFFFFFF, which a carry turns into -0."""
    x = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for step in range(5):
        for stream in (FIRST_MOMENT, SECOND_MOMENT):
            assert dithered_bfloat16(x, torch.arange(4), torch.tensor(float(step)), stream).isnan().all()


# ---- the gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["clip", "no-clip"])  # clipping makes NaN of inf
@pytest.mark.parametrize("on_host", [True, False], ids=["host-flag", "device-flag"])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES, ids=str)
def test_found_inf_changes_no_bit(
    dtype: torch.dtype, state_dtype: torch.dtype | str, foreach: bool, on_host: bool, clip: float
) -> None:
    params = parameters(dtype)
    with torch.no_grad():
        params[1].view(-1)[:2] = torch.tensor([0.0, -0.0])
    optimizer = C3O(params, state_dtype=state_dtype, foreach=foreach, **{**STATEFUL, "grad_clip": clip})
    optimizer._read_flag_on_cpu = on_host
    run(optimizer, params, 3)
    if state_dtype == dtype:
        optimizer.state[params[1]]["exp_avg"].view(-1)[:2] = torch.tensor([0.0, -0.0])
    before, metrics = bits(tensors_of(optimizer)), optimizer.metrics()
    for bad in (float("nan"), float("inf"), -float("inf"), 0.5):
        set_gradients(params, 3)
        for p in params:
            p.grad.fill_(bad)
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        assert bits(tensors_of(optimizer)) == before
    after = optimizer.metrics()
    assert {k: v for k, v in after.items() if "groups" not in k} == {
        k: v for k, v in metrics.items() if "groups" not in k
    }


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES, ids=str)
def test_a_clear_flag_changes_nothing_either(dtype: torch.dtype, state_dtype: torch.dtype | str, foreach: bool) -> None:
    plain, flagged = parameters(dtype), parameters(dtype)
    a = C3O(plain, state_dtype=state_dtype, foreach=foreach, **STATEFUL)
    b = C3O(flagged, state_dtype=state_dtype, foreach=foreach, **STATEFUL)
    b._read_flag_on_cpu = False
    run(a, plain, 4)
    b.found_inf = torch.tensor(0.0)
    run(b, flagged, 4)
    assert bits(tensors_of(a)) == bits(tensors_of(b))


@pytest.mark.parametrize("on_host", [True, False])
def test_first_step_may_be_the_bad_one(on_host: bool) -> None:
    for state_dtype in (torch.float32, torch.bfloat16):
        a, b = parameters(torch.float32), parameters(torch.float32)
        first, second = (C3O(p, state_dtype=state_dtype, **STATEFUL) for p in (a, b))
        first._read_flag_on_cpu = on_host
        first.found_inf = torch.tensor(1.0)
        set_gradients(a, 0)
        a[1].grad.fill_(float("nan"))
        first.step()
        first.found_inf = None
        run(first, a, 3)
        run(second, b, 3)
        assert bits(tensors_of(first)) == bits(tensors_of(second))


@pytest.mark.parametrize("clip", [("norm", 0.3), ("value", 0.01)], ids=str)  # only "value" shows a wrong scale
@pytest.mark.parametrize("foreach", [True, False])
def test_works_under_the_gradient_scaler(foreach: bool, clip: tuple[str, float]) -> None:
    a, b = parameters(torch.float32), parameters(torch.float32)
    mode, limit = clip
    scaled, plain = (C3O(p, foreach=foreach, grad_clip=limit, grad_clip_mode=mode) for p in (a, b))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(4):
        set_gradients(a, i)
        loss = sum((p * p.grad.detach()).sum() for p in a)
        for p in a:
            p.grad = None
        scaler.scale(loss).backward()
        if i == 2:
            a[1].grad[0, 0] = float("inf")
        scaler.step(scaled)
        scaler.update()
        if i != 2:
            run(plain, b, 1, start=i)
    assert scaler.get_scale() == 2.0**9
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


# ---- a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["norm", "value"])
@pytest.mark.parametrize("name", ["credit-skip", "all", "no-nesterov-skip"])
def test_step_never_synchronises(name: str, mode: str, state_dtype: torch.dtype | str, foreach: bool) -> None:
    params = parameters(torch.float32, device="cuda")
    rule = {**RULES[name], "grad_clip": 0.5, "grad_clip_mode": mode}
    optimizer = C3O(params, state_dtype=state_dtype, foreach=foreach, **rule)
    optimizer.found_inf = torch.zeros((), device="cuda")
    set_gradients(params, 0)
    optimizer.step()  # builds the state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            optimizer.step()
        _, values = optimizer.metrics_tensor()
        optimizer.found_inf.fill_(1.0)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(values).all()


@pytest.mark.gpu
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES, ids=str)
def test_cuda_found_inf_changes_no_bit(dtype: torch.dtype, state_dtype: torch.dtype | str, foreach: bool) -> None:
    params = parameters(dtype, device="cuda")
    optimizer = C3O(params, state_dtype=state_dtype, foreach=foreach, **STATEFUL)
    run(optimizer, params, 3)
    before = bits(tensors_of(optimizer))
    for p in params:
        p.grad.fill_(float("nan"))
    optimizer.found_inf = torch.ones((), device="cuda")
    optimizer.step()
    assert bits(tensors_of(optimizer)) == before


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
def test_cuda_equals_cpu(name: str) -> None:
    here, there = parameters(), parameters(device="cuda")
    a = C3O(here, state_dtype=torch.float64, foreach=False, **RULES[name])
    b = C3O(there, state_dtype=torch.float64, foreach=True, **RULES[name])
    run(a, here, 6)
    run(b, there, 6)
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        torch.testing.assert_close(x, y.cpu(), rtol=1e-11, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "rule", [STATEFUL, RULES["all"], RULES["no-nesterov-skip"]], ids=["credit", "all", "no-nesterov"]
)
def test_launches_do_not_grow_with_the_number_of_tensors(rule: dict[str, Any]) -> None:
    counts = []
    for tensors in (4, 40):
        params = parameters(torch.float32, shapes=[(31, 33)] * tensors, device="cuda")[:-1]
        optimizer = C3O(params, **{"foreach": True, **rule})
        optimizer.found_inf = torch.zeros((), device="cuda")
        set_gradients(params, 0)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        counts.append(sum(e.count for e in profile.key_averages() if e.device_type.name == "CUDA"))
    assert counts[1] <= counts[0] + 4
