"""PyTorch's own optimizer conditions on C3O, driven by the `OptimizerInfo` that PyTorch's suite is driven by.

PyTorch ships the descriptions (`torch.testing._internal.common_optimizers`: inputs, flags, error inputs, schedulers),
not the test bodies (test/test_optim.py of its repository); each test here has the name and the condition of one there.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eco_llm import C3O

pytest.importorskip("expecttest", reason="PyTorch's test helpers need it: the `test` extra has it")
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, PolynomialLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

CPU = "cpu"


def c3o_inputs(device: str, dtype: Any = None) -> list[OptimizerInput]:
    """Settings that each change what a step does. `params` are the tests' business."""
    kwargs: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.001)},
        "1-element tensor lr": {"lr": torch.tensor([0.001])},
        "weight_decay": {"weight_decay": 0.9},
        "no weight_decay": {"weight_decay": 0.0},
        "no cap": {"trust_radius": 0.0},
        "sphere": {"lr": 0.01, "sphere": 2.0},
        "no-nesterov": {"nesterov": False},
        "norm skip": {"lr": 1e-4, "trust_norm_refresh_drift": 0.05},
        "credit": {"credit_gain": 5.0},
        "clip": {"grad_clip": 0.1},
        "clip by value": {"grad_clip": 0.01, "grad_clip_mode": "value"},
        "bfloat16 state": {"state_dtype": torch.bfloat16},
        "int8 state": {"state_dtype": "int8"},
        "int4 state and norm skip": {"state_dtype": "int4", "trust_norm_refresh_drift": 0.05},
    }
    return [OptimizerInput(params=None, kwargs=kw, desc=desc) for desc, kw in kwargs.items()]


def c3o_error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    errors = get_error_inputs_for_all_optims(device, dtype)
    for kwargs, regex in (
        ({"lr": -1}, "lr must be"), ({"betas": (1.0, 0.0)}, "betas must be"), ({"eps": -1}, "eps must be"),
        ({"weight_decay": -1}, "weight_decay must be"), ({"state_dtype": torch.float16}, "state_dtype must be"),
        ({"sphere": -1}, "sphere must be"),
        ({"sphere": 200.0, "lr": 0.01}, "sphere · lr must be"),
    ):  # fmt: skip
        errors.append(
            ErrorOptimizerInput(
                OptimizerInput(params=None, kwargs=kwargs, desc=regex), error_type=ValueError, error_regex=regex
            )
        )
    return errors


INFO = OptimizerInfo(
    C3O,
    optim_inputs_func=c3o_inputs,
    optim_error_inputs_func=c3o_error_inputs,
    scheduler_inputs=(
        [lambda opt: ExponentialLR(opt, gamma=0.9)],
        [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4)],
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt)],
        [lambda opt: PolynomialLR(opt, power=0.9, total_iters=4)],
    ),
    supported_impls=("foreach",),
    not_og_supported_flags=("foreach", "weight_rounding", "error_bits"),
    supports_complex=False,
    supports_sparse=False,
)

INPUTS = c3o_inputs(CPU)
ALL_INPUTS = _get_optim_inputs_including_global_cliquey_kwargs(CPU, torch.float32, INFO)
every_input = pytest.mark.parametrize("optim_input", ALL_INPUTS, ids=lambda x: x.desc)
every_setting = pytest.mark.parametrize("optim_input", INPUTS, ids=lambda x: x.desc)


def settings_of(optim_input: OptimizerInput, **more: Any) -> dict[str, Any]:
    return {**copy.deepcopy(optim_input.kwargs), **more}


def linear_problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, nn.Parameter, Any]:
    gen = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(10, 5, generator=gen).to(dtype))
    bias = nn.Parameter(torch.randn(10, generator=gen).to(dtype))
    x = torch.randn(5, generator=gen).to(dtype)

    def loss() -> Tensor:
        return (weight.mv(x) + bias).pow(2).sum()

    return weight, bias, loss


