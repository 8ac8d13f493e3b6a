"""Gradient release against the ordinary step: the same bits, and never two units' gradients at once.

Tests marked gpu run on a GPU; those of the kernels also in Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim_cases import bits
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from eco_llm.config import C3OConfig, OptimizerConfig, SigmaConfig, TrainConfig, TrainingConfig
from eco_llm.errors import UserError
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.optim.c3o import C3O
from eco_llm.optim.factory import build_optimizer
from eco_llm.optim.release import ReleasedUpdate
from eco_llm.optim.update import Update, UpdateResult

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu_only = pytest.mark.skipif(INTERPRETED, reason="needs CUDA itself")

TINY = SigmaConfig(
    d_model=32, n_layers=4, n_heads=2, mamba_ratio=2, mamba_head_dim=64, mamba_state_dim=16, kv_latent_dim=12,
    rope_head_dim=4, mlp_hidden_dim=48, vocab_size=300, q_latent_dim=10, loss_chunk_tokens=64,
)  # fmt: skip
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
AnyUpdate = Update | ReleasedUpdate


class Watch:
    """Which units' gradients exist, by their storages. Asked whenever a gradient has been made, before it is used.

    To be made before an update is: hooks run in the order in which they came.
    """

    def __init__(self, model: SigmaLLM) -> None:
        self.most_units, self.most_bytes, self.seen = 0, 0, 0
        self._alive: list[tuple[int, int, StorageWeakRef]] = []
        for number, unit in enumerate(model.update_units()):
            for p in unit:
                p.register_post_accumulate_grad_hook(lambda p, n=number: self._look(p, n))  # type: ignore[misc]

    def _look(self, p: Tensor, unit: int) -> None:
        assert p.grad is not None
        self.seen += 1
        storage = p.grad.untyped_storage()
        self._alive = [entry for entry in self._alive if not entry[2].expired()]
        self._alive.append((unit, storage.nbytes(), StorageWeakRef(storage)))
        self.most_units = max(self.most_units, len({number for number, _, _ in self._alive}))
        self.most_bytes = max(self.most_bytes, sum(size for _, size, _ in self._alive))


@dataclasses.dataclass
class Side:
    """A model and what updates it."""

    model: SigmaLLM
    update: AnyUpdate
    device: str
    watch: Watch

    def loss(self, seed: int) -> Tensor:
        text = torch.randint(300, (2, 25), generator=torch.Generator().manual_seed(seed)).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.model.embedding.weight.dtype == torch.bfloat16):
            return self.model.loss(text[:, :-1], text[:, 1:])

    def step(self, seed: int) -> UpdateResult:
        self.update.set_lr(1e-2 / (1 + seed))
        loss = self.loss(seed)
        self.update.backward(loss)
        result = self.update.step(loss.detach())
        self.update.zero_grad()
        return result

    def parameters(self) -> list[bytes]:
        return bits([p.detach() for p in self.model.parameters()])


def side(
    released: bool,
    rule: str = "c3o",
    weights: str = "fp32",
    device: str = "cpu",
    c3o: C3OConfig | None = None,
    tied: bool = True,
    **changes: Any,
) -> Side:
    torch.manual_seed(0)
    model = SigmaLLM(dataclasses.replace(TINY, tie_embeddings=tied), weights_dtype=WEIGHTS[weights]).to(device)
    config = OptimizerConfig(optimizer=rule, lr=1e-2, **{"grad_clip": 0.0, **changes})  # type: ignore[arg-type]
    groups = model.parameter_groups(0.1)
    c3o, watch = c3o or C3OConfig(), Watch(model)
    if released:
        return Side(model, ReleasedUpdate(groups, model.update_units(), config, c3o, device), device, watch)
    return Side(model, Update(build_optimizer(groups, config, c3o, device), config), device, watch)


def both(*args: Any, **kwargs: Any) -> tuple[Side, Side]:
    return side(False, *args, **kwargs), side(True, *args, **kwargs)


def flat(tree: Any) -> dict[str, Any]:
    """A state dict with tensors as (type, shape, bits)."""
    if isinstance(tree, dict):
        return {f"{key}.{k}": v for key, value in tree.items() for k, v in flat(value).items()}
    if isinstance(tree, list):
        return flat(dict(enumerate(tree)))
    return {"": (tree.dtype, tree.shape, bits([tree])) if isinstance(tree, Tensor) else tree}


def assert_same(ordinary: Side, released: Side) -> None:
    assert released.parameters() == ordinary.parameters()
    assert flat(released.update.state_dict()) == flat(ordinary.update.state_dict())


def check_equal(ordinary: Side, released: Side, steps: int = 4) -> None:
    start = ordinary.parameters()
    for i in range(steps):
        want, got = ordinary.step(i), released.step(i)
        torch.testing.assert_close(got.grad_norm, want.grad_norm, rtol=1e-5, atol=0)
        assert got.applied
        assert want.applied
        metrics = released.update.metrics()
        for name, value in ordinary.update.metrics().items():
            if name.endswith("_groups"):  # of launches: each unit has its own
                assert metrics[name] >= value
            else:
                assert metrics[name] == pytest.approx(value, rel=1e-5), name
    assert all(a != b for a, b in zip(ordinary.parameters(), start, strict=True))
    assert_same(ordinary, released)


RULES: dict[str, dict[str, Any]] = {
    "c3o": {},
    "c3o-value-clip": {"grad_clip": 1e-3, "grad_clip_mode": "value"},
    "c3o-credit": {"c3o": C3OConfig(c3o_credit_gain=5.0)},
    "c3o-sphere": {"c3o": C3OConfig(c3o_sphere=2.0, c3o_state_dtype="int8")},
    "c3o-skip-bf16-state": {
        "c3o": C3OConfig(c3o_trust_norm_refresh_drift=0.05, c3o_trust_norm_refresh_steps=3, c3o_state_dtype="bf16")
    },
    "adamw": {"rule": "adamw"},
    "adamw-value-clip": {"rule": "adamw", "grad_clip": 1e-3, "grad_clip_mode": "value"},
    "muon": {"rule": "muon"},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_ordinary_step(rule: str, weights: str, tied: bool) -> None:
    check_equal(*both(weights=weights, tied=tied, **RULES[rule]))


@pytest.mark.gpu
@on_gpu_only
@pytest.mark.parametrize("capturable", [True, False], ids=["capturable", "plain"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("c3o-credit", "muon")])
def test_cuda_equals_the_ordinary_step(rule: str, weights: str, capturable: bool) -> None:
    sides = both(weights=weights, device="cuda", **RULES[rule])
    for s in sides:
        if capturable:
            s.update.make_capturable()
    check_equal(*sides)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["c3o", "c3o-value-clip", "c3o-skip-bf16-state", "c3o-sphere"])
def test_kernels_of_units_equal_those_of_the_whole(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are given, so that nothing but the optimizer's kernels runs in the interpreter."""
    pytest.importorskip("triton")
    if INTERPRETED:
        from eco_llm.optim import c3o_triton

        monkeypatch.setattr(C3O, "_force_kernels", True)
        monkeypatch.setattr(c3o_triton, "TILE", 4096)
    ordinary, released = both(device=KERNEL_DEVICE, **RULES[rule])
    for s in (ordinary, released):
        s.update.make_capturable()
    for i in range(2):
        for s in (ordinary, released):
            s.update.set_lr(1e-2 / (i + 1))
            generator = torch.Generator().manual_seed(i)
            terms = [(p * torch.randn(p.shape, generator=generator).to(p.device)).sum() for p in s.model.parameters()]
            loss = torch.stack(terms).sum()
            s.update.backward(loss)
            assert s.update.step(loss.detach()).applied
            s.update.zero_grad()
    assert_same(ordinary, released)


