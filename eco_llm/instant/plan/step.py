"""Training steps as a sequence of allocations, and the peak that it comes to. Modes: eco_llm/instant/*.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from eco_llm.config import validation_rows
from eco_llm.instant.plan.layers import F32, Buffer, Kind, Parts, Tape
from eco_llm.instant.plan.sizes import STATE_ROW, TILE, Job

GIB = 2**30
CUBLAS_WORKSPACE = 32 * 2**20
"""Of one (thread, stream) on Hopper; other cards take 8.1 MiB. Forward and backward run on threads of their own, a
captured step on a stream of its own."""
CONTEXT, GRAPH = round(0.76 * GIB), round(0.07 * GIB)
"""What a process takes outside the allocator: CUDA context, libraries, kernels; and a CUDA graph. An H200's."""
WARM_UPS = 2
"""Steps played on one allocator, for the first finds no gaps that an earlier one left; as many go before a graph."""
INVERSIONS = 3
"""Iterations of `fixed-point`, which the run chooses by itself: assumed."""
FORWARDS = {"none": 0.0, "compress": 0.0, "recompute": 0.82, "coupled": 1.0, "fixed-point": INVERSIONS + 1.0}
"""Extra forward work of a block in backward, roughly. Recomputed blocks leave out the MLP's last product: 18% of the
default profile's. `compress` runs only its MLA mixers again."""


@dataclass(frozen=True)
class Estimate:
    """What a job takes, bytes."""

    by_kind: dict[Kind, int]
    """At the peak of `torch.cuda.max_memory_allocated`, which is their sum."""
    reserved: int
    """What the allocator holds once validation has run too (`torch.cuda.max_memory_reserved`)."""
    extra_forwards: float
    """Forward passes over the whole stack that backward adds."""
    context: int
    """Outside the allocator."""

    @property
    def peak(self) -> int:
        """Of allocated memory."""
        return sum(self.by_kind.values())

    @property
    def total(self) -> int:
        """What must be free on the card."""
        return self.reserved + self.context

    @property
    def reserve(self) -> int:
        """What is needed beside the peak: the allocator's gaps, validation's memory, the CUDA context."""
        return self.total - self.peak

    @property
    def relative_cost(self) -> float:
        """Time of a step against one that keeps everything, if a backward is two forwards."""
        return (3.0 + self.extra_forwards) / 3.0


@dataclass
class Kept:
    """What a block keeps, by the half of the block that backward frees it with."""

    x: list[Buffer] = field(default_factory=list)
    mixer: list[Buffer] = field(default_factory=list)
    mlp: list[Buffer] = field(default_factory=list)
    mixed: list[Buffer] = field(default_factory=list)
    """What the mixer adds to x."""

    def all(self) -> list[Buffer]:
        return [*self.x, *self.mixer, *self.mlp, *self.mixed]


def estimate(job: Job) -> Estimate:
    """Play steps of `job`.

    Raises:
        UserError: a shape that the kernels planned for do not take.
    """
    job.check()
    # A block is recomputed until a probe has shown that it can be inverted, and again after a trip of the gate.
    forms = {job.modes, tuple("recompute" if mode == "fixed-point" else mode for mode in job.modes)}
    steps = [_Step(job.replace(modes=modes)) for modes in sorted(forms)]
    for step in steps:
        step.play()
    worst = max(steps, key=lambda step: step.tape.peak)
    reserved = max(step.tape.allocator.reserved for step in steps)
    extra = sum(FORWARDS[mode] for mode in job.modes) / len(job.modes)
    return Estimate(worst.tape.at_peak, reserved, extra, context_of(job))


def context_of(job: Job) -> int:
    """What the process takes outside the allocator."""
    return CONTEXT + (GRAPH if job.graph else 0)