def stepped(optim_input: OptimizerInput, steps: int = 3) -> tuple[list[nn.Parameter], C3O, Any]:
    weight, bias, loss = linear_problem()
    optimizer = C3O([weight, bias], **settings_of(optim_input))
    go(optimizer, loss, steps)
    return [weight, bias], optimizer, loss


def go(optimizer: C3O, loss: Any, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


# ---- construction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(c3o_error_inputs(CPU, torch.float32))))
def test_errors(index: int) -> None:
    error = c3o_error_inputs(CPU, torch.float32)[index]
    assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = error.optimizer_error_input
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(1))]
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            C3O(params, **given.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            C3O(params, **given.kwargs)


@every_input
def test_optimizer_can_be_printed(optim_input: OptimizerInput) -> None:
    params, optimizer, _ = stepped(optim_input, 0)
    assert "Parameter Group 0" in repr(optimizer)
    assert "C3O" in repr(optimizer)
    assert len(params) == 2


def test_complex_and_sparse_are_refused() -> None:
    assert not INFO.supports_complex
    assert not INFO.supports_sparse
    with pytest.raises(ValueError, match="real floating point"):
        C3O([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    p = nn.Parameter(torch.zeros(3, 3))
    p.grad = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse"):
        C3O([p]).step()


# ---- steps --------------------------------------------------------------------------------------------------------


@every_input
@pytest.mark.parametrize("contiguous", [True, False])
def test_forloop_goes_right_direction(optim_input: OptimizerInput, contiguous: bool) -> None:
    weight, bias, loss = linear_problem()
    if not contiguous:
        gen = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(10, 5, 2, generator=gen)[..., 0])
        bias = nn.Parameter(torch.randn(10, 2, generator=gen)[..., 0])
        x = torch.randn(5, generator=gen)

        def loss() -> Tensor:
            return (weight.mv(x) + bias).pow(2).sum()

    optimizer = C3O([weight, bias], **settings_of(optim_input))
    before = loss().item()
    go(optimizer, loss, 20)
    assert loss().item() < before


@pytest.mark.parametrize("schedulers", INFO.scheduler_inputs, ids=lambda x: str(len(x)))
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_param_group_with_lrscheduler_goes_right_direction(schedulers: Any, tensor_lr: bool, foreach: bool) -> None:
    weight, bias, loss = linear_problem()
    groups = [{"params": [weight]}, {"params": [bias], "lr": torch.tensor(0.01) if tensor_lr else 0.01}]
    optimizer = C3O(groups, lr=torch.tensor(0.01) if tensor_lr else 0.01, foreach=foreach)
    chain = [make(optimizer) for make in schedulers]
    before = loss().item()
    for _ in range(20):
        go(optimizer, loss, 1)
        for scheduler in chain:
            scheduler.step(loss().detach()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    assert loss().item() < before


@pytest.mark.parametrize("foreach", [False, True])
def test_param_groups_weight_decay(foreach: bool) -> None:
    weight, bias, loss = linear_problem()
    optimizer = C3O([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}], weight_decay=50.0, foreach=foreach)
    bias_only, other, other_loss = linear_problem()
    plain = C3O([bias_only, other], weight_decay=0.0, foreach=foreach)
    go(optimizer, loss, 1)
    go(plain, other_loss, 1)
    assert torch.equal(bias, other)
    assert weight.norm() < bias_only.norm()


@pytest.mark.parametrize("foreach", [False, True])
def test_param_groups_lr(foreach: bool) -> None:
    weight, bias, loss = linear_problem()
    start = weight.detach().clone(), bias.detach().clone()
    optimizer = C3O([{"params": [weight]}, {"params": [bias], "lr": 0.01}], lr=0.0, foreach=foreach)
    go(optimizer, loss)
    assert torch.equal(weight, start[0])
    assert not torch.equal(bias, start[1])


@every_setting
def test_foreach_matches_forloop(optim_input: OptimizerInput) -> None:
    exact = "state_dtype" not in optim_input.kwargs
    results = []
    for foreach in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 1), nn.Sigmoid()).double()
        model.register_parameter("unused", nn.Parameter(torch.rand((), dtype=torch.float64)))
        kwargs = settings_of(optim_input, foreach=foreach)
        if exact:
            kwargs["state_dtype"] = torch.float64
        optimizer = C3O(model.parameters(), **kwargs)
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for _ in range(7):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
        results.append((list(model.parameters()), optimizer))
    (a, left), (b, right) = results
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12 if exact else 1e-6, atol=1e-14 if exact else 1e-7)
        assert left.state[p].keys() == right.state[q].keys()
        for name, value in left.state[p].items():
            if exact:
                torch.testing.assert_close(value, right.state[q][name], rtol=1e-11, atol=1e-14)
            else:
                assert value.dtype == right.state[q][name].dtype


