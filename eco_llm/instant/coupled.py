"""`coupled`: two streams from which every earlier state follows, bit for bit.

    forward   (a, b) → (b, a + Σ f(b))      for every step in turn            (leapfrog; RevNet, arXiv 1707.04585)
    inverse   (b, c) → (c − Σ f(b), b)

The f of a step are the sub-layers that read one state: the first mixer; then always a block's MLP and the next block's
mixer; at last the last MLP. So either stream receives what mixers and what MLPs write. (With a step for each sub-layer
one would receive all mixers and the other all MLPs, and loss is higher: docs/instant.md.)

One evaluation of f in backward serves both the inverse and the vector-Jacobian product, one f after the other, so that
no more than one sub-layer's activations are alive. States are int32 on a grid
(`ops/grid`), where what was added can always be subtracted again, and f, which reads their values in floating point, is
the same computation both times (`replay`), so the state that backward reconstructs is that of forward. Kept: the two
last states, whatever the depth, and of every other sum its checksums (8 bytes for 4096 numbers), compared before a
block's last gradient is made. While f runs, one value is alive, its input; backward has also made that of the state
before by the time the MLP's gradients are.

What is not finite, or out of the grid's range, is NaN in a value: what reads it is NaN, so the loss is, and the step is
refused. (Backward then rebuilds from other numbers, and the gate trips too; of a loss that is NaN that means nothing.)

Rounding to the grid, by half a step at most, has derivative 1 here (a straight-through estimate).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.instant.replay import Setting, SubLayer, back_propagate
from eco_llm.instant.verification import Gate
from eco_llm.ops.grid import advance, retreat, snap, values

T = TypeVar("T")


class Layer(Protocol):
    """A block as the memory modes see it: two sub-layers, each a pure function of x [B, T, D]."""

    @property
    def sub_layers(self) -> tuple[SubLayer, SubLayer]:
        """(norm → mixer, norm → MLP), without the residual sums."""


def _types(x: Tensor, setting: Setting) -> tuple[torch.dtype, torch.dtype]:
    """(of the stack's result and of gradients, of what sub-layers read).

    Under bf16 autocast they read bfloat16: their norm's result is rounded to that anyway, and half the bytes of every
    state's value are neither written nor read. The states themselves are as fine as ever. The price: the norm's gain is
    read in bfloat16 too, and a sub-layer's contribution to the stream's gradient is rounded once before it is added.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    narrow = setting.autocast and setting.dtype == torch.bfloat16 and wide == torch.float32
    return wide, torch.bfloat16 if narrow else wide


def _by_step(sub_layers: Sequence[T]) -> list[Sequence[T]]:
    """Sub-layers, mixer and MLP in turn as blocks have them, by the state that they read."""
    return [sub_layers[max(at - 1, 0) : at + 1] for at in range(0, len(sub_layers) + 1, 2)]


def coupled_values(sub_layers: Sequence[SubLayer], x: Tensor) -> Tensor:
    """The coupled stack, for inference: x [B, T, D] -> the sum of its two last states, at least float32.

    `sub_layers`: of all blocks, mixer and MLP in turn.
    """
    wide, read = _types(x, Setting.now(x))
    b, x, _ = snap(x, read)
    a = b
    for step in _by_step(sub_layers):
        c, x, _ = advance(a, [f(x) for f in step], read, checked=False)
        a, b = b, c
    # x − x: NaN where x is. What is NaN in the state before has reached x by the last sub-layer.
    return values(a, wide).add_(values(b, wide)).add_(x - x)


class _Coupled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Sequence[Layer], gate: Gate, setting: Setting) -> Tensor:
        ctx.blocks, ctx.gate, ctx.setting, ctx.type = blocks, gate, setting, x.dtype
        wide, ctx.read = _types(x, setting)
        *steps, last = _by_step([f for block in blocks for f in block.sub_layers])
        b, x, seen = snap(x, ctx.read)
        a, of_a, of_b = b, seen, seen
        sums = []  # of what backward rebuilds, in the order of forward
        for step in steps:
            c, x, (*between, seen) = advance(a, [setting.value(f, x) for f in step], ctx.read)
            sums += [of_a, *between]
            a, b, of_a, of_b = b, c, of_b, seen
        c, x, _ = advance(a, [setting.value(f, x) for f in last], wide)
        ctx.save_for_backward(*sums, of_a)
        ctx.last = b, c  # not saved: autograd would hold them until backward returns
        return x.add_(values(b, wide))  # NaN in the value of b has reached x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sums = list(ctx.saved_tensors)
        if ctx.last is None:
            raise RuntimeError("coupled: backward ran before, and the states it started from are gone")
        (b, c), ctx.last = ctx.last, None
        da = db = gradients[0]
        x = values(b, ctx.read)
        steps = _by_step([(index, f) for index, block in enumerate(ctx.blocks) for f in block.sub_layers])
        for step in reversed(steps):
            dc = db.to(ctx.read)  # of what every f of the step gives
            for index, f in reversed(step):
                leaf, y = ctx.setting.record(f, x)
                # Only what the step's first f leaves is a state. (The first state's value is made too, though nothing
                # reads it: one write a backward, against a kernel more.)
                c, before, rebuilt = retreat(c, y.detach(), ctx.read if f is step[0][1] else None)
                # Before gradients are made: with a block's last one, gradient release applies the block's update.
                ctx.gate.expect_equal(index, sums.pop(), rebuilt)
                da = da + back_propagate(leaf, dc, y)
                del leaf, y
            b, c, x = c, b, before
            da, db = db, da
        return (da + db).to(ctx.type), None, None, None


