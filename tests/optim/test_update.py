"""The trainer's seam and the factory, for every optimizer and clip mode."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from optim_cases import bits, tensors_of
from torch import Tensor, nn

from eco_llm.config import C3OConfig, OptimizerConfig
from eco_llm.errors import UserError
from eco_llm.optim.c3o import C3O
from eco_llm.optim.factory import build_optimizer
from eco_llm.optim.grads import global_norm, tensor_norms
from eco_llm.optim.muon import MuonWithAdamW
from eco_llm.optim.update import Update

OPTIMIZERS = ("c3o", "adamw", "muon")
MODES = ("norm", "value")


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 16)
        self.out = nn.Linear(16, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embedding(ids))))

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.hidden.weight], "weight_decay": 0.1, "name": "matrix"},
            {"params": [self.embedding.weight, self.out.weight], "weight_decay": 0.1, "name": "embedding"},
            {"params": [self.hidden.bias], "weight_decay": 0.0, "name": "vector"},
        ]


def make(optimizer: str, device: str = "cpu", **changes: Any) -> tuple[Toy, Update]:
    torch.manual_seed(0)
    model = Toy().to(device)
    config = OptimizerConfig(optimizer=optimizer, lr=1e-2, **changes)  # type: ignore[arg-type]
    return model, Update(build_optimizer(model.groups(), config, C3OConfig(), device), config)


def backward(model: Toy, seed: int = 0) -> Tensor:
    ids = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(seed))
    ids = ids.to(model.out.weight.device)
    loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_learns_and_reports_the_norm_before_clipping(optimizer: str, mode: str) -> None:
    model, update = make(optimizer, grad_clip=0.05, grad_clip_mode=mode)
    losses = []
    for _ in range(60):
        loss = backward(model)
        expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        result = update.step(loss)
        torch.testing.assert_close(result.grad_norm, expected, rtol=1e-6, atol=0)
        assert result.applied
        update.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", MODES)
def test_clips_once_and_to_the_threshold(optimizer: str, mode: str) -> None:
    model, update = make(optimizer, grad_clip=1e-3, grad_clip_mode=mode)
    loss = backward(model)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = update.step(loss).grad_norm
    for name, p in model.named_parameters():
        want = grads[name] * (1e-3 / (norm + 1e-6)) if mode == "norm" else grads[name].clamp(-1e-3, 1e-3)
        torch.testing.assert_close(p.grad, want, rtol=1e-5, atol=1e-9)


def poison(model: Toy, loss: Tensor, how: str) -> Tensor:
    if how == "loss":
        return loss * float("nan")
    assert model.hidden.weight.grad is not None
    model.hidden.weight.grad[0, 0] = float(how)
    return loss


def check_bad_step(device: str, optimizer: str, mode: str, how: str, *, first: bool) -> None:
    model, update = make(optimizer, device, grad_clip_mode=mode)
    if not first:
        update.step(backward(model))
        update.zero_grad()
    before = bits([p.detach() for p in model.parameters()])
    state = bits(tensors_of(update.optimizer))
    result = update.step(poison(model, backward(model, 1), how))
    assert not result.applied
    assert bits([p.detach() for p in model.parameters()]) == before
    if not first:
        assert bits(tensors_of(update.optimizer)) == state
    update.zero_grad()
    assert update.step(backward(model, 2)).applied
    assert bits([p.detach() for p in model.parameters()]) != before
    assert all(torch.isfinite(t).all() for t in tensors_of(update.optimizer))


@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later"])
@pytest.mark.parametrize("how", ["nan", "inf", "loss"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bad_step_changes_nothing(optimizer: str, mode: str, how: str, first: bool) -> None:
    check_bad_step("cpu", optimizer, mode, how, first=first)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later"])
@pytest.mark.parametrize("how", ["nan", "inf", "loss"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_cuda_bad_step_changes_nothing(optimizer: str, mode: str, how: str, first: bool) -> None:
    check_bad_step("cuda", optimizer, mode, how, first=first)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["c3o", "adamw"])
def test_cuda_update_never_synchronises(optimizer: str, mode: str) -> None:
    model, update = make(optimizer, "cuda", grad_clip_mode=mode)
    loss = backward(model)
    update.step(loss)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in (1e-3, 2e-3):
            update.set_lr(lr)
            result = update.step(loss)
            update.metrics_tensor()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.applied


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_is_exact(optimizer: str) -> None:
    model, update = make(optimizer)
    for i in range(3):
        update.zero_grad()
        update.step(backward(model, i))
    twin = copy.deepcopy(model)
    _, other = make(optimizer)
    config = OptimizerConfig(optimizer=optimizer)  # type: ignore[arg-type]
    other = Update(build_optimizer(twin.groups(), config, C3OConfig(), "cpu"), config)
    file = io.BytesIO()
    torch.save(update.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for u, m in ((update, model), (other, twin)):
        for i in range(3, 6):
            u.zero_grad()
            u.step(backward(m, i))
    assert bits(tensors_of(update.optimizer)) == bits(tensors_of(other.optimizer))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_set_lr_reaches_every_group(optimizer: str) -> None:
    model, update = make(optimizer, weight_decay=0.0)
    update.set_lr(0.0)
    before = bits([p.detach() for p in model.parameters()])
    update.step(backward(model))
    assert bits([p.detach() for p in model.parameters()]) == before
    update.set_lr(0.5)
    assert [g["lr"] for g in update.optimizer.param_groups] == [0.5] * 3


def test_set_lr_fills_a_tensor_in_place() -> None:
    p = nn.Parameter(torch.ones(3))
    lr = torch.tensor(0.1)
    Update(C3O([p], lr=lr), OptimizerConfig()).set_lr(0.25)
    assert lr == 0.25


def test_muon_takes_matrices_and_matches_its_parts() -> None:
    model, update = make("muon", grad_clip=0.0)
    twin = copy.deepcopy(model)
    muon = torch.optim.Muon([twin.hidden.weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [
        {"params": [twin.embedding.weight, twin.out.weight], "weight_decay": 0.1},
        {"params": [twin.hidden.bias], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95))
    for i in range(3):
        update.zero_grad()
        twin.zero_grad()
        update.step(backward(model, i))
        backward(twin, i)
        muon.step()
        adamw.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    copied = copy.deepcopy(update.optimizer)
    assert isinstance(copied, MuonWithAdamW)
    assert [len(r.param_groups) for r in copied._rules] == [1, 2]


def test_muon_refuses_a_vector_in_the_matrix_group() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(3))], "weight_decay": 0.0, "name": "matrix"}]
    with pytest.raises(ValueError, match="2D"):
        build_optimizer(groups, OptimizerConfig(optimizer="muon"), C3OConfig(), "cpu")


def test_muon_refuses_a_group_that_it_would_never_step() -> None:
    _, update = make("muon")
    with pytest.raises(RuntimeError, match="all its groups"):
        update.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "name": "vector"})
    assert len(update.optimizer.param_groups) == len(copy.deepcopy(update.optimizer).param_groups)


def test_factory_passes_every_setting_of_c3o() -> None:
    config = OptimizerConfig(
        lr=0.3, weight_decay=0.2, beta1=0.8, beta2=0.7, eps=1e-5, grad_clip=3.0, grad_clip_mode="value"
    )
    c3o = C3OConfig(
        c3o_trust_radius=0.5, c3o_trust_norm_refresh_drift=0.25, c3o_trust_norm_refresh_steps=5, c3o_credit_gain=2.0,
        c3o_state_dtype="bf16", c3o_error_bits=8, c3o_sphere=3.0, c3o_nesterov=False,
    )  # fmt: skip
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))], "name": "matrix"}]
    optimizer = build_optimizer(groups, config, c3o, torch.device("cpu"))
    assert isinstance(optimizer, C3O)
    wanted = {
        "lr": 0.3, "weight_decay": 0.2, "betas": (0.8, 0.7), "eps": 1e-5, "grad_clip": 3.0, "grad_clip_mode": "value",
        "trust_radius": 0.5, "trust_norm_refresh_drift": 0.25, "trust_norm_refresh_steps": 5, "credit_gain": 2.0,
        "state_dtype": "bfloat16", "error_bits": 8, "name": "matrix",
        "sphere": 3.0, "nesterov": False,
    }  # fmt: skip
    assert {k: optimizer.param_groups[0][k] for k in wanted} == wanted
    assert set(groups[0]) == {"params", "name"}  # the caller's groups are not modified
    # Every C3O flag is one of those, so a new flag cannot be forgotten here.
    assert len(dataclasses.fields(C3OConfig)) == 8
    looking = build_optimizer(groups, config, C3OConfig(c3o_nesterov=True), "cpu")
    assert looking.param_groups[0]["nesterov"] is True


def test_only_hidden_matrices_have_a_sphere() -> None:
    names = ("vector", "matrix", "embedding")
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "name": name} for name in names]
    optimizer = build_optimizer(groups, OptimizerConfig(), C3OConfig(c3o_sphere=2.0), "cpu")
    assert [group["sphere"] for group in optimizer.param_groups] == [0.0, 2.0, 0.0]


def test_factory_defaults_match_the_class() -> None:
    p = [nn.Parameter(torch.zeros(2, 2))]
    built = build_optimizer([{"params": p, "name": "matrix"}], OptimizerConfig(grad_clip=0.0), C3OConfig(), "cpu")
    plain = C3O(p).param_groups[0]
    assert {k: v for k, v in built.param_groups[0].items() if k != "name"} == plain


def test_eps_zero_is_a_users_mistake_for_c3o_only() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))], "name": "matrix"}]
    with pytest.raises(UserError, match="--eps"):
        build_optimizer(groups, OptimizerConfig(eps=0.0), C3OConfig(), "cpu")
    build_optimizer(groups, OptimizerConfig(optimizer="adamw", eps=0.0), C3OConfig(), "cpu")


def test_metrics_of_each_kind() -> None:
    _, update = make("adamw")
    assert update.metrics() == {}
    assert update.metrics_tensor()[0] == ()
    model, update = make("c3o")
    update.step(backward(model))
    metrics = update.metrics()
    names, values = update.metrics_tensor()
    assert dict(zip(names, values.tolist(), strict=True)) == metrics
    assert metrics["c3o_foreach_groups"] == metrics["c3o_grad_clip_foreach_groups"] == 3
    assert metrics["c3o_trust_norm_exact"] == 4
    assert 0 < metrics["c3o_update_to_weight"] <= 0.1 + 1e-6


@pytest.mark.parametrize("others", [0, 2])
def test_norms_of_large_tensors_on_a_cpu_are_summed_in_parts(others: int) -> None:
    gen = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2**21 + 5, generator=gen), *(torch.randn(7, 3, generator=gen) for _ in range(others))]
    wide = torch.stack([t.double().norm() for t in tensors])
    torch.testing.assert_close(tensor_norms(tensors, torch.float32), wide.float(), rtol=2e-6, atol=0)
    torch.testing.assert_close(global_norm(tensors), wide.norm().float(), rtol=2e-6, atol=0)
    for bad in (torch.nan, torch.inf):
        tensors[0][-1] = bad
        assert not tensor_norms(tensors, torch.float32)[0].isfinite()


def test_global_norm_over_mixed_types() -> None:
    grads = [torch.full((100,), 3.0, dtype=torch.bfloat16), torch.full((7,), 2.0), torch.ones(4, dtype=torch.float64)]
    norm = global_norm(grads)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx((900 + 28 + 4) ** 0.5, rel=1e-7)
    with pytest.raises(ValueError, match="no gradients"):
        global_norm([])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_is_capturable_without_a_gpu(optimizer: str) -> None:
    _, update = make(optimizer)
    assert not update.capturable
    with pytest.raises(RuntimeError, match=r"captured|graph"):
        update.make_capturable()
    assert all(isinstance(group["lr"], float) for group in update.optimizer.param_groups)


def test_guarded_step_needs_a_gradient() -> None:
    model, update = make("c3o")
    with pytest.raises(ValueError, match="no gradients"):
        update.step(torch.zeros(()))
    assert update.step(backward(model)).applied


@pytest.mark.gpu
def test_cuda_capturable_and_saved_learning_rates_are_numbers() -> None:
    for optimizer, expected in (("c3o", True), ("adamw", True), ("muon", False)):
        model, update = make(optimizer, "cuda")
        assert update.capturable is expected
        if expected:
            before = bits([p.detach() for p in model.parameters()])
            update.make_capturable()
            assert bits([p.detach() for p in model.parameters()]) == before
            update.set_lr(2e-3)
            assert update.step(backward(model)).applied
            saved = update.state_dict()
            assert {type(group["lr"]) for group in saved["param_groups"]} == {float}
            _, other = make(optimizer)  # a CPU resumes
            other.load_state_dict(copy.deepcopy(saved))
