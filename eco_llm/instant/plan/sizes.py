"""A job to plan, and the sizes that follow from its shape.

Shape legend: B batch, T tokens, M = B·T, D model width, V vocabulary, F MLP width; Mamba: I = H·P inner width, N state;
MLA: h heads of d channels, L latent, R rotary part. Sizes are bytes unless said otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from eco_llm.config import SigmaConfig
from eco_llm.errors import UserError
from eco_llm.runtime import compiling_pays

STATE_BYTES = {"fp32": 8.0, "bf16": 4.0, "int8": 2.0625, "int4": 1.0625}
"""C3O's two moments, bytes a parameter, scales included."""
STATE_ROW = 4096
"""Numbers of a tensor's moments are whole rows of so many."""
MOST_HEADS, PROGRAMS = 12, 132  # as ops.ssd.triton.MOST_HEADS_GRADIENT, and PROGRAMS_GRADIENT of an H200
TILE = 4096
"""Numbers of a coupled state that have one checksum: as ops.grid.TILE, which a test compares too."""
MAX_CHANNELS = 8192  # as ops.gated_norm.MAX_TRITON_CHANNELS; a test compares, for that module imports torch


@dataclass(frozen=True)
class Job:
    """What is to be trained, and how; everything that the memory of a step depends on."""

    model: SigmaConfig
    batch: int
    seq_len: int
    modes: tuple[str, ...]
    """Memory mode of every block, first to last."""
    grad_accum: int = 1
    optimizer: str = "c3o"
    """Lays its state out tensor by tensor (adamw), or in buffers over a group or a unit of gradient release (c3o)."""
    state_bytes: float = 8.0
    """C3O's state, bytes a parameter."""
    weight_bytes: int = 4
    """Of a number in a matrix."""
    error_bytes: int = 0
    """Kept beside a bf16 weight."""
    compute_bytes: int = 2
    """Of a number in a product: 2 bf16, 4 fp32."""
    compiled: bool | None = None
    """As `--torch-compile` says; None: where it pays."""
    graph: bool = True
    release: bool = False
    """A block's gradients are freed as soon as its update is made."""
    bits: int = 8
    """Of what `compress` stores."""
    evaluates: bool = True
    """Whether validation runs in the same process."""
    expandable: bool = False
    """Whether the allocator's segments grow (`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`)."""
    probed: bool = False
    """Whether `compress` measures, between steps, if 4 bits would do."""

    @property
    def tokens(self) -> int:
        """M."""
        return self.batch * self.seq_len

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled."""
        return compiling_pays(self.modes, captured=self.graph) if self.compiled is None else self.compiled

    @property
    def coupled(self) -> bool:
        """Whether the stack is of the two-stream form."""
        return "coupled" in self.modes

    def replace(self, **changes: object) -> Job:
        """The same job but for `changes`."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]  # names and types are the caller's

    def check(self) -> None:
        """Raise UserError for a shape whose kernels are not those that are planned for."""
        m = self.model
        if "mamba" not in m.mixer_pattern:
            return
        if m.mamba_inner_dim > MAX_CHANNELS:
            raise UserError(
                f"--d-model {m.d_model} × --mamba-expand {m.mamba_expand} is over {MAX_CHANNELS} channels, which the"
                " Triton kernels do not take; a plan is for them"
            )
        if m.mamba_head_dim % 64 or m.mamba_state_dim not in (16, 32, 64, 128):
            raise UserError(
                f"--mamba-head-dim {m.mamba_head_dim} and --mamba-state-dim {m.mamba_state_dim}: the Triton kernels"
                " take heads of multiples of 64 and states of 16, 32, 64 or 128; a plan is for them"
            )


