"""A small model with every kind of block, and how its gradients are compared."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from eco_llm.config import SigmaConfig
from eco_llm.model.sigma_llm import SigmaLLM

SHAPE = SigmaConfig(
    d_model=64, n_layers=6, n_heads=4, mamba_ratio=2, attention_ratio=1, mamba_head_dim=64, mamba_state_dim=16,
    kv_latent_dim=32, rope_head_dim=8, vocab_size=512, loss_chunk_tokens=64,
)  # fmt: skip

Build = Callable[..., SigmaLLM]


def loss_and_gradients(
    model: SigmaLLM, batch: tuple[Tensor, Tensor], *, bf16: bool = False, passes: int = 1
) -> dict[str, Tensor]:
    """The loss of the last pass and the gradients of all of them added up, as accumulation does."""
    model.zero_grad()
    model.stack.prepare(batch[0].device)
    model.stack.begin_step()
    for _ in range(passes):
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=bf16):
            loss = model.loss(*batch)
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return {"loss": loss.detach()} | gradients


def worst_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error in norm; tensors under a thousandth of all together are compared with that share."""
    everything = sum(want.double().norm().item() ** 2 for name, want in expected.items() if name != "loss") ** 0.5
    return max(
        ((actual[name].double() - want.double()).norm() / want.double().norm().clamp(min=1e-3 * everything)).item()
        for name, want in expected.items()
    )


def total_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative error in norm of all gradients as one vector."""
    squares = [
        ((actual[name].double() - want.double()).square().sum(), want.double().square().sum())
        for name, want in expected.items()
        if name != "loss"
    ]
    return (sum(e.item() for e, _ in squares) / sum(w.item() for _, w in squares)) ** 0.5


def kept_bytes(model: SigmaLLM, forward: Callable[[], tuple[Tensor, Tensor | None]]) -> int:
    """Bytes, weights apart, that autograd still holds for what the stack gave, by its own hooks."""
    alive: list[weakref.ref[Held]] = []

    class Held:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    def pack(x: Tensor) -> Held:
        held = Held(x.detach())  # with its graph it could hold itself
        alive.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.x):
        x, delta = forward()
    assert all(t.requires_grad for t in (x, delta) if t is not None)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = [h.x.untyped_storage() for h in (ref() for ref in alive) if h is not None]
    return sum({s.data_ptr(): s.nbytes() for s in held if s.data_ptr() not in weights}.values())