# -- ways in which backward reaches a block --------------------------------------------------------------------


Pair = tuple[Tensor, Tensor]  # whose sum is meant


def recompute_blocks(model: SigmaLLM, reentrant: bool) -> None:
    for block in model.blocks:
        forward = block.forward

        def again(x: Tensor, delta: Tensor | None = None, forward: Callable[..., Pair] = forward) -> Pair:
            return checkpoint(forward, x, delta, use_reentrant=reentrant)  # type: ignore[no-any-return]

        block.forward = again


def recompute_sublayers(model: SigmaLLM, reentrant: bool) -> None:
    """Each half of a block in a backward of its own."""
    for block in model.blocks:

        def again(x: Tensor, delta: Tensor | None = None, block: Any = block) -> Pair:
            x = x if delta is None else x + delta
            x = x + checkpoint(block.mix, x, use_reentrant=reentrant)
            return x, checkpoint(block.feed, x, use_reentrant=reentrant)

        block.forward = again


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["nested", "hooks"])
@pytest.mark.parametrize("wrap", [recompute_blocks, recompute_sublayers])
def test_recomputed_blocks_release_too(wrap: Callable[[SigmaLLM, bool], None], reentrant: bool, weights: str) -> None:
    """`use_reentrant` runs backward on a block inside the outer backward."""
    ordinary, released = both(weights=weights)
    for s in (ordinary, released):
        wrap(s.model, reentrant)
    check_equal(ordinary, released, 3)
    assert released.watch.most_units == 1


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_blocks_release_too() -> None:
    ordinary, released = both()
    for s in (ordinary, released):
        s.model.compile_blocks("aot_eager")
    check_equal(ordinary, released, 3)
    assert released.watch.most_units == 1