@dataclass(frozen=True)
class Matrix:
    """One weight of two or more axes, or a vector."""

    rows: int
    columns: int

    @property
    def numbers(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Shapes:
    """Weights of a model, named as its modules are."""

    model: SigmaConfig

    def mamba(self) -> dict[str, Matrix]:
        """Matrices of a Mamba mixer."""
        m = self.model
        inner, state = m.mamba_inner_dim, m.mamba_state_dim
        return {
            "in_proj": Matrix(2 * inner + 2 * state + m.mamba_n_heads, m.d_model),
            "out_proj": Matrix(m.d_model, inner),
        }

    def mla(self) -> dict[str, Matrix]:
        """Matrices of an MLA mixer."""
        m = self.model
        width = m.n_heads * m.head_dim
        queries = (
            {"q_down": Matrix(m.q_latent_dim, m.d_model), "q_up": Matrix(width, m.q_latent_dim)}
            if m.q_latent_dim
            else {"q_proj": Matrix(width, m.d_model)}
        )
        return {
            **queries,
            "kv_down": Matrix(m.kv_latent_dim + m.rope_head_dim, m.d_model),
            "kv_up": Matrix(m.n_heads * (2 * m.head_dim - m.rope_head_dim), m.kv_latent_dim),
            "out_proj": Matrix(m.d_model, width),
        }

    def mlp(self) -> dict[str, Matrix]:
        """Matrices of a SwiGLU."""
        m = self.model
        return {"gate_up": Matrix(2 * m.mlp_dim, m.d_model), "down": Matrix(m.d_model, m.mlp_dim)}

    def vectors(self, mixer: str) -> list[int]:
        """Lengths of a block's float32 vectors: norms, biases, the convolution."""
        m = self.model
        norms = [m.d_model, m.d_model]
        if mixer == "mla":
            return [*norms, m.kv_latent_dim, *([m.q_latent_dim] if m.q_latent_dim else [])]
        channels = m.mamba_inner_dim + 2 * m.mamba_state_dim
        return [*norms, channels * m.mamba_conv_width, channels, *[m.mamba_n_heads] * 3, m.mamba_inner_dim]

    def mixer(self, kind: str) -> dict[str, Matrix]:
        """Matrices of a mixer of this kind."""
        return self.mla() if kind == "mla" else self.mamba()

    def block_matrices(self, kind: str) -> list[Matrix]:
        """All matrices of a block."""
        return [*self.mixer(kind).values(), *self.mlp().values()]

    def parameters(self) -> int:
        """Trainable numbers; a tied matrix counts once."""
        m = self.model
        total = m.vocab_size * m.d_model * (1 if m.tie_embeddings else 2) + m.d_model
        for kind in ("mamba", "mla"):
            one = sum(x.numbers for x in self.block_matrices(kind)) + sum(self.vectors(kind))
            total += m.mixer_pattern.count(kind) * one
        return total


@dataclass(frozen=True)
class Scan:
    """How the SSD kernels cut one mixer's problem (ops/ssd/triton.py `Shape`, for whole heads of 64·k channels)."""

    job: Job

    @property
    def block(self) -> int:
        return 32 if self.job.compute_bytes == 4 else 64

    @property
    def chunk(self) -> int:
        """Of the forward; backward knows chunks of one tile only."""
        pinned = self.job.model.mamba_chunk
        wanted = 64 if pinned == "auto" else int(pinned)
        return max(self.block, 1 << (min(wanted, 256).bit_length() - 1))

    def padded(self, chunk: int) -> int:
        """T in whole chunks."""
        return -(-self.job.seq_len // chunk) * chunk

    def decays(self, chunk: int) -> int:
        return 2 * self.job.batch * self.job.model.mamba_n_heads * self.padded(chunk) * 4

    def states(self, chunk: int) -> int:
        """States that enter each chunk."""
        m = self.job.model
        chunks = self.padded(chunk) // chunk
        return self.job.batch * chunks * m.mamba_inner_dim * m.mamba_state_dim * self.job.compute_bytes

    def shares(self) -> int:
        """Partial gradients of B and C that backward leaves: slices of heads that work on their own."""
        m = self.job.model
        slices = m.mamba_inner_dim // (32 if self.job.compute_bytes == 4 else 64)
        tiles = self.padded(self.block) // self.block
        best = 1
        for count in range(2, min(MOST_HEADS, slices) + 1):
            if slices % count == 0 and 3 * self.job.batch * tiles * (slices // count) >= PROGRAMS:
                best = count
        return slices // best


def round_to(value: float, multiple: int) -> int:
    """The nearest positive multiple."""
    return max(1, math.floor(value / multiple + 0.5)) * multiple
