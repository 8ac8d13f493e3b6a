"""Running a sub-layer again in backward, as the same computation.

A compiled function has two graphs: one for inference, one that also keeps what backward needs. They may be fused
differently and differ in the last bit, so every run here, in forward too, is the one with gradients enabled; where
nothing is to be kept its graph is dropped at once. It costs the memory of one sub-layer's activations, for a moment.

A run for gradients alone leaves out what only the value needs, its last product first of all (`Twice`). That part is
outside of what is compiled, so that the rest is still one graph for both runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

SubLayer = Callable[[Tensor], Tensor]
Result = TypeVar("Result")


class Twice(NamedTuple):
    """A function of x that forward runs for its value, and backward once more for its gradients."""

    value: SubLayer
    gradients: Callable[[Tensor], tuple[Tensor, ...]]
    """Tensors through which the value's gradient goes back as if they added up to it. Their numbers are not read, and
    may be NaN."""

    @classmethod
    def alike(cls, f: SubLayer) -> Twice:
        """Of an f that knows no shorter way to its gradients than its value."""
        return cls(f, lambda x: (f(x),))


@dataclass(frozen=True)
class Setting:
    """The autocast state of a forward pass, restored when backward runs parts of it again."""

    device_type: str
    autocast: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, x: Tensor) -> Setting:
        """That of the caller, for tensors on the device of `x`."""
        kind = x.device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Gradients enabled, autocast as it was. Its cache of cast weights is off: it would keep them until forward
        ends, and hand backward casts whose graph is gone."""
        with (
            torch.enable_grad(),
            torch.autocast(self.device_type, self.dtype, enabled=self.autocast, cache_enabled=False),
        ):
            yield

    def value(self, f: SubLayer, x: Tensor) -> Tensor:
        """f(x), of which nothing is kept. x and result [B, T, D]."""
        with self.restored():
            return f(x.detach().requires_grad_()).detach()

    def record(self, f: Callable[[Tensor], Result], x: Tensor) -> tuple[Tensor, Result]:
        """(x as a leaf, f of it with its graph): what `torch.autograd.backward` can then go through."""
        leaf = x.detach().requires_grad_()
        with self.restored():
            return leaf, f(leaf)


def back_propagate(leaf: Tensor, gradient: Tensor, *ys: Tensor) -> Tensor:
    """The gradient that reaches `leaf` when `gradient` reaches each y. Parameters' gradients are accumulated where they
    belong at once, so that hooks on them (gradient release) run block by block."""
    torch.autograd.backward(ys, [gradient.to(y.dtype) for y in ys])
    assert leaf.grad is not None
    return leaf.grad