def test_a_parameter_with_no_part_in_the_loss_is_left_alone() -> None:
    ordinary, released = both()
    for s in (ordinary, released):
        half: Any = s.model.blocks[0]
        half._mixed = lambda u, keep: 0 * u  # of a unit, all but the norm
        s.model.blocks[2].forward = lambda x, delta=None, keep=None: (x, delta)  # a whole one
    for i in range(3):
        assert ordinary.step(i).applied
        assert released.step(i).applied
    assert_same(ordinary, released)
    assert all(p.grad is None for p in released.model.parameters())


def test_a_frozen_parameter_is_not_waited_for() -> None:
    ordinary, released = both()
    for s in (ordinary, released):
        s.model.blocks[1].requires_grad_(False)
    config = OptimizerConfig(grad_clip=0.0)
    released.update = ReleasedUpdate(
        released.model.parameter_groups(0.1), released.model.update_units(), config, C3OConfig(), "cpu"
    )
    for i in range(2):
        ordinary.step(i)
        released.step(i)
    assert released.parameters() == ordinary.parameters()
    assert released.watch.most_units == 1


def test_a_gradient_that_comes_after_its_unit_has_stepped_is_an_error() -> None:
    """A matrix used by two blocks that are differentiated apart has two gradients in one step."""
    shared = nn.Parameter(torch.ones(3))
    other = nn.Parameter(torch.ones(3))
    groups = [{"params": [shared, other], "weight_decay": 0.0, "name": "vector"}]
    update = ReleasedUpdate(groups, [[shared], [other]], OptimizerConfig(grad_clip=0.0), C3OConfig(), "cpu")

    def part(x: Tensor) -> Tensor:
        return checkpoint(lambda y: y * shared, x, use_reentrant=True)  # type: ignore[no-any-return]

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="after its unit was updated"):
        update.backward((part(part(x)) * other).sum())


