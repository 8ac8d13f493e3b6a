"""`coupled`: two streams from which every earlier state follows, bit for bit.

    forward   (a, b) → (b, a + D(b))        for every block in turn           (leapfrog; RevNet, arXiv 1707.04585)
    inverse   (b, c) → (c − D(b), b)

D(b) is what the block adds to b: a plain residual block gives b + D(b). One evaluation of it in backward serves both
the inverse and the vector-Jacobian product. States are int32 on a grid (`ops/grid`), where what was added can always be
subtracted again, and D, which reads their values in floating point, is the same computation both times (`replay`), so
the state that backward reconstructs is that of forward. (With Triton the MLP's activation comes from another kernel the
second time, the one that makes its gradient; that both give the same bits a test checks, and the gate would show.)
Kept: the two last states, whatever the depth, and of every other state its checksums (8 bytes for 4096 numbers),
compared by the kernel that reconstructs it, before any gradient of the block is applied. While D runs, one value is
alive, its input; backward has also made that of the state before by the time gradients are.

What D's result receives is known before D runs again: it is the gradient of the state that D's result made. So blocks
take both ways over what they have in hand (`Ahead`).

What is not finite, or out of the grid's range, is NaN in a value: what reads it is NaN, so the loss is, and the step is
refused. (Backward then rebuilds from other numbers, and the gate trips too; of a loss that is NaN that means nothing.)

Rounding to the grid, by half a step at most, has derivative 1 here (a straight-through estimate).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.instant.replay import Setting, SubLayer
from eco_llm.instant.verification import Gate
from eco_llm.ops.add_up import Ahead, add_up
from eco_llm.ops.grid import advance, retreat, snap, values

Change = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""A pure function of x [B, T, D]: what is added to x, as summands of its shape. It is given x twice, for the MLP and
for the mixer, so that what these send back comes apart, and is added to the stream's gradient in one pass."""


class Changing(Protocol):
    """A block as `coupled` sees it."""

    def change(self, x: Tensor, again: Tensor, ahead: Ahead | None = None, /) -> tuple[Tensor, ...]:
        """A `Change`: what the block adds to x, the same bits with `ahead` as without.

        Args:
            ahead: given to the run in backward. Of its results, those that require a gradient receive `ahead.result`;
                where it took x or again through a `fork`, all of x's gradient comes to that one.
        """


