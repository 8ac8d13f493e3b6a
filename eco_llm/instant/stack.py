"""The blocks of a model as one stack: which mode serves each, and what is decided about them between steps.

Inside a step nothing is read by the host. Decisions (iterations of an inversion, 8 or 4 bits, falling back to
`recompute` after a trip) are taken by `review`, at fixed steps, from values that have arrived by then and from probes
of the last batch; so a run that is stopped and resumed takes the same ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from eco_llm.config import InstantConfig
from eco_llm.instant.compression import Bytes, FourBitError, Packing, recompute_from_packed
from eco_llm.instant.coupled import Changing, coupled, coupled_stored, coupled_values
from eco_llm.instant.fixed_point import Layer, Run, errors_by_iteration, fixed_point, iterations_needed
from eco_llm.instant.ranges import named
from eco_llm.instant.recompute import recompute
from eco_llm.instant.replay import Setting, Twice
from eco_llm.instant.verification import BLOCK_PREFIX, NAMES, Gate, block_name
from eco_llm.ops.quantize import Keep

GATE_REVIEW = 8
"""Steps between looks at the gate: after a trip, at most so many steps are not applied."""
EARLY_PROBES = (10, 50)
"""Further steps with a probe: much changes at the start, and nothing is saved before the first."""
MARGIN = 0.5
"""Share of the tolerance that a probe may use up; halved for a block with every review that found it tripped."""
MOST_STRIKES = 4
"""Reviews after which it is not halved again: under bf16 an inversion has a floor."""
HYSTERESIS = 0.9
"""Share of the error threshold under which a block goes to 4 bits; it comes back above the whole."""


class Block(Layer, Changing, Protocol):
    """What the stack needs of a block."""

    def __call__(self, x: Tensor, delta: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
        """Both sub-layers, plain residual form, of x + delta: a pair whose sum is the result, all [B, T, D]; no delta
        is 0.
        """

    @property
    def whole(self) -> Twice:
        """The block as a function of x alone: x [B, T, D] -> [B, T, D]."""

    @property
    def mixing(self) -> Twice:
        """mix, of an MLA block."""

    def writes_codes(self, x: Tensor, keep: Keep) -> bool:
        """Whether `coded` serves x."""

    def coded(self, x: Tensor, delta: Tensor | None, keep: Keep) -> tuple[Tensor, Tensor]:
        """A call with x + delta by ops that keep codes, as a pair whose sum is the result; no delta is 0."""

    def watched(self, x: Tensor, seen: FourBitError) -> Tensor:
        """The result for x, what `coded` would keep codes of being kept inside `seen`, or added to it."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Its weights."""


@dataclasses.dataclass
class _Decisions:
    """What `review` has decided, one entry a block; plain numbers, saved with checkpoints."""

    iterations: list[tuple[int, int] | None]
    """fixed-point: of (mix, feed); None: recomputed."""
    bits: list[int]
    """compress: of what is kept."""
    trips: list[int]
    """Steps in which the block's gate tripped."""
    strikes: list[int]
    """Reviews that found it tripped."""
    fallback: bool = False
    """coupled: every state is kept."""
    retry_at: int = 0
    """coupled: the step from which states are rebuilt again after a fallback."""
    probed: bool = False
    """Whether there was a probe."""
    reviewed: int = 0
    """The last step after which a review was held."""

    @property
    def counts(self) -> list[int]:
        """Iterations of every sub-layer that is inverted, two a block."""
        return [n for pair in self.iterations if pair is not None for n in pair]


