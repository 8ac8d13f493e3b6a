"""`fixed-point`: undo y = x + f(x) by iteration (i-ResNet, arXiv 1811.00995).

    x_0 = y,   x_{k+1} = y − f(x_k)         converges like c^k where f shrinks distances by a factor c < 1

No layer is forced to shrink distances. Pre-norm blocks come to do so by themselves, since the stream that f's norm
divides by grows with depth and training; the first block of a stack does not. So each block is probed between steps
(`iterations_needed`): one that would need more than the allowed iterations is recomputed instead. Within a step the
counts are fixed, and the gate compares, per sub-layer, the residual |x + f(x) − y| / |y| at the x that was found, which
backward evaluates anyway; and per block, some rows of its input that forward put by, with what was found for them:
the residual alone does not see errors add up along a run.

Kept for a run of blocks: its last output, and ROWS rows of each block's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eco_llm.instant.replay import Setting, SubLayer, back_propagate
from eco_llm.instant.verification import Gate

ROWS = 64
"""Rows of a block's input that are kept to measure the error of what is reconstructed."""
_TINY = 1e-30  # keeps 0/0 of an all-zero stream at 0


class Layer(Protocol):
    """A block as it is inverted: two sub-layers, each a pure function of x [B, T, D]."""

    @property
    def sub_layers(self) -> tuple[SubLayer, SubLayer]:
        """(norm → mixer, norm → MLP), without the residual sums."""


def _rows(x: Tensor) -> Tensor:
    """Evenly spaced rows of x [B, T, D], at most ROWS of them: a copy [R, D]."""
    flat = x.flatten(0, 1)
    return flat[:: -(-flat.shape[0] // ROWS)].clone()


def relative_error(found: Tensor, truth: Tensor) -> Tensor:
    """|found − truth| / |truth|, 0-dim, at least float32."""
    wide = torch.promote_types(truth.dtype, torch.float32)
    return torch.linalg.vector_norm(found - truth, dtype=wide) / (torch.linalg.vector_norm(truth, dtype=wide) + _TINY)


def invert(f: SubLayer, y: Tensor, iterations: int, setting: Setting) -> Tensor:
    """x with x + f(x) ≈ y after so many iterations. x and y [B, T, D]."""
    x = y
    for _ in range(iterations):
        x = y - setting.value(f, x)
    return x


class Run:
    """Neighbouring blocks that keep one output between them.

    Args:
        first: number of the first block in the stack.
        blocks: the blocks.
        iterations: of each block, for (mix, feed).
        tolerance: the largest residual that passes; errors of a block's input may be as large for every sub-layer that
            was inverted on the way to it.
    """

    def __init__(
        self, first: int, blocks: Sequence[Layer], iterations: Sequence[tuple[int, int]], tolerance: float
    ) -> None:
        self.first, self.blocks, self.iterations, self.tolerance = first, blocks, iterations, tolerance


class _FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Run, gate: Gate, setting: Setting) -> Tensor:
        kept = []
        for block in run.blocks:
            kept.append(_rows(x))
            for f in block.sub_layers:
                x = x + setting.value(f, x)
        ctx.run, ctx.gate, ctx.setting = run, gate, setting
        ctx.save_for_backward(x, torch.stack(kept))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        y, kept = ctx.saved_tensors
        (dy,) = gradients
        run: Run = ctx.run
        gate: Gate = ctx.gate
        inverted = 0
        for place in reversed(range(len(run.blocks))):
            (mix, feed), (mixing, feeding) = run.blocks[place].sub_layers, run.iterations[place]
            for f, iterations, is_first in ((feed, feeding, False), (mix, mixing, True)):
                x = invert(f, y, iterations, ctx.setting)
                leaf, value = ctx.setting.record(f, x)
                inverted += 1
                gate.expect_residual(run.first + place, relative_error(x + value.detach(), y), run.tolerance)
                if is_first:  # before the block's last gradient: with it, gradient release applies the block's update
                    error = relative_error(_rows(x), kept[place])
                    gate.expect_error(run.first + place, error, inverted * run.tolerance)
                dy = dy + back_propagate(leaf, dy, value)
                y = x
                del leaf, value
        return dy, None, None, None


def fixed_point(run: Run, x: Tensor, gate: Gate) -> Tensor:
    """The run's blocks in turn, plain residual form: x [B, T, D] -> [B, T, D]."""
    return cast(Tensor, _FixedPoint.apply(x, run, gate, Setting.now(x)))


def errors_by_iteration(f: SubLayer, x: Tensor, most: int, setting: Setting) -> tuple[Tensor, Tensor]:
    """(y = x + f(x), [most] the larger of residual and error after 1, 2, … iterations of the inversion from y).

    x [B, T, D]; costs most + 2 evaluations of f. Nothing is read by the host.
    """
    y = x + setting.value(f, x)
    z, worst = y, []
    value = setting.value(f, z)
    for _ in range(most):
        z = y - value
        value = setting.value(f, z)
        worst.append(torch.maximum(relative_error(z, x), relative_error(z + value, y)))
    return y, torch.stack(worst)


def iterations_needed(errors: Sequence[float], limit: float) -> int | None:
    """The least number of iterations whose error is at most `limit`; None if there is none (NaN never is)."""
    return next((count for count, error in enumerate(errors, start=1) if error <= limit), None)
