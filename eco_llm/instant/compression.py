"""`compress`: what ops keep for backward, stored in 8 or 4 bits a number. Gradients are approximate, and unbiased in
what is stored, since rounding is stochastic.

- A block with a Mamba mixer runs once. Ops that can (`Keep`) write codes while they have the numbers in registers, and
  read them in backward; hooks of autograd pack what the others keep. Weights, and their casts, stay as they are, and
  so does what is small.
- An MLA mixer keeps its input alone, packed, or codes of its norm's result where kernels serve (`coded`). Backward
  makes latent, keys, values and attention again, but not the product behind attention, whose value nothing there reads.
- A tensor that two ops keep is stored once.
- 4 bits are never tried within a step: `Stack` probes between steps and stays with 8 until a probe allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from eco_llm.instant.replay import Setting, Twice, back_propagate
from eco_llm.ops.quantize import GROUP, Quantized, dequantize, quantization_error, quantize

_CODES = {torch.int8: 1, torch.uint8: 2}  # codes a byte; nothing else that ops keep has these types
_SMALL = 4096  # numbers; scales and launches would cost more than is saved


class Packed(NamedTuple):
    """A kept tensor: its numbers in the order of memory, and how they lay there."""

    numbers: Quantized
    shape: torch.Size
    stride: tuple[int, ...]


class Bytes:
    """What compression saved in one forward: bytes as bfloat16, and bytes stored. Host numbers."""

    def __init__(self) -> None:
        self.before = 0
        self.after = 0

    @property
    def ratio(self) -> float:
        """before / after, with what was taken for a weight; 1 if there was nothing."""
        return self.before / self.after if self.after else 1.0


class Packing(saved_tensors_hooks):
    """A context in which one block's forward runs: what its ops keep is packed.

    Args:
        bits: 8 or 4.
        draw: 0-dim integer tensor on the device, another value in every forward and for every block: the random
            numbers' counter.
        tokens: (B, T) of the block's input.
        weights: shapes of the block's parameters; a matrix of such a shape may be the cast of one and stays whole.
        sizes: adds up what was packed.
    """

    def __init__(
        self, bits: int, draw: Tensor, tokens: tuple[int, int], weights: Iterable[torch.Size], sizes: Bytes
    ) -> None:
        super().__init__(self._pack, _unpack)
        self._bits, self._draw, self._stream = bits, draw, 0
        self._tokens, self._weights, self._sizes = tokens, {tuple(shape) for shape in weights}, sizes
        # What was packed, with the tensors themselves: while they live no other tensor can have their address.
        self._seen: dict[tuple[Any, ...], tuple[Tensor, Quantized]] = {}

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._seen.clear()

    def _pack(self, x: Tensor) -> Tensor | Packed:
        if grows_with_the_batch(x, self._tokens):
            if not has_a_weights_shape(x, self._weights):
                return self.pack(x)
            self._sizes.before += 2 * x.numel()  # it may be the weight's cast, so it stays; the ratio shows it
            self._sizes.after += x.nbytes
        elif x.dtype in _CODES:
            count = x.numel() * _CODES[x.dtype]  # an op quantized them; its scales come by themselves
            self._sizes.before += 2 * count
            self._sizes.after += x.nbytes + 2 * (count // GROUP)
        # Detached: kept with its graph, what an op saves of its own output would keep that op alive, and itself.
        return x.detach()

    def pack(self, x: Tensor) -> Packed:
        """Store a dense tensor."""
        key = (x.data_ptr(), x.numel(), x.dtype, x._version)
        if key not in self._seen:
            numbers = quantize(_as_it_lies(x), self._bits, step=self._draw, stream=self._stream)
            self._stream += 1
            self._seen[key] = x.detach(), numbers
            self._sizes.before += 2 * x.numel()
            self._sizes.after += numbers.nbytes
        return Packed(self._seen[key][1], x.shape, x.stride())


def _unpack(kept: Tensor | Packed) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return dequantize(kept.numbers).as_strided(kept.shape, kept.stride)


def _as_it_lies(x: Tensor) -> Tensor:
    """The numbers of a dense tensor in the order of memory, [n]; no copy."""
    return x.detach().as_strided((x.numel(),), (1,))


def is_activation(x: Tensor, tokens: tuple[int, int], weights: set[tuple[int, ...]]) -> bool:
    """Whether a kept tensor is packed."""
    return grows_with_the_batch(x, tokens) and not has_a_weights_shape(x, weights)


def has_a_weights_shape(x: Tensor, weights: set[tuple[int, ...]]) -> bool:
    """Whether x may be the cast of a weight, or of its transpose."""
    return tuple(x.shape) in weights or tuple(reversed(x.shape)) in weights


def grows_with_the_batch(x: Tensor, tokens: tuple[int, int]) -> bool:
    """Whether a kept tensor is dense, of B·T rows by its shape, and large enough to be worth packing."""
    if not x.is_floating_point() or x.numel() < _SMALL or isinstance(x, torch.nn.Parameter):
        return False
    batch, time = tokens
    leads = x.ndim >= 3 and x.shape[:2] == (batch, time)
    heads = x.ndim == 4 and (x.shape[0], x.shape[2]) == (batch, time)
    rows = x.ndim == 2 and x.shape[0] == batch * time
    if not (leads or heads or rows):
        return False
    return cast(bool, torch.ops.aten.is_non_overlapping_and_dense(x))


class FourBitError(saved_tensors_hooks):
    """A context like `Packing` that stores nothing but measures what 4 bits would lose."""

    def __init__(self, draw: Tensor, tokens: tuple[int, int], weights: Iterable[torch.Size]) -> None:
        super().__init__(self._measure, lambda x: x)
        self._tokens, self._weights, self._draw = tokens, {tuple(shape) for shape in weights}, draw
        self._sums = torch.zeros(2, dtype=torch.float32, device=draw.device)
        self._seen: dict[tuple[Any, ...], Tensor] = {}  # as in `Packing`: what two ops keep is stored once

    def _measure(self, x: Tensor) -> Tensor:
        key = (x.data_ptr(), x.numel(), x.dtype, x._version)
        if is_activation(x, self._tokens, self._weights) and key not in self._seen:
            self._seen[key] = x.detach()
            self.add(x)
        return x.detach()

    def add(self, x: Tensor) -> None:
        """Take a tensor in."""
        self._sums += torch.stack(quantization_error(_as_it_lies(x), 4, step=self._draw, stream=0))

    def relative(self) -> Tensor:
        """|what would be stored − what is| / |what is| over all tensors taken in, 0-dim."""
        self._seen.clear()
        return (self._sums[0] / self._sums[1].clamp(min=1e-30)).sqrt()


class _RecomputeFromPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Twice, pack: Callable[[Tensor], Packed], setting: Setting) -> Tensor:
        packed = pack(x.contiguous())
        ctx.f, ctx.setting, ctx.packed = f, setting, packed
        return setting.value(f.value, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.packed is None:
            raise RuntimeError("compress: backward ran before, and the input it started from is gone")
        x, ctx.packed = _unpack(ctx.packed), None
        leaf, ys = ctx.setting.record(ctx.f.gradients, x)
        return back_propagate(leaf, gradients[0], *ys), None, None, None


def recompute_from_packed(f: Twice, x: Tensor, packing: Packing) -> Tensor:
    """f.value(x), with x kept in few bits and f run again on what they give. x and result [B, T, D]."""
    return cast(Tensor, _RecomputeFromPacked.apply(x, f, packing.pack, Setting.now(x)))