def _types(x: Tensor, setting: Setting) -> tuple[torch.dtype, torch.dtype]:
    """(of the stack's result and of gradients, of what blocks read).

    Under bf16 autocast they read bfloat16: their norm's result is rounded to that anyway, and half the bytes of every
    state's value are neither written nor read. The states themselves are as fine as ever. The price: a block's
    contribution to the stream's gradient is rounded once before it is added.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    narrow = setting.autocast and setting.dtype == torch.bfloat16 and wide == torch.float32
    return wide, torch.bfloat16 if narrow else wide


def coupled_values(changes: Iterable[Change], x: Tensor) -> Tensor:
    """The coupled stack, for inference: x [B, T, D] -> the sum of its two last states, at least float32."""
    wide, read = _types(x, Setting.now(x))
    b, x, _ = snap(x, read)
    a = b
    for change in changes:
        c, x, _ = advance(a, *change(x, x), dtype=read, checked=False)
        a, b = b, c
    # x − x: NaN where x is. What is NaN in the state before has reached x by the last block.
    return values(a, wide).add_(values(b, wide)).add_(x - x)


class _Coupled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Sequence[Changing], gate: Gate, setting: Setting) -> Tensor:
        ctx.blocks, ctx.gate, ctx.setting, ctx.type = blocks, gate, setting, x.dtype
        wide, ctx.read = _types(x, setting)
        b, x, seen = snap(x, ctx.read)
        a, sums = b, [seen] * 2  # of every state, in order
        for block in blocks[:-1]:
            c, x, seen = advance(a, *_given(block, x, setting), dtype=ctx.read)
            a, b = b, c
            sums.append(seen)
        c, x, _ = advance(a, *_given(blocks[-1], x, setting), dtype=wide, beside=b)
        del sums[-1:]  # of the state that is kept beside the last, which has none
        ctx.save_for_backward(*sums)
        ctx.last = b, c  # not saved: autograd would hold them until backward returns
        return x  # NaN in the value of b has reached it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sums = list(ctx.saved_tensors)
        if ctx.last is None:
            raise RuntimeError("coupled: backward ran before, and the states it started from are gone")
        (b, c), ctx.last = ctx.last, None
        da = db = gradients[0]
        received = db.to(ctx.read)  # db as what made c takes it
        x = values(b, ctx.read)
        for index in reversed(range(len(ctx.blocks))):
            ahead = Ahead(received, da, ctx.read)
            leaves, ys = _recorded(ctx.blocks[index], x, ctx.setting, ahead)
            # The first state's value is made too, though nothing reads it: one write a step, against a kernel more.
            # Checked before gradients are made: with a block's last one, gradient release applies the block's update.
            a, x, _ = retreat(
                c, *(y.detach() for y in ys), dtype=ctx.read, seen=sums.pop(), flags=ctx.gate.flags(index)
            )
            b, c = a, b
            edges = [(torch.autograd.graph.get_gradient_edge(y), received.to(y.dtype)) for y in ys if y.requires_grad]
            del ys  # their places in the graph are enough; the MLP's result is freed, the mixer's when its norm is done
            torch.autograd.backward([edge for edge, _ in edges], [gradient for _, gradient in edges])
            total = ahead.total
            if total is None:
                of_mlp, of_mixer = (cast(Tensor, leaf.grad) for leaf in leaves)
                total, received = add_up(da, of_mlp, of_mixer, ctx.read)
                del of_mlp, of_mixer
            else:
                (received,) = (leaf.grad for leaf in leaves if leaf.grad is not None)
            da, db = db, total
            del leaves, edges, ahead
        return (da + db).to(ctx.type), None, None, None


def _recorded(
    block: Changing, x: Tensor, setting: Setting, ahead: Ahead | None = None
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """(x as leaves, the change of it with its graph)."""
    leaves = [x.detach().requires_grad_() for _ in range(2)]
    with setting.restored():
        return leaves, block.change(leaves[0], leaves[1], ahead)


def _given(block: Changing, x: Tensor, setting: Setting) -> list[Tensor]:
    """The change of x, of which nothing is kept."""
    return [y.detach() for y in _recorded(block, x, setting)[1]]


def coupled(blocks: Sequence[Changing], x: Tensor, gate: Gate) -> Tensor:
    """The coupled stack, for training: x [B, T, D] -> the sum of its two last states [B, T, D], at least float32."""
    return cast(Tensor, _Coupled.apply(x, blocks, gate, Setting.now(x)))


class _Advance(torch.autograd.Function):
    """`advance` of a state (q, its value), with derivative 1 in the value and in y."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.type = y.dtype
        c, value, _ = advance(q, y, dtype=x.dtype)
        ctx.mark_non_differentiable(c)
        ctx.set_materialize_grads(False)  # else zeros would be made for c
        return c, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, gradients[1], gradients[1].to(ctx.type)


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


def coupled_stored(blocks: Sequence[Changing], x: Tensor, keep: Callable[[SubLayer, Tensor], Tensor]) -> Tensor:
    """The same network without reconstruction: the fallback after a trip, and the judge in tests.

    Args:
        keep: how f, a block's change as one sum, is applied to a state's value: `recompute` keeps that alone;
            `lambda f, x: f(x.view_as(x))` everything. (Without the view, what f sends back to x along several ways
            would be added to the stream's gradient one by one, and floating-point sums depend on their order.)
    """
    wide, read = _types(x, Setting.now(x))
    q, x = cast(tuple[Tensor, Tensor], _Snap.apply(x))
    a, b = (q, x.view_as(x)), (q, x.view_as(x))
    for block in blocks:
        a, b = b, cast(tuple[Tensor, Tensor], _Advance.apply(*a, keep(_summed(block.change, read, wide), b[1])))
    return a[1] + b[1]


def _summed(change: Change, read: torch.dtype, wide: torch.dtype) -> SubLayer:
    def f(x: Tensor) -> Tensor:
        ys = change(*(x.view_as(x).to(read) for _ in range(2)))
        return functools.reduce(torch.add, (y.to(wide) for y in ys))

    return f