def coupled(blocks: Sequence[Layer], x: Tensor, gate: Gate) -> Tensor:
    """The coupled stack, for training: x [B, T, D] -> the sum of its two last states [B, T, D], at least float32."""
    return cast(Tensor, _Coupled.apply(x, blocks, gate, Setting.now(x)))


class _Advance(torch.autograd.Function):
    """`advance` of a state (q, its value), with derivative 1 in the value and in every y."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, x: Tensor, *ys: Tensor) -> tuple[Tensor, Tensor]:
        ctx.types = [y.dtype for y in ys]
        c, value, _ = advance(q, ys, x.dtype)
        ctx.mark_non_differentiable(c)
        ctx.set_materialize_grads(False)  # else zeros would be made for c
        return c, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, gradients[1], *(gradients[1].to(dtype) for dtype in ctx.types)


class _Snap(torch.autograd.Function):
    """`snap` with derivative 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.type = x.dtype
        q, value, _ = snap(x)
        ctx.mark_non_differentiable(q)
        ctx.set_materialize_grads(False)
        return q, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[1].to(ctx.type)


def coupled_stored(blocks: Sequence[Layer], x: Tensor, keep: Callable[[SubLayer, Tensor], Tensor]) -> Tensor:
    """The same network without reconstruction: the fallback after a trip, and the judge in tests.

    Args:
        keep: how f is applied to a state's value: `recompute` keeps that alone; `lambda f, x: f(x.view_as(x))`
            everything. (Without the view, what f sends back to x along several ways would be added to the stream's
            gradient one by one, and floating-point sums depend on their order.)
    """
    read = _types(x, Setting.now(x))[1]
    q, x = cast(tuple[Tensor, Tensor], _Snap.apply(x))
    a, b = (q, x.view_as(x)), (q, x.view_as(x))
    for step in _by_step([f for block in blocks for f in block.sub_layers]):
        ys = [keep(_reading(f, read), b[1]) for f in step]
        a, b = b, cast(tuple[Tensor, Tensor], _Advance.apply(*a, *ys))
    return a[1] + b[1]


def _reading(f: SubLayer, dtype: torch.dtype) -> SubLayer:
    return lambda x: f(x.to(dtype))
