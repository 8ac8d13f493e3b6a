"""C3O in host memory tensor by tensor, against the for-loop; what it serves; that it ends a step as the others do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim_cases import RULES, assert_alike, bits, resumed, run, set_gradients, tensors_of
from torch import Tensor, nn

import eco_llm.optim.c3o as c3o_module
from eco_llm.optim.c3o import C3O
from eco_llm.optim.c3o_foreach import BLOCK, LARGE_BLOCKS

SHAPES = ((300, 257), (70_001,), (33, 62, 65), (256, 256))  # 19, 18, 33 and 16 blocks
SERVED = [name for name in RULES if not {"skip", "credit", "all"} & set(name.split("-")) and name != "no-second"]


def large(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(1)
    values = [torch.randn(s, generator=gen, dtype=torch.float64) for s in SHAPES]
    values.append(torch.zeros(256, 300, dtype=torch.float64))  # zero-initialised
    return [nn.Parameter(v.to(dtype)) for v in values]


def compare(ours: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Ours in `dtype` with a for-loop's in float64: in float32 that measures norms of 10⁵ numbers less well (1e-6)."""
    for x, y in zip(ours, expected, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
        else:
            assert_alike(x, y.to(x.dtype), rounded=False)


def stepped(
    rule: dict[str, Any], dtype: torch.dtype, foreach: bool | None, scratch: pytest.MonkeyPatch | None = None
) -> tuple[list[Tensor], C3O]:
    """Weights and state after 6 steps from the same float32 numbers: ours in `dtype`, the for-loop's in float64."""
    kind = torch.float64 if foreach is False else dtype
    params = [nn.Parameter(p.detach().to(kind)) for p in large(dtype)]
    optimizer = C3O(params, state_dtype=kind, foreach=foreach, **rule)
    if scratch is None:
        run(optimizer, params, 6)
    else:
        with scratch.context() as patch:
            full = torch.full
            patch.setattr(torch, "empty", lambda *s, **k: full(s if isinstance(s[0], int) else s[0], torch.nan, **k))
            run(optimizer, params, 6)
    return tensors_of(optimizer), optimizer


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tensors of each bucket that `host_step` takes from now on."""
    seen: list[int] = []
    plain = c3o_module.host_step

    def spy(bucket: Any, *rest: Any) -> Tensor:
        seen.append(len(bucket.params))
        return plain(bucket, *rest)

    monkeypatch.setattr(c3o_module, "host_step", spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_equals_the_for_loop(name: str, dtype: torch.dtype, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, state and metrics over 6 steps, whatever the scratch held."""
    ours, a = stepped(RULES[name], dtype, foreach=None, scratch=monkeypatch)
    expected, b = stepped(RULES[name], dtype, foreach=False)
    # no decay of m is no Adam step that Nesterov could be made of (`adam_serves`)
    assert steps == ([] if name == "no-momentum" else [5] * 6)
    compare(ours, expected, dtype)
    ours_say, expected_say = ({k: v for k, v in x.metrics().items() if "groups" not in k} for x in (a, b))
    assert ours_say == pytest.approx(expected_say, rel=1e-5)


@pytest.mark.parametrize("sphere", [0.0, 3.0])
@pytest.mark.parametrize("clip", [0.5, 1e9], ids=["binds", "idle"])
def test_each_group_is_clipped_by_its_own_threshold(sphere: float, clip: float, steps: list[int]) -> None:
    results = []
    for foreach, dtype in ((None, torch.float32), (False, torch.float64)):
        params = [nn.Parameter(p.detach().to(dtype)) for p in large()]
        groups = [{"params": params[:2], "grad_clip": clip}, {"params": params[2:], "grad_clip": 0.1 * clip}]
        optimizer = C3O(groups, sphere=sphere, state_dtype=dtype, foreach=foreach)
        run(optimizer, params, 4)
        results.append(tensors_of(optimizer))
    assert steps == [2, 3] * 4
    compare(*results, torch.float32)


def test_tensors_that_missed_steps_have_their_own_bias_correction(steps: list[int]) -> None:
    results = []
    for foreach, dtype in ((None, torch.float32), (False, torch.float64)):
        params = [nn.Parameter(p.detach().to(dtype)) for p in large()]
        optimizer = C3O(params, sphere=3.0, lr=1e-2, state_dtype=dtype, foreach=foreach)
        for step in range(6):
            set_gradients(params, step)
            if step in (1, 2):
                params[1].grad = None
            optimizer.step()
        results.append(tensors_of(optimizer))
    assert steps[-1] == 5
    compare(*results, torch.float32)


@pytest.mark.parametrize("lr", [3e-3, torch.tensor(3e-3), torch.tensor([3e-3])], ids=["number", "0-dim", "1 element"])
def test_resume_is_exact_and_the_paths_share_their_state(lr: Any, steps: list[int]) -> None:
    params = large()
    settings: dict[str, Any] = {"lr": copy.deepcopy(lr), "sphere": 3.0, "grad_clip": 0.5}
    optimizer = C3O(params, **settings)
    run(optimizer, params, 3)
    second, after = resumed(optimizer, params)
    third, calls = resumed(optimizer, params)
    for group in third.param_groups:
        group["foreach"] = True
    run(optimizer, params, 3, start=3)
    run(second, after, 3, start=3)
    assert steps == [5] * 9
    run(third, calls, 3, start=3)
    assert steps == [5] * 9
    assert bits(tensors_of(optimizer)) == bits(tensors_of(second))
    for x, y in zip(tensors_of(optimizer), tensors_of(third), strict=True):
        assert_alike(x, y, rounded=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_norm_of_a_sphere_is_held(dtype: torch.dtype) -> None:
    params = large(dtype)[:4]
    norms = [p.detach().double().norm() for p in params]
    optimizer = C3O(params, sphere=10.0, lr=1e-2, state_dtype=dtype)
    run(optimizer, params, 60)
    for p, norm in zip(params, norms, strict=True):
        assert abs(p.detach().double().norm() / norm - 1) < (1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sphere", [0.0, 3.0])
@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_what_is_not_finite_spoils_its_own_tensor_only(where: str, bad: float, sphere: float) -> None:
    """As in the multi-tensor path, in the metrics too, and with no exception from the host's numbers."""
    results = []
    for foreach in (None, True):
        params = large()
        optimizer = C3O(params, sphere=sphere, foreach=foreach)
        run(optimizer, params, 2)
        set_gradients(params, 2)
        spoilt = params[1].grad if where == "gradient" else params[1].data
        spoilt.view(-1)[7] = bad
        optimizer.step()
        results.append((params, optimizer.metrics()["c3o_update_to_weight"]))
    (ours, said), (expected, expected_said) = results
    for i, (x, y) in enumerate(zip(ours, expected, strict=True)):
        assert (i == 1) != bool(x.isfinite().all())
        assert i == 1 or torch.equal(y.isfinite(), x.isfinite())
    if where == "gradient":
        assert torch.equal(ours[1].isfinite(), expected[1].isfinite())
        assert said == pytest.approx(expected_said, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("kind", ["zero gradients", "lr 0", "no floor"])
@pytest.mark.parametrize("sphere", [0.0, 3.0])
def test_nothing_is_divided_by_zero(kind: str, sphere: float, steps: list[int]) -> None:
    results = []
    for foreach, dtype in ((None, torch.float32), (False, torch.float64)):
        params = [nn.Parameter(p.detach().to(dtype)) for p in large()]
        settings: dict[str, Any] = {"sphere": sphere, "lr": 0.0 if kind == "lr 0" else 1e-2, "state_dtype": dtype}
        settings |= {"trust_floor": 0.0} if kind == "no floor" else {}
        optimizer = C3O(params, foreach=foreach, **settings)
        for step in range(3):
            set_gradients(params, step, scale=0.0 if kind == "zero gradients" else 1e-2)
            optimizer.step()
        results.append((tensors_of(optimizer), optimizer.metrics()["c3o_update_to_weight"]))
    assert steps == [5] * 3
    compare(results[0][0], results[1][0], torch.float32)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


def test_gradients_of_any_strides_and_a_known_norm(steps: list[int]) -> None:
    """Transposed and expanded gradients, `grad_norm`; a transposed parameter is left to the multi-tensor path."""
    results = []
    for foreach, dtype in ((None, torch.float32), (False, torch.float64)):
        gen = torch.Generator().manual_seed(5)

        def drawn(*shape: int, gen: torch.Generator = gen, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=gen).to(dtype)

        params = [nn.Parameter(drawn(300, 400)), nn.Parameter(drawn(300, 400)), nn.Parameter(drawn(300, 400).t())]
        optimizer = C3O(params, sphere=3.0, grad_clip=0.5, state_dtype=dtype, foreach=foreach)
        for _ in range(3):
            params[0].grad = drawn(400, 300).t()
            expanded = drawn(1, 400).expand(300, 400)
            params[1].grad = expanded if foreach is None else expanded.clone()  # the for-loop clips in place
            params[2].grad = drawn(400, 300)
            optimizer.grad_norm = torch.tensor(7.0)
            optimizer.step()
        results.append(tensors_of(optimizer))
    assert steps == [2] * 3
    compare(*results, torch.float32)


def test_the_gradient_scaler_skips_and_unscales(steps: list[int]) -> None:
    results = []
    for foreach in (None, True):
        params = large()
        optimizer = C3O(params, sphere=3.0, grad_clip=0.5, foreach=foreach)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaler.scale(torch.zeros(()))
        for step in range(4):
            set_gradients(params, step)
            for p in params:
                p.grad.mul_(scaler.get_scale())
            if step == 1:
                params[2].grad.view(-1)[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        results.append(tensors_of(optimizer))
    assert steps == [5] * 3
    for x, y in zip(*results, strict=True):
        assert_alike(x, y, rounded=False)


def test_autograd_is_told_that_weights_have_changed() -> None:
    p = nn.Parameter(torch.ones(256, 300))
    y = (p * p).sum()
    y.backward(retain_graph=True)
    C3O([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_path_of_a_tensor_does_not_depend_on_its_neighbours(steps: list[int]) -> None:
    """Buckets follow from when tensors had their first gradients, which a checkpoint does not keep."""

    def shapes() -> list[nn.Parameter]:
        gen = torch.Generator().manual_seed(3)
        return [nn.Parameter(torch.randn(s, generator=gen)) for s in ((100, 50), (400, 300), (500, 300), (70, 1000))]

    def go(optimizer: C3O, params: list[nn.Parameter], first: int, last: int) -> None:
        for step in range(first, last):
            set_gradients(params, step)
            if step == 0:
                params[0].grad = params[3].grad = None
            optimizer.step()

    params = shapes()
    optimizer = C3O(params, sphere=3.0)
    go(optimizer, params, 0, 4)
    second, after = resumed(optimizer, params)
    assert steps == [2] + [2, 1] * 3
    go(optimizer, params, 4, 10)
    go(second, after, 4, 10)
    assert bits(tensors_of(optimizer)) == bits(tensors_of(second))


def test_a_refused_step_changes_no_bit(steps: list[int]) -> None:
    params = large()
    optimizer = C3O(params, sphere=3.0, grad_clip=0.5)
    run(optimizer, params, 2)
    before = bits(tensors_of(optimizer))
    set_gradients(params, 2)
    _, applied = optimizer.guarded_step(torch.tensor(torch.nan))
    assert not applied
    assert bits(tensors_of(optimizer)) == before
    norm, applied = optimizer.guarded_step(torch.tensor(1.0))
    assert applied
    assert norm > 0
    assert steps == [5] * 3


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"foreach": True}, torch.float32),
        ({"credit_gain": 1.0}, torch.float32),
        ({"trust_norm_refresh_drift": 0.05}, torch.float32),
        ({"state_dtype": "int8"}, torch.float32),
        ({"state_dtype": torch.bfloat16}, torch.float32),
        ({"state_dtype": torch.float64}, torch.float32),
        ({}, torch.bfloat16),
    ],
    ids=str,
)
def test_what_it_does_not_serve(settings: dict[str, Any], dtype: torch.dtype, steps: list[int]) -> None:
    params = large(dtype)
    run(C3O(params, **settings), params, 1)
    assert steps == []


def test_small_tensors_go_in_buckets(steps: list[int]) -> None:
    for blocks, taken in ((LARGE_BLOCKS - 1, []), (LARGE_BLOCKS, [2])):
        params = [nn.Parameter(torch.ones(blocks * BLOCK)) for _ in range(2)]
        run(C3O(params), params, 1)
        assert steps == taken