def test_set_default_dtype_works_with_foreach() -> None:
    old = torch.get_default_dtype()
    for default in (torch.float64, torch.float16):
        try:
            torch.set_default_dtype(default)
            for optim_input in c3o_inputs(CPU):
                p = nn.Parameter(torch.ones(5, 3, dtype=torch.float32))
                p.grad = torch.ones_like(p)
                optimizer = C3O([p], **settings_of(optim_input, foreach=True))
                optimizer.step()
                assert optimizer.state[p]["step"].dtype == torch.float32
                assert torch.isfinite(p).all()
        finally:
            torch.set_default_dtype(old)


@every_input
def test_step_is_noop_when_params_have_no_grad(optim_input: OptimizerInput) -> None:
    params = [nn.Parameter(torch.randn(2, 3)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    optimizer = C3O(params, **settings_of(optim_input))
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@every_input
def test_step_is_noop_for_zero_grads(optim_input: OptimizerInput) -> None:
    p = nn.Parameter(torch.randn(5, 1))
    before = p.detach().clone()
    optimizer = C3O([p], **settings_of(optim_input, weight_decay=0.0))
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("foreach", [False, True, None])
def test_mixed_device_dtype(foreach: bool | None) -> None:
    """Parameters of several types in one group step as they would alone."""
    types = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    together = [nn.Parameter(torch.ones(4, 3, dtype=t)) for t in types]
    alone = [nn.Parameter(torch.ones(4, 3, dtype=t)) for t in types]
    optimizer, others = C3O(together, foreach=foreach), [C3O([p], foreach=foreach) for p in alone]
    for i in range(4):
        for p, q, other in zip(together, alone, others, strict=True):
            p.grad = torch.full_like(p, 0.1 * (i + 1))
            q.grad = p.grad.clone()
            other.step()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))


# ---- state dicts --------------------------------------------------------------------------------------------------


@every_input
def test_state_dict_deterministic(optim_input: OptimizerInput) -> None:
    params, optimizer, loss = stepped(optim_input)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    x = torch.randn(5, generator=torch.Generator().manual_seed(9))
    second = C3O(twins, **settings_of(optim_input))
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same_state(optimizer.state_dict(), second.state_dict())

    def both(pair: list[nn.Parameter]) -> Tensor:
        return (pair[0].mv(x) + pair[1]).pow(2).sum()

    go(optimizer, lambda: both(params))
    go(second, lambda: both(twins))
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    third = C3O(twins, **settings_of(optim_input))
    third.load_state_dict(second.state_dict())
    assert same_state(third.state_dict(), second.state_dict())
    assert loss is not None


@every_input
def test_can_load_older_state_dict(optim_input: OptimizerInput) -> None:
    params, optimizer, loss = stepped(optim_input)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in INFO.not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(old)
    go(optimizer, loss)
    assert all(torch.isfinite(p).all() for p in params)


@every_input
def test_save_load_equality_with_weights_only(optim_input: OptimizerInput) -> None:
    params, optimizer, _ = stepped(optim_input)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert same_state(loaded, optimizer.state_dict())
    second = C3O([nn.Parameter(p.detach().clone()) for p in params])
    second.load_state_dict(loaded)
    assert same_state(second.state_dict(), optimizer.state_dict())


