"""Names for blocks in a profiler's trace: `eco/block_07_mamba` while a block computes, `…_backward` for its gradient.

Only hooks are added, so what is computed is what is computed without them. Which calls are named is the mode's affair:
where backward runs a block again (recompute, compress, coupled, fixed-point), that call is a range of the first name
inside the phase `eco/backward`, and the gradient follows it. A compiled block is one call, and the range is around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.profiler import record_function

from eco_llm.instant.compression import FourBitError
from eco_llm.instant.fixed_point import Layer
from eco_llm.instant.replay import SubLayer, Twice
from eco_llm.ops.add_up import Ahead
from eco_llm.ops.quantize import Keep


class NamedBlock:
    """A block (or one sub-layer of it) whose calls and gradients are named ranges.

    The gradient's range opens before the node that made the output, and closes when the input's gradient is complete.
    Hooks of a tensor run before those of the node that made it, so a block's range closes before that of the one below
    opens. Gradients of weights may still be added up after it.
    """

    def __init__(self, block: Any, name: str, call: Callable[..., Any] | None = None) -> None:
        self._block: Layer = block
        self._name = name
        self._call: Any = call or block

    def __call__(self, x: Tensor, *more: Any) -> Any:
        """As the block, or the part of it; x [B, T, D] requires a gradient, or its gradient has no name."""
        ranges = _Open(f"{self._name}_backward")
        delta = more[0] if more and isinstance(more[0], Tensor) else None
        if x.requires_grad:
            # Of a pair (x, delta) the node that made delta is the first that backward comes to, below and above; of x
            # given twice the mixer's is the last.
            (x if delta is None else delta).register_hook(ranges.close)
        with record_function(self._name):
            result = self._call(x, *more)
        y = result[-1] if isinstance(result, tuple) else result
        if x.requires_grad and y.grad_fn is not None:
            y.grad_fn.register_prehook(ranges.open)
        return result

    @property
    def sub_layers(self) -> tuple[SubLayer, SubLayer]:
        """Both halves, under the block's name."""
        mix, feed = self._block.sub_layers
        return NamedBlock(self._block, self._name, mix), NamedBlock(self._block, self._name, feed)

    def change(self, x: Tensor, again: Tensor, ahead: Ahead | None = None) -> tuple[Tensor, ...]:
        """The block's, under its name."""
        call = NamedBlock(self._block, self._name, self._block.change)  # type: ignore[attr-defined]  # as below
        result: tuple[Tensor, ...] = call(x, again, ahead)
        return result

    @property
    def whole(self) -> Twice:
        """The block's, under its name."""
        return self._twice("whole")

    @property
    def mixing(self) -> Twice:
        """The block's, under its name."""
        return self._twice("mixing")

    def _twice(self, name: str) -> Twice:
        return Twice(*(NamedBlock(self._block, self._name, f) for f in getattr(self._block, name)))

    def writes_codes(self, x: Tensor, keep: Keep) -> bool:
        """The block's answer."""
        return bool(self._block.writes_codes(x, keep))  # type: ignore[attr-defined]  # a sub-layer's is not asked

    def coded(self, x: Tensor, delta: Tensor | None, keep: Keep) -> tuple[Tensor, Tensor]:
        """The block's, under its name."""
        call = NamedBlock(self._block, self._name, self._block.coded)  # type: ignore[attr-defined]  # as above
        result: tuple[Tensor, Tensor] = call(x, delta, keep)
        return result

    def watched(self, x: Tensor, seen: FourBitError) -> Tensor:
        """The block's; a probe has no place in a trace."""
        result: Tensor = self._block.watched(x, seen)  # type: ignore[attr-defined]  # a sub-layer's is not asked
        return result

    def parameters(self) -> Iterator[nn.Parameter]:
        """The block's."""
        return iter(self._block.parameters())  # type: ignore[attr-defined]  # a sub-layer's is not asked


class _Open:
    """A range that hooks open and close, on the thread that runs backward."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._range: record_function | None = None

    def open(self, gradients: Any) -> None:
        """Before the output's node runs."""
        self._range = record_function(self._name)
        self._range.__enter__()

    def close(self, gradient: Tensor) -> None:
        """Once the input's gradient is there."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


def named(blocks: Any, mixers: tuple[str, ...]) -> list[NamedBlock]:
    """Every block under its number and kind."""
    return [
        NamedBlock(block, f"eco/block_{index:02d}_{mixer}")
        for index, (block, mixer) in enumerate(zip(blocks, mixers, strict=True))
    ]
