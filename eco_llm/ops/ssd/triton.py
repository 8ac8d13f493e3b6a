"""Launchers of the SSD kernels: plain functions on tensors, no autograd. Maths: README.md beside this file.

Shapes as in `eco_llm.ops.ssd.ssd`. Channels are the last axis and contiguous; rows (tokens) may have any stride, so
that slices of a wider buffer go in and out without a copy. Nothing here waits for the device or adds in an order
that may change from run to run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from eco_llm.ops.rows import multiprocessors
from eco_llm.ops.ssd import triton_kernels as kernels
from eco_llm.ops.ssd.operator import tile_and_chunk

# (warps, stages) of each kernel; the most heads of a program, which share the scores C·B (output) or a share of dB and
# dC (gradient), and how many programs a multiprocessor must be left for that. Chosen by measurement on an H200:
# docs/LOG.md. The plan of memory knows the gradient's, for an H200: instant/plan/sizes.py.
WALK, OUTPUT, GRADIENT = (4, 3), (4, 2), (4, 2)
MOST_HEADS_OUTPUT, MOST_HEADS_GRADIENT = 8, 12
PROGRAMS_OUTPUT, PROGRAMS_GRADIENT = 2.0, 1.0
PROGRAMS_WALK, PROGRAMS_NARROW_WALK = 2.5, 1.25
"""Of parts that have 64 rows of the state or fewer, and of those that have fewer columns too."""
OF_AN_H200 = 132
"""Its multiprocessors, which stand for those of no GPU: interpreted kernels are cut as they were measured."""
OUTPUT_REGISTERS = 168
"""Of a thread of the output kernel, bf16 and chunks of one tile: three programs a multiprocessor. For the default
profile the compiler would take 196 (sm_90), and spills nothing with these; it would with longer chunks or float32."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one problem and how it is cut: `heads` slices of `width` channels, tiles of `block` tokens."""

    batch: int
    time: int
    heads: int
    width: int
    split: int
    groups: int
    state: int
    block: int
    chunk: int
    precision: str
    processors: int
    """Multiprocessors of the device."""

    @property
    def chunks(self) -> int:
        return -(-self.time // self.chunk)

    @property
    def padded(self) -> int:
        return self.chunks * self.chunk

    @property
    def tiles(self) -> int:
        return self.padded // self.block

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups

    def heads_per_program(self, roles: int, most: int, programs: float) -> int:
        """The largest divisor of a group's heads, up to `most`, that leaves so many programs a multiprocessor."""
        best = 1
        for count in range(2, min(most, self.heads_per_group) + 1):
            left = roles * self.batch * self.tiles * (self.heads // count)
            if self.heads_per_group % count == 0 and left >= programs * self.processors:
                best = count
        return best

    def walk_tile(self, directions: int) -> tuple[int, int]:
        """(rows, columns) of the state [N, P] that a program walks: as large as leaves enough programs.

        Parts of 64 rows come first: near-square parts read least, for a part reads its rows of B and columns of x.
        """
        rows, columns = self.state, self.width

        def programs() -> float:
            parts = (self.state // rows) * (self.width // columns)
            return self.batch * self.heads * directions * parts / self.processors

        while rows > 64 and programs() < PROGRAMS_WALK:  # products of fewer rows would leave warps idle
            rows //= 2
        while columns > 16 and programs() < PROGRAMS_NARROW_WALK:
            columns //= 2
        return rows, columns


def shape_of(x: Tensor, B: Tensor, chunk_size: int) -> Shape:
    """How the kernels cut x [B, T, H, P] with B [B, T, G, N].

    A head is cut into slices of at most 64 channels (float32: 32), its tokens into tiles and chunks (`tile_and_chunk`).
    """
    batch, time, heads, width = x.shape
    groups, state = B.shape[2:]
    wide = x.dtype == torch.float32
    block, chunk = tile_and_chunk(chunk_size, x.dtype)
    part = 32 if wide else 64
    split = width // part
    precision = "tf32x3" if wide else "tf32"  # three TF32 products are a float32 one; bf16 operands ignore it
    processors = multiprocessors(x.device, OF_AN_H200)
    return Shape(batch, time, heads * split, part, split, groups, state, block, chunk, precision, processors)


def _rows(x: Tensor) -> tuple[int, int]:
    """Strides of batch and token of [B, T, …] whose other axes must be packed."""
    expected = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size > 1 and stride != expected:
            raise ValueError(f"channels must be contiguous, got shape {tuple(x.shape)}, strides {x.stride()}")
        expected *= size
    return x.stride(0), x.stride(1)


def decays(raw: Tensor, bias: Tensor | None, A: Tensor, s: Shape, *, of_logs: bool = False) -> Tensor:
    """[2, B, H, Tp] float32, Tp being T rounded up to whole chunks: dt = softplus(raw + bias), or raw itself where
    `bias` is None, and the sums of dt·A from the start of each chunk. With `of_logs` A is given as log(−A).
    """
    heads = s.heads // s.split
    both = torch.empty(2, s.batch, heads, s.padded, dtype=torch.float32, device=raw.device)
    kernels.decay_kernel[(s.chunks, s.batch)](
        raw, bias, A, *both.unbind(), s.time, heads, s.padded, *_rows(raw),
        CHUNK=s.chunk, HEADS=triton.next_power_of_2(heads), SOFTPLUS=bias is not None, OF_LOGS=of_logs, num_warps=4,
    )  # fmt: skip
    return both


def _walk(
    s: Shape, x: Tensor, B: Tensor, d: Tensor, *, initial: Tensor | None = None, final: Tensor | None = None,
    dy: Tensor | None = None, C: Tensor | None = None, d_final: Tensor | None = None, d_initial: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """States that enter each chunk [B, chunks, heads, N, P]; with `dy`, also the gradients of those that leave it."""
    initial, d_final = (None if state is None else state.contiguous() for state in (initial, d_final))
    states = torch.empty(s.batch, s.chunks, s.heads, s.state, s.width, dtype=x.dtype, device=x.device)
    d_states = None if dy is None else torch.empty_like(states)
    directions = 1 if dy is None else 2
    rows, columns = s.walk_tile(directions)
    kernels.walk_kernel[(s.width // columns * (s.state // rows), s.batch * s.heads, directions)](
        x, B, x if dy is None else dy, B if C is None else C, *d.unbind(), states,
        states if d_states is None else d_states, initial, final, d_final, d_initial,
        s.time, s.padded, s.heads, s.tiles, *_rows(x), *_rows(B),
        *_rows(x if dy is None else dy), *_rows(B if C is None else C),
        P=s.width, N=s.state, COLUMNS=columns, ROWS=rows, BLOCK=s.block, SUB=s.chunk // s.block, SPLIT=s.split,
        HEADS_PER_GROUP=s.heads_per_group, HAS_INITIAL=initial is not None, HAS_FINAL=final is not None,
        HAS_D_FINAL=d_final is not None, HAS_D_INITIAL=d_initial is not None, PRECISION=s.precision,
        num_warps=WALK[0], num_stages=WALK[1],
    )  # fmt: skip
    return states, d_states


def forward(
    x: Tensor, d: Tensor, B: Tensor, C: Tensor, D: Tensor | None, s: Shape, *, initial: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    """y [B, T, H, P] in the type of x, and the last state [B, H, P, N] float32 if `final`."""
    last = None
    if final:
        public = (s.batch, s.heads // s.split, s.width * s.split, s.state)
        last = torch.empty(public, dtype=torch.float32, device=x.device)
    states, _ = _walk(s, x, B, d, initial=initial, final=last)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    per_program = s.heads_per_program(1, MOST_HEADS_OUTPUT, PROGRAMS_OUTPUT)
    kernels.output_kernel[(s.tiles, s.heads // per_program, s.batch)](
        x, B, C, *d.unbind(), states, D, y, s.time, s.padded, s.heads, s.tiles,
        *_rows(x), *_rows(B), *_rows(C), *_rows(y),
        P=s.width, N=s.state, BLOCK=s.block, SUB=s.chunk // s.block, SPLIT=s.split, HEADS=per_program,
        HEADS_PER_GROUP=s.heads_per_group, HAS_D=D is not None, PRECISION=s.precision,
        num_warps=OUTPUT[0], num_stages=OUTPUT[1],
        maxnreg=OUTPUT_REGISTERS if x.dtype == torch.bfloat16 and s.chunk == s.block else None,
    )  # fmt: skip
    return y, last


class Gradients(NamedTuple):
    """What `backward` returns, besides what it writes into `d_raw`; None where there was no such input."""

    dx: Tensor
    """[B, T, H, P], the type of x."""
    d_bc: Tensor
    """[S, B, T, 2·G·N] float32: S shares whose sum is (dB, dC), each [G·N] wide."""
    partial: Tensor
    """[B · chunks, 3, H] float32: a chunk's shares of the gradients of A (or of log(−A)), of dt's bias (without
    softplus: of the sum of the steps) and of D (0 if there is none); their sum over the first axis is left to the
    caller."""
    d_initial: Tensor | None
    """[B, H, P, N] float32."""


def backward(
    dy: Tensor, x: Tensor, raw: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    s: Shape, *, initial: Tensor | None, d_final: Tensor | None, d_raw: Tensor, d: Tensor | None = None,
    of_logs: bool = False,
) -> Gradients:  # fmt: skip
    """Gradients of `forward`; states are made again, nothing but its inputs is needed.

    Args:
        dy: [B, T, H, P], the type of x.
        d_raw: [B, T, H], where the gradient of `raw` goes (any row stride, any float type).
        d: the decays, if they are at hand.
        of_logs: A is given as log(−A), and the gradient is that of the logarithm.
    """
    heads = s.heads // s.split
    if s.chunk != s.block:
        # Backward knows chunks of one tile only. The result is the same, and longer chunks were slower. A kernel
        # with loops over a chunk's tiles ran into an invalid address as Triton 3.6 compiled it (docs/LOG.md).
        s, d = dataclasses.replace(s, chunk=s.block), None
    d = decays(raw, bias, A, s, of_logs=of_logs) if d is None else d
    d_initial = None
    if initial is not None:
        d_initial = torch.empty(initial.shape, dtype=torch.float32, device=x.device)
    states, d_states = _walk(s, x, B, d, initial=initial, dy=dy, C=C, d_final=d_final, d_initial=d_initial)
    per_program = s.heads_per_program(3, MOST_HEADS_GRADIENT, PROGRAMS_GRADIENT)
    shares = s.heads_per_group // per_program
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=x.device)

    d_bc = empty(shares, s.batch, s.time, 2 * s.groups * s.state)
    vectors = empty(3, s.batch, s.heads, s.padded)
    carry, skip = empty(s.batch, s.tiles, s.heads), empty(s.batch, s.tiles, s.heads)
    kernels.gradient_kernel[(3 * s.tiles, s.heads // per_program, s.batch)](
        x, B, C, dy, *d.unbind(), states, d_states, D, dx, d_bc, *vectors.unbind(), carry, skip,
        s.time, s.padded, s.heads, s.tiles, s.batch, s.groups,
        *_rows(x), *_rows(B), *_rows(C), *_rows(dy), *_rows(dx),
        P=s.width, N=s.state, BLOCK=s.block, SPLIT=s.split, HEADS=per_program,
        HEADS_PER_GROUP=s.heads_per_group, HAS_D=D is not None, PRECISION=s.precision,
        num_warps=GRADIENT[0], num_stages=GRADIENT[1],
    )  # fmt: skip
    partial = empty(s.batch * s.chunks, 3, heads)
    if D is None:
        partial[:, 2] = 0.0
    kernels.finish_kernel[(s.chunks, s.batch)](
        raw, bias, A, d[0], *vectors.unbind(), carry, skip, d_raw, partial,
        s.time, heads, s.padded, s.chunks, *_rows(raw), *_rows(d_raw),
        CHUNK=s.chunk, HEADS=triton.next_power_of_2(heads), SPLIT=s.split,
        SOFTPLUS=bias is not None, HAS_D=D is not None, OF_LOGS=of_logs, num_warps=4,
    )  # fmt: skip
    return Gradients(dx, d_bc, partial, d_initial)