@every_input
def test_load_nontensor_step(optim_input: OptimizerInput) -> None:
    params, optimizer, loss = stepped(optim_input)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = float(state["step"])
    optimizer.load_state_dict(saved)
    go(optimizer, loss, 1)
    assert all(float(optimizer.state[p]["step"]) == 4 for p in params)


@every_input
def test_params_and_named_parameters(optim_input: OptimizerInput) -> None:
    weight, bias, loss = linear_problem()
    named = C3O([("weight", weight), ("bias", bias)], **settings_of(optim_input))
    other_weight, other_bias, other_loss = linear_problem()
    plain = C3O([other_weight, other_bias], **settings_of(optim_input))
    go(named, loss)
    go(plain, other_loss)
    assert torch.equal(weight, other_weight)
    assert torch.equal(bias, other_bias)
    assert named.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    plain.load_state_dict(named.state_dict())  # names need not match, as in PyTorch
    named.load_state_dict(plain.state_dict())
    go(named, loss)


def test_cpu_load_state_dict() -> None:
    """Not one value of the state shares memory with the file that it came from."""
    params, optimizer, loss = stepped(OptimizerInput(None, {"state_dtype": "int8"}))
    saved = optimizer.state_dict()
    frozen = copy.deepcopy(saved)
    second = C3O([nn.Parameter(p.detach().clone()) for p in params])
    second.load_state_dict(saved)
    for p in second.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    second.step()
    assert same_state(saved, frozen)
    assert loss is not None


def test_non_empty_state() -> None:
    """A state dict with entries that no parameter owns loads, and keeps them."""
    params, optimizer, _ = stepped(OptimizerInput(None, {}))
    saved = optimizer.state_dict()
    saved["state"]["extra"] = {"note": 1}
    second = C3O([nn.Parameter(p.detach().clone()) for p in params])
    second.load_state_dict(saved)
    assert second.state["extra"] == {"note": 1}


# ---- copies and hooks ---------------------------------------------------------------------------------------------


@every_input
def test_deepcopy_copies_all_public_attrs(optim_input: OptimizerInput) -> None:
    _, optimizer, _ = stepped(optim_input)

    def public(x: C3O) -> set[str]:
        return {k for k in x.__dict__ if not k.startswith("_")}

    assert public(optimizer) == public(copy.deepcopy(optimizer)) == public(pickle.loads(pickle.dumps(optimizer)))


def test_step_hooks() -> None:
    calls: list[str] = []
    _, optimizer, loss = stepped(OptimizerInput(None, {}), 1)
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("all pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all post")),
    ]
    go(optimizer, loss, 1)
    assert calls == ["all pre", "pre", "post", "all post"]
    for handle in handles:
        handle.remove()
    go(optimizer, loss, 1)
    assert len(calls) == 4


def test_state_dict_hooks() -> None:
    calls: list[str] = []
    _, optimizer, _ = stepped(OptimizerInput(None, {}), 1)

    def after_saving(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        state["mark"] = 1
        return state

    def before_loading(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("load pre")
        assert state.pop("mark") == 1
        state["param_groups"][0]["lr"] = 0.5
        return state

    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(after_saving)
    optimizer.register_load_state_dict_pre_hook(before_loading)
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load post"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert calls == ["save pre", "load pre", "load post"]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_load_state_dict_pre_hook_may_replace_the_state() -> None:
    """What a hook returns is what is loaded: all of it, moments too."""
    params, optimizer, _ = stepped(OptimizerInput(None, {}))
    doubled = copy.deepcopy(optimizer.state_dict())
    for state in doubled["state"].values():
        state["exp_avg"] = state["exp_avg"] * 2
    optimizer.register_load_state_dict_pre_hook(lambda *_: doubled)
    before = optimizer.state[params[0]]["exp_avg"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], 2 * before)


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optim_input in c3o_inputs(CPU):
            stepped(optim_input, 2)