class Stack:
    """Runs a model's blocks. `mixers` names each block's mixer ("mamba" or "mla")."""

    def __init__(self, config: InstantConfig, mixers: Sequence[str]) -> None:
        self._config, self._mixers = config, tuple(mixers)
        self.modes = config.block_modes(self._mixers)
        count = len(self.modes)
        bits = 4 if config.instant_bits == "4" else 8
        self._decided = _Decisions([None] * count, [bits] * count, [0] * count, [0] * count)
        self._gate: Gate | None = None
        self._draws: Tensor | None = None
        """int64 [blocks, 2]: in the first column's lower words the forwards so far, in the upper ones what tells blocks
        apart. 16 bytes an entry, since compiled code copies what is aligned to less."""
        self._new_trips: set[int] = set()
        self.sizes = Bytes()
        self.annotate = False
        """While true, blocks are named ranges (`eco/block_07_mamba`) in a torch.profiler trace."""

    # ---- properties of the modes --------------------------------------------------------------------------

    @property
    def coupled(self) -> bool:
        """Whether the network has the coupled form."""
        return self._config.coupled

    @property
    def gated(self) -> bool:
        """Whether anything is reconstructed, and so verified."""
        return "coupled" in self.modes or "fixed-point" in self.modes

    @property
    def probed(self) -> bool:
        """Whether probes decide anything."""
        return "fixed-point" in self.modes or ("compress" in self.modes and self._config.instant_bits == "auto")

    # ---- a step -------------------------------------------------------------------------------------------

    def prepare(self, device: torch.device) -> None:
        """Make what lives on the device; before the first step, and outside any CUDA graph. Idempotent."""
        if self.gated and self._gate is None:
            self._gate = Gate(len(self.modes), device)
        if "compress" in self.modes and self._draws is None:
            self._draws = _counters(len(self.modes)).to(device)

    def begin_step(self) -> None:
        """Forget the verdicts of the step before."""
        if self._gate is not None:
            self._gate.begin_step()

    def __call__(self, blocks: Sequence[Block], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] -> (x, delta), whose sum the final norm reads; no delta is 0."""
        if not torch.is_grad_enabled():
            if self._config.coupled:
                return coupled_values((block.change for block in blocks), x), None
            return _plain(blocks, x)
        if not x.requires_grad:  # a frozen embedding: autograd would not enter a mode's backward
            x = x.detach().requires_grad_()
        self.prepare(x.device)
        if self.annotate:
            blocks = named(blocks, self._mixers)
        if self._config.coupled:
            if self._decided.fallback:
                return coupled_stored(blocks, x, lambda f, state: recompute(Twice.alike(f), state)), None
            assert self._gate is not None
            return coupled(blocks, x, self._gate), None
        self.sizes = Bytes()
        if self._draws is not None:
            self._draws += 1
        delta: Tensor | None = None  # of the block before, which its successor adds
        at = 0
        while at < len(blocks):
            mode, inverted = self.modes[at], self._decided.iterations[at]
            if mode == "none":
                x, delta = blocks[at](x, delta)
                at += 1
                continue
            if mode == "compress":
                x, delta = self._compressed(blocks[at], at, x, delta)
                at += 1
                continue
            x, delta = _sum(x, delta), None
            if inverted is not None:
                end = at + 1
                while end < len(blocks) and self._decided.iterations[end] is not None:
                    end += 1
                counts = [c for c in self._decided.iterations[at:end] if c is not None]
                assert self._gate is not None
                x = fixed_point(Run(at, blocks[at:end], counts, self._config.instant_reversible_tol), x, self._gate)
                at = end
                continue
            x = recompute(blocks[at].whole, x)
            at += 1
        return x, delta

    def _compressed(self, block: Block, index: int, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The block of x + delta, as a pair whose sum is the result."""
        shapes = [p.shape for p in block.parameters()]
        keep = Keep(self._decided.bits[index], self._draw(index))
        packing = Packing(keep.bits, keep.step, (x.shape[0], x.shape[1]), shapes, self.sizes)
        if block.writes_codes(x, keep):
            with packing:
                return block.coded(x, delta, keep)
        if self._mixers[index] == "mamba":
            with packing:
                return block(x, delta)
        x = _sum(x, delta)
        # Outside `packing`: what attention keeps of itself is dropped, not packed.
        mixed = recompute_from_packed(block.mixing, x, packing)
        with packing:
            x = x + mixed
            return x, block.sub_layers[1](x)

    def _draw(self, index: int) -> Tensor:
        """The counter of a block's random numbers: a 0-dim view, so that all blocks share one compiled graph."""
        assert self._draws is not None
        return self._draws[index, 0]

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Forward and backward in here leave no trace: the steps that follow draw the numbers they would have drawn."""
        before = None if self._draws is None else self._draws.clone()
        try:
            yield
        finally:
            if before is not None and self._draws is not None:
                self._draws.copy_(before)

    def guard(self, loss: Tensor) -> Tensor:
        """What the optimizer's guard is given: the loss, or NaN where the gate tripped. 0-dim."""
        return loss if self._gate is None else self._gate.guard(loss)

    def metrics_tensor(self) -> tuple[tuple[str, ...], Tensor | None]:
        """(names, float32 [names] on the device) of the step; nothing where nothing is verified."""
        if self._gate is None:
            return (), None
        return (*NAMES, *(block_name(i) for i in range(len(self.modes)))), self._gate.values()

    # ---- between steps ------------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """What the host knows of the step without asking: for the record."""
        found: dict[str, float] = {}
        if "fixed-point" in self.modes:
            counts = self._decided.counts
            found["instant_inverted_blocks"] = len(counts) // 2
            if counts:
                found["instant_inversion_iters"] = sum(counts) / len(counts)
        if "compress" in self.modes:
            bits = [b for b, mode in zip(self._decided.bits, self.modes, strict=True) if mode == "compress"]
            found["instant_bits"] = sum(bits) / len(bits)
            found["instant_compression_ratio"] = self.sizes.ratio
        if self._decided.fallback:
            found["instant_fallback"] = 1
        return found

    def observe(self, values: dict[str, float]) -> dict[str, float]:
        """Take in a finished step's values; return those that belong in the record (not single blocks' verdicts)."""
        # Where the loss is not finite nothing can be rebuilt, and that says nothing of the reconstruction.
        for index in range(len(self.modes) if math.isfinite(values.get("loss", 0.0)) else 0):
            if values.get(block_name(index)):
                self._new_trips.add(index)
                self._decided.trips[index] += 1
        kept = {k: v for k, v in values.items() if not k.startswith(BLOCK_PREFIX)}
        return {**kept, "instant_gate_trips": sum(self._decided.trips)} if self.gated else kept

    def review_due(self, step: int) -> bool:
        """Whether `review` is to be held after this step, once its values have arrived."""
        if step <= self._decided.reviewed:
            return False
        return (self.gated and step % GATE_REVIEW == 0) or self._probe_due(step)

    def _probe_due(self, step: int) -> bool:
        interval = self._config.instant_int4_probe_interval
        late = not self._decided.probed and step > EARLY_PROBES[0] and step % GATE_REVIEW == 0  # the mode came later
        return self.probed and (step % interval == 0 or (step in EARLY_PROBES and step < interval) or late)

    def review(self, step: int, blocks: Sequence[Block], embed: Callable[[], Tensor]) -> list[str]:
        """Decide from what was observed, and from a probe if one is due.

        Args:
            step: the last finished one.
            blocks: the model's.
            embed: gives the embedding [B, T, D] of a batch to probe with, without a graph.

        Returns:
            What changed, for people; empty if nothing did. After a change the step is another computation.
        """
        decided = self._decided
        decided.reviewed = step
        before = dataclasses.replace(decided, iterations=list(decided.iterations), bits=list(decided.bits))
        said = []
        if decided.fallback and step >= decided.retry_at:
            decided.fallback = False
            said.append("states are rebuilt again")
        if self._new_trips:
            said.append(self._trips_so_far() + self._consequence())
            for index in self._new_trips:
                decided.iterations[index] = None
                decided.strikes[index] = min(decided.strikes[index] + 1, MOST_STRIKES)
            if self._config.coupled:
                decided.fallback = True
                decided.retry_at = step + self._config.instant_int4_probe_interval * 2 ** max(decided.strikes)
            self._new_trips.clear()
        if self._probe_due(step):
            self._probe(blocks, embed())
            decided.probed = True
        if decided.iterations != before.iterations and not said:
            counts = decided.counts
            said.append(
                f"{len(counts) // 2} of {self.modes.count('fixed-point')} blocks are inverted"
                + (f", by {sum(counts) / len(counts):.1f} iterations on average" if counts else "")
            )
        if decided.bits != before.bits:
            said.append(f"{decided.bits.count(4)} of {self.modes.count('compress')} blocks are kept in 4 bits")
        return said

    def unsaid(self) -> list[str]:
        """What a run that ends now should still say."""
        return [self._trips_so_far()] if self._new_trips else []

    def _trips_so_far(self) -> str:
        return (
            f"the gate tripped at block {', '.join(map(str, sorted(self._new_trips)))}: the steps concerned were not"
            " applied (under gradient release, not from there on)"
        )

    def _consequence(self) -> str:
        if self._config.coupled:
            return "; every state is kept for now, about as much memory as recompute"
        return "; recomputed until a stricter probe lets it in"

    def _probe(self, blocks: Sequence[Block], x: Tensor) -> None:
        """Measure on one batch what each mode needs; reads the device once."""
        self.prepare(x.device)
        limit, config = self._config.instant_reversible_tol, self._config
        setting = Setting.now(x)
        found: list[tuple[int, Tensor]] = []
        for index, block in enumerate(blocks):
            mode = self.modes[index]
            if mode == "fixed-point":
                curves = []
                for f in block.sub_layers:
                    x, errors = errors_by_iteration(f, x, config.instant_max_iters, setting)
                    curves.append(errors)
                found.append((index, torch.stack(curves)))
            elif mode == "compress" and config.instant_bits == "auto":
                x, errors = self._four_bit_error(block, index, x, setting)
                found.append((index, errors))
            else:
                x = setting.value(block.whole.value, x)
        sizes = [errors.numel() for _, errors in found]
        numbers = torch.cat([errors.flatten().float() for _, errors in found]).tolist()
        for (index, _), size in zip(found, sizes, strict=True):
            mine, numbers = numbers[:size], numbers[size:]
            if self.modes[index] == "compress":
                share = 1.0 if self._decided.bits[index] == 4 else HYSTERESIS
                self._decided.bits[index] = 4 if mine[0] <= share * config.instant_error_threshold else 8
                continue
            allowed = limit * MARGIN / 2 ** self._decided.strikes[index]
            mixing, feeding = (iterations_needed(curve, allowed) for curve in (mine[: size // 2], mine[size // 2 :]))
            self._decided.iterations[index] = None if mixing is None or feeding is None else (mixing, feeding)

    def _four_bit_error(self, block: Block, index: int, x: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
        measured = FourBitError(self._draw(index), (x.shape[0], x.shape[1]), [p.shape for p in block.parameters()])
        with setting.restored():
            leaf = x.detach().requires_grad_()
            if block.writes_codes(leaf, Keep(4, self._draw(index))):
                y = block.watched(leaf, measured)
            elif self._mixers[index] == "mamba":
                with measured:
                    y = _sum(*block(leaf))
            else:
                measured.add(x)
                middle = (x + setting.value(block.mixing.value, x)).requires_grad_()
                with measured:
                    y = middle + block.sub_layers[1](middle)
        return y.detach(), measured.relative()

    # ---- state --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: decisions, and the counter of random draws (read from the device)."""
        draw = 0 if self._draws is None else int(self._draws[0, 0])
        return {
            **dataclasses.asdict(self._decided), "draw": draw, "new_trips": sorted(self._new_trips),
            "settings": self._settings(),
        }  # fmt: skip

    def _settings(self) -> list[Any]:
        """What decisions rest on."""
        config = self._config
        return [
            list(self.modes), config.instant_bits, config.instant_reversible_tol, config.instant_max_iters,
            config.instant_error_threshold,
        ]  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with saved decisions, if they were taken under the settings of now; else begin anew."""
        if self._draws is not None:
            self._draws.copy_(_counters(len(self.modes)) + state["draw"])
        if state["settings"] != self._settings():
            self._decided.reviewed = state["reviewed"]
            return
        self._decided = _Decisions(**{f.name: state[f.name] for f in dataclasses.fields(_Decisions)})
        self._decided.iterations = [None if pair is None else (pair[0], pair[1]) for pair in state["iterations"]]
        self._new_trips = set(state["new_trips"])


def _counters(blocks: int) -> Tensor:
    """`Stack._draws` before the first forward."""
    return torch.arange(2 * blocks).view(blocks, 2) << 32


def _plain(blocks: Sequence[Block], x: Tensor) -> tuple[Tensor, Tensor | None]:
    delta: Tensor | None = None
    for block in blocks:
        x, delta = block(x, delta)
    return x, delta


def _sum(x: Tensor, delta: Tensor | None) -> Tensor:
    return x if delta is None else x + delta
