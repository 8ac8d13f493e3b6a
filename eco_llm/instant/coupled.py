"""`coupled`: two streams from which every earlier state follows, bit for bit.

    forward   (a, b) → (b, a + f(b))        for every sub-layer f in turn     (leapfrog; RevNet, arXiv 1707.04585)
    inverse   (b, c) → (c − f(b), b)

One evaluation of f in backward serves both the inverse and the vector-Jacobian product. Streams are float32 on a grid
(`ops/grid`), where adding and subtracting are exact, and f is the same computation both times (`replay`), so the state
that backward reconstructs is that of forward. Kept: the two last states, whatever the depth, and of every other state
its checksums (8 bytes for 4096 numbers), compared before a block's last gradient is made.

Rounding to the grid, by half a step at most, has derivative 1 here (a straight-through estimate).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.instant.replay import Setting, SubLayer, back_propagate
from eco_llm.instant.verification import Gate
from eco_llm.ops.grid import advance, checksums, retreat, snap


class Layer(Protocol):
    """A block as the memory modes see it: two sub-layers, each a pure function of x [B, T, D]."""

    @property
    def sub_layers(self) -> tuple[SubLayer, SubLayer]:
        """(norm → mixer, norm → MLP), without the residual sums."""


def start(x: Tensor) -> tuple[Tensor, Tensor]:
    """The streams before the first block: both the embedding [B, T, D], on the grid."""
    x = snap(x).contiguous() + 0.0  # a sum never gives -0.0, so the start must not hold one
    return x, x


def coupled_values(blocks: Sequence[Layer], x: Tensor) -> Tensor:
    """The coupled stack, for inference: x [B, T, D] -> the sum of its two last states."""
    a, b = start(x)
    for block in blocks:
        for f in block.sub_layers:
            a, b = b, a + snap(f(b))
    return a + b


class _Coupled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Sequence[Layer], gate: Gate, setting: Setting) -> tuple[Tensor, Tensor]:
        a, b = start(x)
        sums = [checksums(b)] * 2  # of every state, in order
        for block in blocks:
            for f in block.sub_layers:
                c, seen = advance(a, setting.value(f, b))
                a, b = b, c
                sums.append(seen)
        del sums[-2:]  # of the states that are kept
        ctx.blocks, ctx.gate, ctx.setting, ctx.type = blocks, gate, setting, x.dtype
        ctx.save_for_backward(*sums)
        # Not among them: autograd would hold the last states until backward returns. Detached: an output that its own
        # node holds would never die.
        ctx.last = a.detach(), b.detach()
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sums = list(ctx.saved_tensors)
        if ctx.last is None:
            raise RuntimeError("coupled: backward ran before, and the states it started from are gone")
        (a, b), ctx.last = ctx.last, None
        da, db = gradients
        for index in reversed(range(len(ctx.blocks))):
            mix, feed = ctx.blocks[index].sub_layers
            for f in (feed, mix):
                b, c = a, b
                leaf, y = ctx.setting.record(f, b)
                a, rebuilt = retreat(c, y.detach())
                # Before gradients are made: with a block's last one, gradient release applies the block's update.
                ctx.gate.expect_equal(index, sums.pop(), rebuilt)
                da, db = db, da + back_propagate(leaf, y, db)
                del leaf, y
        return (da + db).to(ctx.type), None, None, None


def coupled(blocks: Sequence[Layer], x: Tensor, gate: Gate) -> Tensor:
    """The coupled stack, for training: x [B, T, D] -> the sum of its two last states [B, T, D], at least float32."""
    a, b = cast(tuple[Tensor, Tensor], _Coupled.apply(x, blocks, gate, Setting.now(x)))
    return a + b


class _Advance(torch.autograd.Function):
    """`advance` with derivative 1 in both arguments."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, y: Tensor) -> Tensor:
        ctx.type = y.dtype
        return advance(a, y)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0].to(ctx.type)


class _Snap(torch.autograd.Function):
    """`snap` with derivative 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.type = x.dtype
        return start(x)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].to(ctx.type)


def coupled_stored(blocks: Sequence[Layer], x: Tensor, keep: Callable[[SubLayer, Tensor], Tensor]) -> Tensor:
    """The same network without reconstruction: the fallback after a trip, and the judge in tests.

    Args:
        keep: how f is applied to a state: `recompute` keeps the state alone; `lambda f, x: f(x.view_as(x))` everything.
            (Without the view, what f sends back to x along several ways would be added to the stream's gradient one by
            one, and floating-point sums depend on their order.)
    """
    x = cast(Tensor, _Snap.apply(x))
    a, b = x.view_as(x), x.view_as(x)
    for block in blocks:
        for f in block.sub_layers:
            a, b = b, cast(Tensor, _Advance.apply(a, keep(f, b)))
    return a + b