# -- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_of_two_units_never_exist_together(tied: bool, weights: str) -> None:
    ordinary, released = both(tied=tied, weights=weights)
    watches = [ordinary.watch, released.watch]
    units = released.model.update_units()
    largest = max(sum(p.nbytes for p in unit) for unit in units)
    for i in range(2):
        ordinary.step(i)
        released.step(i)
        assert all(p.grad is None for p in released.model.parameters())
    assert [w.seen for w in watches] == [2 * len(list(released.model.parameters()))] * 2
    assert watches[1].most_units == 1
    assert watches[1].most_bytes <= largest
    assert watches[0].most_units == len(units)  # the watch does see them
    assert watches[0].most_bytes == sum(p.nbytes for p in ordinary.model.parameters())


@pytest.mark.gpu
@on_gpu_only
@pytest.mark.parametrize("weights", WEIGHTS)
def test_cuda_backward_never_holds_more_than_one_units_gradients(weights: str) -> None:
    """Wide blocks and few tokens: gradients are nearly all that backward allocates."""
    config = SigmaConfig(d_model=1024, n_layers=12, n_heads=8, vocab_size=1024, loss_chunk_tokens=64)
    peaks = []
    for released in (False, True):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = SigmaLLM(config, weights_dtype=WEIGHTS[weights])
        settings = OptimizerConfig(grad_clip=0.0)
        groups = model.parameter_groups(0.1)
        update: AnyUpdate
        if released:
            update = ReleasedUpdate(groups, model.update_units(), settings, C3OConfig(), "cuda")
        else:
            update = Update(build_optimizer(groups, settings, C3OConfig(), "cuda"), settings)
        update.make_capturable()
        text = torch.randint(1024, (1, 65), device="cuda")
        for _ in range(3):
            with torch.autocast("cuda", torch.bfloat16, enabled=weights == "bf16"):  # no casts that backward would free
                loss = model.loss(text[:, :-1], text[:, 1:])
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            update.backward(loss)
            peaks.append(torch.cuda.max_memory_allocated() - before)
            update.step(loss.detach())
            update.zero_grad()
        all_gradients = sum(p.nbytes for p in model.parameters())
        largest = max(sum(p.nbytes for p in unit) for unit in model.update_units())
        del model, update, groups, loss
    assert peaks[2] > 0.8 * all_gradients
    assert peaks[5] < largest + 0.1 * all_gradients, (peaks, largest, all_gradients)


# -- what is not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["c3o", "c3o-credit", "adamw", "muon"])
@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later"])
def test_a_bad_loss_changes_nothing(rule: str, first: bool) -> None:
    ordinary, s = both(**RULES[rule])
    if not first:
        for t in (ordinary, s):
            t.step(0)
    before, state = s.parameters(), flat(s.update.state_dict())
    loss = s.loss(1)
    s.update.backward(loss * float("nan"))
    result = s.update.step(loss.detach())
    assert not result.applied
    assert s.parameters() == before
    assert first or flat(s.update.state_dict()) == state
    for i in range(2, 4):
        for t in (ordinary, s):
            assert t.step(i).applied
    assert s.parameters() == ordinary.parameters()


def check_bad_gradient(s: Side, spoilt: int) -> None:
    s.step(0)
    before = s.parameters()
    names = [name for name, _ in s.model.named_parameters()]
    handle = s.model.blocks[spoilt].mlp.down.weight.register_hook(lambda g: g * float("inf"))  # type: ignore[union-attr]
    result = s.step(1)
    assert not result.applied
    assert not torch.isfinite(result.grad_norm)
    # Later layers come first in backward, and are done.
    done = {n for n in names if n.startswith(tuple(f"blocks.{i}." for i in range(spoilt + 1, 4)))} | {
        "final_norm.weight"
    }
    changed = {n for n, a, b in zip(names, before, s.parameters(), strict=True) if a != b}
    assert changed == done
    handle.remove()
    assert s.step(2).applied
    assert all(torch.isfinite(p).all() for p in s.model.parameters())


