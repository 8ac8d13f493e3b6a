"""What the parts of a block allocate, keep and free, forward and backward, in the order in which the code does.

Each function mirrors one of the model's: `ops/mamba_mixer/triton.py`, `ops/ssd/triton.py`, `ops/swiglu/triton.py`, the
first and last with `coded.py` beside them, `ops/mla_heads/triton.py`, `model/mla.py`, `model/block.py`. Change both;
tests/instant/test_plan_layers.py runs the real operators on fake tensors and compares what they keep,
benchmarks/plan_accuracy.py compares whole steps with a GPU's own count.

Compiled blocks (`Job.compiles`): the elementwise parts are fused, so their intermediates never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from eco_llm.instant.plan.allocator import Block, CachingAllocator
from eco_llm.instant.plan.sizes import Job, Scan, Shapes

Kind = Literal["weights", "gradients", "optimizer", "activations", "temporaries"]
KINDS: tuple[Kind, ...] = ("weights", "gradients", "optimizer", "activations", "temporaries")
F32 = 4
BITS = {8: 8.25, 4: 4.25}
"""Of a number that `compress` stores, with its share of the scales."""
GROUP = 64  # as ops.quantize.GROUP, which a test compares too


class Buffer:
    """A live allocation of some kind."""

    __slots__ = ("block", "kind")

    def __init__(self, block: Block, kind: Kind) -> None:
        self.block, self.kind = block, kind


class Tape:
    """Plays allocations and remembers the worst moment."""

    def __init__(self, expandable: bool = False) -> None:
        self.allocator = CachingAllocator(expandable)
        self.pool = ""
        self.live: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.peak = 0
        self.at_peak: dict[Kind, int] = dict(self.live)

    def take(self, size: float, kind: Kind = "temporaries") -> Buffer:
        """Allocate `size` bytes."""
        buffer = Buffer(self.allocator.take(int(size), self.pool), kind)
        self.live[kind] += buffer.block.size
        if self.allocator.allocated > self.peak:
            self.peak = self.allocator.allocated
            self.at_peak = dict(self.live)
        return buffer

    def give(self, *buffers: Buffer) -> None:
        """Free them."""
        for buffer in buffers:
            self.live[buffer.kind] -= buffer.block.size
            self.allocator.give(buffer.block)


class Parts:
    """Sub-layers of one job on one tape. M, D, … as in sizes.py; `kind` is what kept tensors count as."""

    def __init__(self, job: Job, tape: Tape) -> None:
        self.job, self.tape = job, tape
        self.shapes, self.scan = Shapes(job.model), Scan(job)
        m = job.model
        self.M, self.D, self.c, self.w = job.tokens, m.d_model, job.compute_bytes, job.weight_bytes
        self.inner, self.state, self.heads = m.mamba_inner_dim, m.mamba_state_dim, m.mamba_n_heads
        self.gradients: list[Buffer] = []
        """Of weights, since the list was last emptied; a step decides what becomes of them."""
        self.transient = False
        """Whether a weight's gradient is added to one that exists, and freed."""

    # -- small things --

    def wide(self, kind: Kind = "temporaries") -> Buffer:
        """[B, T, D] float32."""
        return self.tape.take(F32 * self.M * self.D, kind)

    def narrow(self, kind: Kind = "temporaries") -> Buffer:
        """[B, T, D] in the compute type."""
        return self.tape.take(self.c * self.M * self.D, kind)

    def cast(self, numbers: int, kind: Kind) -> list[Buffer]:
        """A weight in the compute type, where it has another."""
        return [] if self.w == self.c else [self.tape.take(self.c * numbers, kind)]

    def gradient(self, numbers: int, width: int | None = None) -> Buffer:
        """Of a weight, made by a product in the weight's own type."""
        buffer = self.tape.take((width or self.w) * numbers, "temporaries" if self.transient else "gradients")
        self.gradients.append(buffer)
        return buffer

    def packed(self, numbers: int) -> Buffer:
        """What `compress` stores of so many."""
        return self.tape.take(numbers * BITS[self.job.bits] / 8, "activations")

    def vectors(self, mixer: str) -> None:
        """Gradients of a block's vectors, which come as it ends."""
        for length in self.shapes.vectors(mixer):
            self.gradient(length, F32)

    @property
    def writes_codes(self) -> bool:
        """Whether ops quantize for themselves under `compress`; else hooks do."""
        m = self.job.model
        inner = self.inner if "mamba" in m.mixer_pattern else 0
        return all(width % GROUP == 0 for width in (self.D, m.mlp_dim, inner))

    # -- Mamba mixer --

    def mamba_forward(self, kind: Kind, codes: bool = False) -> tuple[Buffer, list[Buffer]]:
        """(result, kept): zxbcdt, y, decays, casts of the weights. With `codes`, those of y, z and xBC, and the raw
        steps, activations, in the places of the first two.
        """
        take, give, M, c, s = self.tape.take, self.tape.give, self.M, self.c, self.scan
        w_in, w_out = self.shapes.mamba().values()
        casts = self.cast(w_in.numbers, kind) + self.cast(w_out.numbers, kind)
        own: Kind = "temporaries" if codes else kind
        channels = self.inner + 2 * self.state
        zxbcdt = take(c * M * w_in.rows, own)
        written = [self.packed(M * channels)] if codes else []
        conv = take(c * M * channels)
        decays = take(s.decays(s.chunk), kind)
        states = take(s.states(s.chunk))
        y = take(c * M * self.inner, own)
        give(states, conv)
        gated = take(c * M * self.inner)
        if codes:
            written += [self.packed(M * self.inner), self.packed(M * self.inner)]
            written.append(take(c * M * self.heads, "activations"))
            give(zxbcdt, y)
        out = self.narrow(kind)
        give(gated)
        return out, [*(written or (zxbcdt, y)), decays, *casts]

    def mamba_backward(self, norm: Callable[[], None] | None = None) -> Buffer:
        """The gradient of u; what forward kept is the caller's to free. `norm` takes what u is had from, where codes
        were kept.
        """
        take, give, M, c, s = self.tape.take, self.tape.give, self.M, self.c, self.scan
        w_in, w_out = self.shapes.mamba().values()
        channels = self.inner + 2 * self.state
        d_zxbcdt, d_gated, gated = take(c * M * w_in.rows), take(c * M * self.inner), take(c * M * self.inner)
        self.gradient(w_out.numbers)
        give(gated)
        coded = channels % GROUP == 0 and self.job.model.mamba_conv_width <= 8  # the convolution reads codes
        xbc = [take(c * M * channels)] if norm and not coded else []
        conv = take(c * M * channels)
        tile = s.block
        again = [] if s.chunk == tile else [take(s.decays(tile))]
        states, d_states = take(s.states(tile)), take(s.states(tile))
        dx = take(c * M * self.inner)
        d_bc = take(F32 * s.shares() * M * 2 * self.state)
        padded, slices = s.padded(tile), self.inner // (32 if c == F32 else 64)
        vectors = take(F32 * 3 * self.job.batch * slices * padded)
        give(states, d_states, vectors, *again)
        conv_partials = take(F32 * channels * (self.job.model.mamba_conv_width + 1) * -(-M // _CONV_STRIP))
        d_u = self.narrow()
        if norm:
            norm()
        self.gradient(w_in.numbers)
        give(d_zxbcdt, d_gated, conv, dx, d_bc, conv_partials, *xbc)
        return d_u

    # -- SwiGLU --

    def mlp_forward(self, kind: Kind, codes: bool = False) -> tuple[Buffer, list[Buffer]]:
        """(result, kept): a [M, 2F], casts of the weights. With `codes`, those of a, an activation, in its place."""
        w_up, w_down = self.shapes.mlp().values()
        casts = self.cast(w_up.numbers, kind) + self.cast(w_down.numbers, kind)
        a = self.tape.take(self.c * self.M * w_up.rows, "temporaries" if codes else kind)
        h = self.tape.take(self.c * self.M * w_down.columns)
        if codes:
            wide, a = a, self.packed(self.M * w_up.rows)
            self.tape.give(wide)
        y = self.narrow()
        self.tape.give(h)
        return y, [a, *casts]

    def mlp_unread(self, kind: Kind) -> list[Buffer]:
        """`mlp_forward` without its value: what is kept."""
        w_up, w_down = self.shapes.mlp().values()
        casts = self.cast(w_up.numbers, kind) + self.cast(w_down.numbers, kind)
        return [self.tape.take(self.c * self.M * w_up.rows, kind), *casts]

    def mlp_foreseen(self) -> tuple[Buffer, list[Buffer]]:
        """`mlp_forward` where the result's gradient is known: (result, kept), h and the gradient of a among these."""
        w_up, w_down = self.shapes.mlp().values()
        casts, of_down = self.cast(w_up.numbers, "temporaries"), self.cast(w_down.numbers, "temporaries")
        a = self.tape.take(self.c * self.M * w_up.rows)
        h, da = self.tape.take(self.c * self.M * w_down.columns), self.tape.take(self.c * self.M * w_up.rows)
        self.tape.give(a)
        y = self.narrow()
        self.tape.give(*of_down)
        return y, [da, h, *casts]

    def mlp_gradients(self) -> Buffer:
        """What is left of `mlp_backward` after `mlp_foreseen`; what that kept is the caller's to free."""
        w_up, w_down = self.shapes.mlp().values()
        self.gradient(w_down.numbers)
        self.gradient(w_up.numbers)
        return self.narrow()

    def mlp_backward(self, norm: Callable[[], None] | None = None) -> Buffer:
        """The gradient of x; `norm` takes what x is had from, where codes were kept."""
        w_up, w_down = self.shapes.mlp().values()
        dh = self.tape.take(self.c * self.M * w_down.columns)
        da = self.tape.take(self.c * self.M * w_up.rows)
        self.gradient(w_down.numbers)
        self.tape.give(dh)
        if norm:
            d_x = self.narrow()
            norm()
            self.gradient(w_up.numbers)
        else:
            self.gradient(w_up.numbers)
            d_x = self.narrow()
        self.tape.give(da)
        return d_x

    # -- MLA mixer --

    def mla_forward(self, kind: Kind) -> tuple[Buffer, list[Buffer]]:
        """(result, kept)."""
        kept = self.mla_unread(kind)
        return self.narrow(kind), kept

    def mla_unread(self, kind: Kind) -> list[Buffer]:
        """`mla_forward` without its value; kept: latents, queries, keys, values, attention's result, casts of the
        weights.
        """
        take, give, M, c, m = self.tape.take, self.tape.give, self.M, self.c, self.job.model
        width, weights = m.n_heads * m.head_dim, self.shapes.mla()
        kept = [b for w in weights.values() for b in self.cast(w.numbers, kind)]
        if m.q_latent_dim:
            kept += [take(c * M * m.q_latent_dim, kind), take(c * M * m.q_latent_dim, kind)]
        q = take(c * M * width)
        kept.append(take(c * M * weights["kv_down"].rows, kind))
        normed = take(c * M * m.kv_latent_dim)
        kv = take(c * M * weights["kv_up"].rows)
        give(normed)
        kept += [take(c * M * width, kind) for _ in range(3)]
        give(q, kv)
        kept += [take(c * M * width, kind), take(F32 * M * m.n_heads, kind)]  # attention and its log-sums
        return kept

    def mla_backward(self) -> Buffer:
        """The gradient of u."""
        take, give, M, c, m = self.tape.take, self.tape.give, self.M, self.c, self.job.model
        width, weights = m.n_heads * m.head_dim, self.shapes.mla()
        d_y = take(c * M * width)
        self._mla_gradient(weights["out_proj"].numbers)
        # Attention's backward adds up the gradient of q in float32.
        sums = take(F32 * M * width)
        d_heads = [take(c * M * width) for _ in range(3)]
        give(sums, d_y)
        d_q, d_down = take(c * M * width), take(c * M * weights["kv_down"].rows)
        d_kv, normed = take(c * M * weights["kv_up"].rows), take(c * M * m.kv_latent_dim)
        give(take(c * M * m.kv_latent_dim))  # the gradient of `normed`
        self.gradient(weights["kv_up"].numbers)
        give(d_kv, normed, *d_heads)
        self._mla_gradient(weights["kv_down"].numbers)
        d_u = self.narrow()
        give(d_down)
        for name in weights:
            if name.startswith("q"):
                self._mla_gradient(weights[name].numbers)
        second = self.narrow()
        give(d_q, second)
        return d_u

    def _mla_gradient(self, numbers: int) -> None:
        """Autocast's products give it in the compute type; then it is cast."""
        if self.w == self.c:
            self.gradient(numbers)
            return
        product = self.tape.take(self.c * numbers)
        self.gradient(numbers)
        self.tape.give(product)

    # -- sub-layers: norm → mixer, norm → MLP --

    def mixer_forward(self, mixer: str, kind: Kind) -> tuple[Buffer, list[Buffer]]:
        """A mixer of either kind."""
        return self.mla_forward(kind) if mixer == "mla" else self.mamba_forward(kind)

    def mixer_backward(self, mixer: str) -> Buffer:
        return self.mla_backward() if mixer == "mla" else self.mamba_backward()

    def normed(self, kind: Kind) -> list[Buffer]:
        """A norm's result in the compute type, and its statistics; uncompiled, its float32 result passes by."""
        statistics = self.tape.take(F32 * self.M, kind)
        if self.job.compiles or self.c == F32:
            return [statistics, self.narrow(kind)]
        passing = self.wide()
        u = self.narrow(kind)
        self.tape.give(passing)
        return [statistics, u]

    def sub_forward(self, part: str, kind: Kind) -> tuple[Buffer, list[Buffer]]:
        """`mix` of a mixer ("mamba", "mla") or `feed` ("mlp"): (result, kept). The input is the caller's."""
        kept = self.normed(kind)
        out, more = self.mlp_forward(kind) if part == "mlp" else self.mixer_forward(part, kind)
        return out, kept + more

    def sub_backward(self, part: str, kept: list[Buffer], into: Buffer | None = None) -> Buffer:
        """The gradient of the sub-layer's input, [B, T, D] float32; frees what forward kept.

        Args:
            into: a [B, T, D] float32 buffer whose place the result takes, where blocks are compiled.
        """
        dy = [] if self.c == F32 else [self.narrow()]
        d_u = self.mlp_backward() if part == "mlp" else self.mixer_backward(part)
        self.tape.give(*dy, *kept)
        passing = [] if self.job.compiles or self.c == F32 else [self.wide()]
        if passing:
            self.tape.give(d_u)
        d_x = into if into is not None and self.job.compiles else self.wide()
        self.tape.give(*(passing or [d_u]))
        if into is not None and d_x is not into:
            self.tape.give(into)
        return d_x

    # -- the same in a whole block, where norms make the residual sums (ops/add_norm) --

    def part_forward(self, part: str, kind: Kind) -> tuple[Buffer, list[Buffer]]:
        """A mixer, or the MLP, behind its norm: (result, kept, the norm's result included)."""
        u = self.narrow(kind)
        out, more = self.mlp_forward(kind) if part == "mlp" else self.mixer_forward(part, kind)
        return out, [u, *more]

    def part_backward(self, part: str, dy: list[Buffer], kept: list[Buffer]) -> Buffer:
        """The gradient of the norm's result, from dy, that of the part, where it has its own place; frees all."""
        d_u = self.mlp_backward() if part == "mlp" else self.mixer_backward(part)
        self.tape.give(*dy, *kept)
        return d_u

    def sum_backward(self, d_u: Buffer, kept: list[Buffer], delta: bool = True) -> tuple[Buffer, list[Buffer]]:
        """Of a sum and its norm: (the stream's gradient, that of what was added, in its type); frees d_u and kept."""
        dx = self.wide()
        narrowed = [self.narrow()] if delta and self.c != F32 else []
        self.tape.give(d_u, *kept)
        return dx, narrowed

    def coded_forward(self, part: str, added: bool) -> tuple[Buffer, list[Buffer], list[Buffer]]:
        """A sub-layer ("mamba", "mla", "mlp") whose ops, or norm alone, write codes: (result, the sum if anything was
        `added`, kept).
        """
        total = [self.wide()] if added else []
        u = self.narrow()
        kept = [self.tape.take(F32 * self.M, "activations"), self.packed(self.M * self.D)]
        if part == "mla":
            out, dropped = self.mla_forward("temporaries")
            self.tape.give(*dropped)
            more: list[Buffer] = []
        else:
            forward = self.mlp_forward if part == "mlp" else self.mamba_forward
            out, more = forward("activations", codes=True)
        self.tape.give(u)
        return out, total, kept + more

    def coded_backward(self, part: str, kept: list[Buffer], added: bool) -> list[Buffer]:
        """Gradients of the sub-layer's input: [B, T, D] float32, and in the compute type if anything was `added`; frees
        what forward kept.
        """
        found: list[Buffer] = []

        def norm() -> None:
            found.append(self.wide())
            if added and self.c != F32:
                found.append(self.narrow())

        if part == "mla":  # again, of what the codes give
            again = [self.narrow(), *self.mla_unread("temporaries")]
            d_u = self.mla_backward()
            self.tape.give(*again)
            norm()
        else:
            d_u = self.mlp_backward(norm) if part == "mlp" else self.mamba_backward(norm)
        self.tape.give(d_u, *kept)
        return found


_CONV_STRIP = 4 * 32
"""Tokens of one row of the convolution's partial sums: 4 strips of 8 to 64, of which the launcher chooses."""