class _Step:
    """The tape of one job."""

    def __init__(self, job: Job) -> None:
        self.job, self.tape = job, Tape(job.expandable)
        self.parts = Parts(job, self.tape)
        self.mixers = job.model.mixer_pattern
        self.outer: list[Buffer] = []  # the head's gradient, to which a tied table's is added at the very end
        self.finished: list[Buffer] = []  # gradients that wait for the optimizer
        self.workspaces: set[str] = set()  # threads that have one

    def play(self) -> None:
        """Everything a process does until it has trained and validated once."""
        tape = self.tape
        self._set_up()
        for _ in range(WARM_UPS):
            self._train()
            tape.give(*self.finished)
        if self.job.graph:
            tape.allocator.empty_cache()
            tape.pool = "graph"
            self._train()  # whose gradients stay where replays write them
            tape.pool = ""
            self.workspaces = set()  # those were of another stream
        if self.job.evaluates:
            self._validate()
        self._probe()

    def _numbers(self) -> list[list[tuple[int, bool]]]:
        """(numbers, whether it is a matrix) of every weight, by unit: embedding, blocks, final norm with the head."""
        m, shapes = self.job.model, self.parts.shapes
        table = (m.vocab_size * m.d_model, True)
        units = [[table]]
        for mixer in self.mixers:
            matrices = [(x.numbers, True) for x in shapes.block_matrices(mixer)]
            units.append(matrices + [(n, False) for n in shapes.vectors(mixer)])
        return [*units, [(m.d_model, False)] + ([] if m.tie_embeddings else [table])]

    def _weights(self) -> list[int]:
        """Bytes of every weight, in the order of the modules."""
        return [n * (self.parts.w if matrix else F32) for unit in self._numbers() for n, matrix in unit]

    def _set_up(self) -> None:
        """Weights, optimizer state, static inputs, workspaces."""
        tape, job, units = self.tape, self.job, self._numbers()
        for size in self._weights():
            tape.take(size, "weights")
        if job.optimizer == "adamw":
            arenas = [[weight] for unit in units for weight in unit]
        elif job.release:
            arenas = [[x for x in unit if x[1] == matrix] for unit in units for matrix in (True, False)]
        else:
            outer, inner = units[0] + [x for x in units[-1] if x[1]], [x for unit in units[1:] for x in unit]
            inner = inner if job.model.tie_embeddings else inner[:-1]
            arenas = [outer, *([x for x in inner if x[1] == matrix] for matrix in (True, False))]
        row = 1 if job.optimizer == "adamw" else STATE_ROW
        for arena in filter(None, arenas):
            numbers = sum(-(-n // row) * row for n, _ in arena)
            moment = job.state_bytes / 2
            if job.optimizer == "adamw":  # its moments have the type of their weight
                moment = self.parts.w if arena[0][1] else F32
            for _ in range(2):
                tape.take(numbers * moment, "optimizer")
            if job.error_bytes and arena[0][1]:
                tape.take(numbers * job.error_bytes, "optimizer")
        tape.take(2 * 8 * job.tokens * job.grad_accum)

    def _workspace(self, thread: str) -> None:
        """What cuBLAS takes at a thread's first product on a stream, and keeps."""
        if thread not in self.workspaces:
            self.workspaces.add(thread)
            self.tape.take(CUBLAS_WORKSPACE)

    # -- training --

    def _train(self) -> None:
        """One micro-step: forward, loss, backward. The update works in place."""
        self.finished = []
        if self.job.grad_accum > 1:  # the last micro-step finds the gradients of those before
            self.finished = [self.tape.take(size, "gradients") for size in self._weights()]
            self.parts.transient = True
        x = self.parts.wide("activations")
        self._workspace("forward")
        dx = self._coupled(x) if self.job.coupled else self._plain(x)
        self._embedding(dx)

    def _plain(self, x: Buffer) -> Buffer:
        tape, modes = self.tape, self.job.modes
        embedded, saved = x, []
        ends: list[Buffer] = []  # outputs of runs of fixed-point blocks
        delta: list[Buffer] = []  # what blocks that keep everything leave to their successor to add
        for i, mode in enumerate(modes):
            if mode == "none":
                y, added, kept = self._linked(self.mixers[i], "activations")
                tape.give(*(old for old in (x, *delta) if old not in (embedded, *ends)))
                delta = added
            else:
                x, delta = self._summed(x, delta), []
                y, kept = self._forward(self.mixers[i], mode, x)
                if mode != "recompute" and x not in (embedded, *ends):
                    tape.give(x)
                if x in ends:
                    kept.x = []  # the run before keeps it too, and frees it later
                if self._ends_run(i):
                    ends.append(y)
            x = y
            saved.append(kept)
        dx = self._head(x, delta, owned=x not in (embedded, *ends))
        self._workspace("backward")
        if modes[0] != "recompute":  # the caller of the stack held it
            tape.give(embedded)
        y = handed_in = x
        for i in reversed(range(len(saved))):
            if modes[i] == "fixed-point":
                if self._ends_run(i):
                    y, handed_in = ends[-1], dx
                y, dx = self._inverted(self.mixers[i], y, dx, held=(ends[-1], handed_in))
                if i == 0 or modes[i - 1] != "fixed-point":
                    tape.give(y, ends.pop(), handed_in)
            else:
                dx = self._backward(i, saved[i], dx)
            self._settle(self.mixers[i])
        return dx

    def _ends_run(self, i: int) -> bool:
        return self.job.modes[i] == "fixed-point" and self.job.modes[i + 1 : i + 2] != ("fixed-point",)

    def _settle(self, mixer: str) -> None:
        """A block's vectors get their gradients; what becomes of all of them when backward leaves it."""
        for length in self.parts.shapes.vectors(mixer) if mixer else []:
            self.parts.gradient(length, F32)
        self._finish(self.parts.gradients)
        self.parts.gradients = []

    def _finish(self, gradients: list[Buffer]) -> None:
        if self.parts.transient or self.job.release:
            self.tape.give(*gradients)
        else:
            self.finished += gradients

    def _head(self, x: Buffer, delta: list[Buffer] | None = None, *, owned: bool) -> Buffer:
        """Final sum and norm, product and loss, which makes its gradients in forward; then their backward. Frees delta,
        and x if owned.
        """
        m, tape, parts = self.job.model, self.tape, self.parts
        numbers = m.vocab_size * parts.D
        total, hidden = parts.wide(), parts.narrow()
        tape.give(*(delta or []), *([x] if owned else []))
        casts = parts.cast(numbers, "temporaries")
        logits, losses = tape.take(F32 * min(m.loss_chunk_tokens, parts.M) * m.vocab_size), tape.take(F32 * parts.M)
        d_hidden = parts.narrow()
        whole = parts.w == parts.c and m.loss_chunk_tokens >= parts.M  # one product makes it, in the weight's type
        d_weight = tape.take((parts.w if whole else F32) * numbers, "gradients")
        if parts.w != F32 and not whole:  # summed in float32, then rounded
            narrow = tape.take(parts.w * numbers, "gradients")
            tape.give(d_weight)
            d_weight = narrow
        tape.give(losses, logits, *casts, hidden)
        dx = parts.wide()
        narrowed = [parts.narrow()] if delta and parts.c != F32 else []
        tape.give(d_hidden, total, *narrowed)
        self.outer = [d_weight]
        return dx

    def _embedding(self, dx: Buffer) -> None:
        """The table's gradient: rows added to the head's, or a matrix of its own. Sorting takes 4 numbers a token."""
        m, tape, parts = self.job.model, self.tape, self.parts
        # A bf16 table's rows are rounded, then summed in float32.
        rows = [] if parts.w == F32 else [parts.narrow(), parts.wide(), parts.wide()]
        sort = tape.take(4 * 8 * parts.M)
        if not m.tie_embeddings:
            parts.gradient(m.vocab_size * parts.D)
        tape.give(sort, dx, *rows)
        parts.gradient(parts.D, F32)  # of the final norm
        self._settle("")
        self._finish(self.outer)

    # -- blocks of the plain residual form --

    def _forward(self, mixer: str, mode: str, x: Buffer) -> tuple[Buffer, Kept]:
        """(the block's output, what it keeps); its input, unless kept, is the caller's to free."""
        tape = self.tape
        if mode == "compress" and self.parts.writes_codes:
            return self._coded_forward(mixer)
        if mode == "recompute" or (mode == "compress" and mixer == "mamba"):
            y, delta, kept = self._linked(mixer, "temporaries")
            y = self._summed(y, delta)
        else:
            y, kept = self._residuals(mixer, "temporaries")
        if mode == "recompute":
            tape.give(*kept.all())
            kept = Kept(x=[x])
        elif mode == "compress":
            packed = self._packed(mixer)
            tape.give(*kept.all())
            kept = packed
        else:
            tape.give(*kept.all())
            kept = Kept()
        return y, kept

    def _linked(self, mixer: str, kind: Kind) -> tuple[Buffer, list[Buffer], Kept]:
        """A whole block: (the stream, what is still to be added to it, kept), the input being the caller's."""
        parts = self.parts
        y, kept = self._to_mlp(mixer, kind)
        fed, kept.mlp = parts.part_forward("mlp", kind)
        return y, [fed], kept

    def _to_mlp(self, mixer: str, kind: Kind) -> tuple[Buffer, Kept]:
        """The half of a block before the MLP's norm: (the stream, kept)."""
        parts = self.parts
        total = parts.wide(kind)  # of the input's, or a copy
        mixed, first = parts.part_forward(mixer, kind)
        return parts.wide("activations"), Kept(x=[total], mixer=first, mixed=[mixed])

    def _summed(self, x: Buffer, delta: list[Buffer]) -> Buffer:
        """x + delta, both given back; x itself if there is none."""
        if not delta:
            return x
        y = self.parts.wide("activations")
        self.tape.give(x, *delta)
        return y

    def _coded_forward(self, mixer: str) -> tuple[Buffer, Kept]:
        """`_forward` of a block under `compress` whose ops write codes."""
        parts, tape = self.parts, self.tape
        kept = Kept()
        mixed, _, kept.mixer = parts.coded_forward(mixer, added=False)
        fed, total, kept.mlp = parts.coded_forward("mlp", added=True)
        y = parts.wide("activations")
        tape.give(mixed, fed, *total)
        return y, kept

    def _coded_backward(self, mixer: str, kept: Kept, dy: Buffer) -> Buffer:
        """`_backward` of what `_coded_forward` kept."""
        parts, tape = self.parts, self.tape
        narrow = [] if parts.c == F32 else [parts.narrow()]
        middle = parts.coded_backward("mlp", kept.mlp, added=True)
        tape.give(dy, *narrow)
        (dx,) = parts.coded_backward(mixer, kept.mixer, added=False)
        tape.give(*middle)
        return dx

    def _mla_backward(self, kept: Kept, spent: list[Buffer]) -> Buffer:
        """An MLA mixer, whose input alone was kept, run again; `spent` and the unpacked input are freed at its end."""
        parts, tape = self.parts, self.tape
        x = parts.wide()
        again = [*parts.normed("temporaries"), *parts.mla_unread("temporaries")]
        dx = parts.sub_backward("mla", again)
        total = parts.wide()
        tape.give(x, dx, *spent, *kept.x)
        return total

    def _residuals(self, mixer: str, kind: Kind) -> tuple[Buffer, Kept]:
        """x + mix(x), then + feed: (output, kept), the input being the caller's."""
        parts, tape = self.parts, self.tape
        mixed, first = parts.sub_forward(mixer, kind)
        if self.job.compiles:
            middle = mixed  # x + mix(x) is added again in backward
        else:
            middle = parts.wide(kind)
            tape.give(mixed)
        fed, second = parts.sub_forward("mlp", kind)
        second.append(middle)
        y = parts.wide("activations")
        tape.give(fed)
        return y, Kept(mixer=first, mlp=second)

    def _backward(self, i: int, kept: Kept, dy: Buffer) -> Buffer:
        """The gradient of the block's input; frees what it kept, and dy."""
        parts, tape, mixer, mode = self.parts, self.tape, self.mixers[i], self.job.modes[i]
        if mode == "compress":
            if parts.writes_codes:
                return self._coded_backward(mixer, kept, dy)
            return self._unpacked_backward(mixer, kept, dy)
        given = list(kept.x) if mode == "recompute" else []
        if mode == "recompute":
            y, kept = self._to_mlp(mixer, "temporaries")
            kept.mlp = [parts.narrow(), *parts.mlp_unread("temporaries")]
            given.append(y)
        narrow = [] if parts.c == F32 else [parts.narrow()]  # of dy, as what made it leaves it too, or cast
        middle, narrow = parts.sum_backward(parts.part_backward("mlp", narrow, kept.mlp), kept.mixed)
        follows = mode == "none" and self.job.modes[max(i - 1, 0)] == "none" and i > 0
        dx, narrow = parts.sum_backward(parts.part_backward(mixer, narrow, kept.mixer), kept.x, delta=follows)
        tape.give(middle, *given, dy, *narrow)  # the block below takes its place again
        return dx

    def _packed(self, mixer: str) -> Kept:
        """What hooks keep of a block: of an MLA mixer its input, else all that grows with M; casts of weights."""
        parts, shapes = self.parts, self.parts.shapes
        M, D = parts.M, parts.D

        def pack(*numbers: int) -> list[Buffer]:
            return [parts.packed(n) for n in numbers]

        weights = shapes.mlp()
        # The MLP's: statistics where its norm is no part of the sum, u, a, and x + mix(x) or mix(x).
        statistics = [] if mixer == "mamba" else pack(M)
        kept = Kept(x=pack(M * D), mlp=[*statistics, *pack(M * D, M * weights["gate_up"].rows, M * D)])
        for w in weights.values():
            kept.mlp += parts.cast(w.numbers, "activations")
        if mixer == "mamba":
            # u, zxbcdt, y
            kept.mixer = pack(M * D, M * shapes.mamba()["in_proj"].rows, M * parts.inner)
            kept.mixer.append(self.tape.take(parts.scan.decays(parts.scan.chunk), "activations"))
            for w in shapes.mamba().values():
                kept.mixer += parts.cast(w.numbers, "activations")
        return kept

    def _unpacked_backward(self, mixer: str, kept: Kept, dy: Buffer) -> Buffer:
        """A block's backward from what `compress` kept. A compiled graph unpacks all of its at once, and so does a
        compiled MLP on its own; uncompiled, every node unpacks what it needs.
        """
        parts, tape, job = self.parts, self.tape, self.job
        M, D, c = parts.M, parts.D, parts.c
        own = [c * M * D, c * M * parts.shapes.mamba()["in_proj"].rows, c * M * parts.inner] if mixer == "mamba" else []
        mine = [tape.take(size) for size in (c * M * D, c * M * parts.shapes.mlp()["gate_up"].rows)]
        later: list[Buffer] = []
        if job.compiles:
            mine.append(parts.narrow() if mixer == "mamba" else parts.wide())
            if mixer == "mamba":
                later = [parts.wide(), *(tape.take(size) for size in own)]
        middle = parts.sub_backward("mlp", mine)
        tape.give(*kept.mlp)
        if mixer == "mla":
            return self._mla_backward(kept, [middle, dy])
        later = later or [tape.take(size) for size in own]
        dx = parts.sub_backward(mixer, later, into=middle)
        tape.give(dy, *kept.mixer, *kept.x)
        return dx

    def _inverted(self, mixer: str, y: Buffer, dy: Buffer, *, held: tuple[Buffer, Buffer]) -> tuple[Buffer, Buffer]:
        """A block of a fixed-point run: each sub-layer inverted by iteration, evaluated once more, differentiated.

        (its input, the gradient of that), from its output and the gradient of that, both freed unless `held`: those of
        the run, which autograd holds until its end.
        """
        parts, tape = self.parts, self.tape
        for part in ("mlp", mixer):
            x = parts.wide()
            for _ in range(2):  # iterations beyond the second take no other memory
                out, kept = parts.sub_forward(part, "temporaries")
                following = parts.wide()
                tape.give(out, *kept, x)
                x = following
            out, kept = parts.sub_forward(part, "temporaries")
            checks = [parts.wide(), parts.wide()]
            tape.give(*checks)
            gradient = parts.sub_backward(part, kept)
            total = parts.wide()
            tape.give(gradient, out, *(old for old in (y, dy) if old not in held))
            dy, y = total, x
        return y, dy

    # -- the coupled form --

    def _coupled(self, x: Buffer) -> Buffer:
        """The whole stack: two streams forward, and the value of one, which blocks read in the compute type; backward
        from the two last states.
        """
        parts, tape = self.parts, self.tape
        checksums = 8 * -(-parts.M * parts.D // TILE)
        a = b = parts.wide("activations")  # on the grid; both streams at first
        value = parts.narrow("activations")
        sums = [tape.take(checksums, "activations")]
        for at, mixer in enumerate(self.mixers, 1):
            mixed, first = parts.part_forward(mixer, "temporaries")
            fed, second = parts.part_forward("mlp", "temporaries")
            tape.give(*first, *second)
            new, older = parts.wide("activations"), value
            value = parts.wide("activations") if at == len(self.mixers) else parts.narrow("activations")
            sums.append(tape.take(checksums, "activations"))
            tape.give(mixed, fed, older, *([a] if a is not b else []))
            a, b = b, new
        tape.give(sums[-1])
        dy = self._head(value, owned=True)
        self._workspace("backward")
        tape.give(x)  # the caller of the stack held it
        da = db = dy  # which autograd holds until the whole is done
        received = [] if parts.c == F32 else [parts.narrow()]  # db in the type of what was added
        b, c = a, b
        value = parts.narrow()
        for mixer in reversed(self.mixers):
            mixed, first = parts.part_forward(mixer, "temporaries")
            v = parts.narrow()
            fed, second = parts.mlp_foreseen()
            a, older = parts.wide(), parts.narrow()
            rebuilt = tape.take(checksums)
            tape.give(c)
            b, c = a, b
            tape.give(fed)  # of which only the place in the graph is needed; mixed is kept for the norm after it
            d_v = parts.mlp_gradients()
            tape.give(v, *second)
            d_sum, d_mixed = parts.narrow(), parts.narrow()  # of x + mixed, and with what mixed receives itself
            tape.give(d_v, mixed)
            d_u = parts.part_backward(mixer, [d_mixed], first)
            # Compiled, the norm's gradient is there before it is added up.
            d_x = [parts.narrow()] if self.job.compiles else []
            total = parts.wide()
            sent, received = received, [parts.narrow() for _ in received]
            tape.give(d_u, d_sum, *d_x, *sent, rebuilt, value, *([da] if da is not dy else []))
            da, db, value = db, total, older
            self._settle(mixer)
        dx = parts.wide()
        tape.give(b, c, value, *received, *sums[:-1], *{id(x): x for x in (da, db) if x is not dy}.values(), dy)
        return dx

    # -- between steps --

    def _probe(self) -> None:
        """What INSTANT measures on a batch between steps, beside a graph's private memory."""
        parts, tape = self.parts, self.tape
        inverts = "fixed-point" in self.job.modes
        if not (inverts or ("compress" in self.job.modes and self.job.probed)):
            return
        for mixer in dict.fromkeys(self.mixers):
            stream = [parts.wide() for _ in range(5 if inverts else 2)]
            mixed, first = parts.sub_forward(mixer, "temporaries")
            fed, second = parts.sub_forward("mlp", "temporaries")
            tape.give(mixed, fed, *first, *second, *stream)

    def _validate(self) -> None:
        """A forward pass in which nothing is kept, beside a graph's private memory if there is a graph."""
        job, tape, m = self.job, self.tape, self.job.model
        tokens = tape.take(2 * 8 * job.tokens)
        parts = Parts(job.replace(batch=validation_rows(job.batch, job.seq_len)), tape)
        self._workspace("forward")
        streams = [parts.wide() for _ in range(3 if self.job.coupled else 1)]
        for mixer in self.mixers:
            out, kept = parts.sub_forward(mixer, "temporaries")
            middle = parts.wide()
            tape.give(out, *kept)
            fed, kept = parts.sub_forward("mlp", "temporaries")
            after = parts.wide()
            tape.give(fed, *kept, middle, streams.pop())
            streams.append(after)
        hidden = parts.wide()
        casts = ([] if parts.c == F32 else [parts.narrow()]) + parts.cast(m.vocab_size * parts.D, "temporaries")
        logits = tape.take(F32 * min(m.loss_chunk_tokens, parts.M) * m.vocab_size)
        tape.give(logits, *casts, hidden, *streams, tokens)