@pytest.mark.parametrize("rule", ["c3o", "c3o-credit", "adamw", "muon"])
def test_a_bad_gradient_stops_its_unit_and_those_after_it(rule: str) -> None:
    check_bad_gradient(side(True, **RULES[rule]), spoilt=1)


@pytest.mark.gpu
@on_gpu_only
@pytest.mark.parametrize("rule", ["c3o", "adamw"])
def test_cuda_a_bad_gradient_stops_its_unit_and_those_after_it(rule: str) -> None:
    check_bad_gradient(side(True, device="cuda", **RULES[rule]), spoilt=1)


@pytest.mark.gpu
@on_gpu_only
@pytest.mark.parametrize("rule", ["c3o", "adamw"])
def test_cuda_never_synchronises(rule: str) -> None:
    s = side(True, device="cuda", **RULES[rule])
    s.update.make_capturable()
    s.step(0)
    texts = [torch.randint(300, (2, 25), device="cuda") for _ in range(2)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr, text in zip((1e-3, 2e-3), texts, strict=True):
            s.update.set_lr(lr)
            loss = s.model.loss(text[:, :-1], text[:, 1:])
            s.update.backward(loss)
            result = s.update.step(loss.detach())
            s.update.metrics_tensor()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.applied


@pytest.mark.gpu
@on_gpu_only
@pytest.mark.parametrize("rule", ["c3o", "adamw"])
def test_cuda_graph_replays_the_released_step(rule: str) -> None:
    """Captured and replayed under a changing learning rate, against eager steps: the same bits."""
    eager, captured = (side(True, device="cuda", **RULES[rule]) for _ in range(2))
    eager.update.make_capturable()
    text = torch.randint(300, (2, 25), generator=torch.Generator().manual_seed(0)).cuda()

    def work(s: Side) -> UpdateResult:
        loss = s.model.loss(text[:, :-1], text[:, 1:])
        s.update.backward(loss)
        return s.update.step(loss.detach())

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(2):
            captured.update.rehearse(captured.model.loss(text[:, :-1], text[:, 1:]))
        captured.update.make_capturable()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = work(captured)
    assert all(p.grad is None for p in captured.model.parameters())
    for i in range(4):
        for s in (eager, captured):
            s.update.set_lr(1e-2 / (i + 1))
        graph.replay()
        want = work(eager)
        assert torch.equal(result.grad_norm, want.grad_norm)
        assert result.applied
    assert_same(eager, captured)


# -- state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rule", ["c3o-credit", "c3o-skip-bf16-state", "adamw", "muon"])
def test_a_run_resumes_with_or_without_release(rule: str, weights: str) -> None:
    whole = side(False, weights=weights, **RULES[rule])
    for i in range(6):
        whole.step(i)
    for order in ((False, True, False), (True, False, True)):
        saved: Any = None
        for turn, released in enumerate(order):
            part = side(released, weights=weights, **RULES[rule])
            if saved is not None:
                part.model.load_state_dict(saved[0])
                part.update.load_state_dict(saved[1])
            for i in range(2 * turn, 2 * turn + 2):
                part.step(i)
            saved = copy.deepcopy((part.model.state_dict(), part.update.state_dict()))
        assert_same(whole, part)


@pytest.mark.gpu
@on_gpu_only
@pytest.mark.parametrize("rule", ["c3o", "adamw"])
def test_cuda_state_of_a_capturable_update_resumes_anywhere(rule: str) -> None:
    ordinary, released = both(device="cuda", **RULES[rule])
    for s in (ordinary, released):
        s.update.make_capturable()
        s.step(0)
    assert_same(ordinary, released)
    saved = copy.deepcopy(ordinary.update.state_dict())
    assert {type(group["lr"]) for group in saved["param_groups"]} == {float}
    for s in (ordinary, released):
        s.update.load_state_dict(copy.deepcopy(saved))  # PyTorch's optimizers step in what they were given
        s.step(1)
    assert_same(ordinary, released)
    side(True, **RULES[rule]).update.load_state_dict(saved)


def test_nothing_outlives_its_owner() -> None:
    """Hooks are held by parameters where Python's collector does not see them."""
    part = side(True)
    part.step(0)
    alive = weakref.ref(part.model), weakref.ref(part.update)
    del part
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_a_state_of_other_groups_is_refused() -> None:
    saved = side(False, tied=False).update.state_dict()
    with pytest.raises(ValueError, match="other parameter groups"):
        side(True).update.load_state_dict(saved)


# -- use -------------------------------------------------------------------------------------------------------


def test_rehearsal_frees_gradients_and_changes_nothing() -> None:
    s = side(True)
    before = s.parameters()
    s.update.rehearse(s.loss(0))
    assert s.watch.seen
    assert s.watch.most_units == 1
    assert s.parameters() == before
    assert all(p.grad is None for p in s.model.parameters())
    assert s.update.state_dict()["state"] == {}


def test_another_backward_is_not_touched() -> None:
    s = side(True)
    s.loss(0).backward()
    assert all(p.grad is not None for p in s.model.parameters())
    s.update.zero_grad()
    assert all(p.grad is None for p in s.model.parameters())
    with pytest.raises(ValueError, match="no gradients"):
        s.update.step(torch.zeros(()))


def test_an_error_inside_backward_leaves_the_next_step_whole() -> None:
    ordinary, s = both()

    def fail(grad: Tensor) -> Tensor:
        raise RuntimeError("out of something")

    handle = s.model.embedding.weight.register_hook(fail)
    start = copy.deepcopy(s.model.state_dict()), copy.deepcopy(s.update.state_dict())
    with pytest.raises(RuntimeError, match="out of something"):
        s.step(0)
    handle.remove()
    s.update.zero_grad()
    s.model.load_state_dict(start[0])
    for unit in s.update._units:  # type: ignore[union-attr]
        unit.update.optimizer.state.clear()
    for i in range(2):
        ordinary.step(i)
        s.step(i)
    assert s.parameters() == ordinary.parameters()


def test_units_must_cover_the_model_and_clipping_by_norm_is_refused() -> None:
    model = SigmaLLM(TINY)
    groups, units = model.parameter_groups(0.1), model.update_units()
    config = OptimizerConfig(grad_clip=0.0)
    for wrong in (units[1:], [*units, units[0]]):
        with pytest.raises(ValueError, match="one unit"):
            ReleasedUpdate(groups, wrong, config, C3OConfig(), "cpu")
    with pytest.raises(ValueError, match="norm of all gradients"):
        ReleasedUpdate(groups, units, OptimizerConfig(), C3OConfig(), "cpu")
    with pytest.raises(ValueError, match="empty"):
        ReleasedUpdate([*groups, {"params": [], "name": "vector"}], units, config, C3OConfig(), "cpu")


def test_not_capturable_without_a_gpu() -> None:
    update = side(True).update
    assert not update.capturable
    with pytest.raises(RuntimeError, match=r"captured|graph"):
        update.make_capturable()


@pytest.mark.parametrize(
    ("optimizer", "training", "reason"),
    [
        (OptimizerConfig(gradient_release=True), TrainingConfig(), "--grad-clip-mode value or --grad-clip 0"),
        (OptimizerConfig(gradient_release=True, grad_clip=0.0), TrainingConfig(grad_accum=2), "--grad-accum 1"),
    ],
)
def test_what_cannot_be_had_is_refused(optimizer: OptimizerConfig, training: TrainingConfig, reason: str) -> None:
    with pytest.raises(UserError, match=f"--gradient-release.*{reason}"):
        TrainConfig(optimizer=optimizer, training=training).validate()
    allowed = dataclasses.replace(optimizer, grad_clip_mode="value")
    TrainConfig(optimizer=allowed).validate()
