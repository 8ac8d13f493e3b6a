"""C3O's step in a handful of Triton launches, whatever the number of tensors. Import it only where Triton is installed.

Tensors of one optimizer form a table on the device: addresses of parameter, moments, step and caches, and rows of
`CHUNK` elements that programs walk. Moments stay in the arenas of `c3o_foreach`, so that both paths share one state.

    1  sum of squares of every chunk of the gradients                      reads g
    2  plan, one program a tensor: norm, verdict, clip factor, bias        scalars
       corrections, the norm skip's decision; advances the step counts
    3  |d|², |θ|² of every chunk of the tensors that must be measured       reads p g m v (writes m v)
       (with a sphere <θ, d> too)
    4  trust, one program a tensor: the cap's scale and new bounds, or     scalars
       the step on the sphere
    5  update; its first program writes the metrics                        reads p g m v, writes p m v
    6  with the norm skip and coded moments: bounds of what 5 stored           scalars

3 needs the clip factor, so 1 must be before it; unless the factor is known, or too near the last one to matter. Where
some tensors are measured in every step, a draft of the plan comes first, with the last step's norm. A tensor for which
that would have done in each of the last `PATIENCE` steps is measured on the draft, before 1, which is left with the
other tensors: 3 sums its squares too. The plan then knows the factor; what was measured holds if the factor is and was
expected to be 1, or if the cap is provably idle with both (docs/c3o.md, "Before the norm is known"), and the plan does
at once what 4 does. Otherwise a second turn of 3 measures again. A guess costs what 3 reads when wrong and saves what 1
reads when right, a quarter of it. Launches with nothing to do are of as few programs as run at once, so that they end
at once.

Bytes decide between two forms of 3 and 5. As a rule 3 writes nothing and 5 repeats its arithmetic: it needs g for
Nesterov's direction, and the unrounded moments where they are stored in fewer bits (the rule). Only without Nesterov
and with moments stored as they are computed (float32) 3 writes the advanced moments, and 5 reads them back: g is not
read a third time. (With Nesterov that would save nothing: 4 + 24 + 20.) Then nothing is guessed: that would save
nothing either (16 + 28). Bytes per parameter:

    parameters, gradients / moments  clip + exact            guessed              clip + skipped or no cap  as foreach
    fp32 / fp32                      4 + 16 + 28 = 48        16 + 28 = 44         4 + 28 = 32               120 + 12
      without Nesterov               4 + 24 + 16 = 44        the same             4 + 28 = 32               100 + 12
    fp32 / bf16                      4 + 12 + 20 = 36        12 + 20 = 32         4 + 20 = 24
    bf16 / bf16                      2 +  8 + 14 = 24         8 + 14 = 22         2 + 14 = 16
    bf16 / int8                      2 + 6.06 + 10.1 = 18.2  6.06 + 10.1 = 16.2   2 + 10.1 = 12.1
    bf16 / int4                      2 + 5.06 + 8.1 = 15.2   5.06 + 8.1 = 13.2    2 + 8.1 = 10.1

Gradients are never written: the clip factor is applied as they are read. Passes
walk the chunks in alternating directions, so that each starts on what the last one left in the L2 cache; which pass was
the last is decided, and read, on the device.

Sums have a fixed order (no atomics), or are exact in any (`_sum_in_any_order`: squares, which two kernels sum), and
every multiply-add is written as one, so that all forms of the update give the same bits, guessed or not. Nothing is
read by the host. Under CUDA-graph capture the gradients' addresses, which autograd chooses while capturing, are read by
a kernel from a pinned buffer of the step's own, made beforehand (`prepare_capture`), that lives and keeps its contents
as long as this object: every replay reads the same addresses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from eco_llm.ops.rows import multiprocessors
from eco_llm.optim.c3o_foreach import Arena
from eco_llm.optim.c3o_kernels.passes import _address_kernel, _measure_kernel, _squares_kernel, _update_kernel
from eco_llm.optim.c3o_kernels.plan import _plan_kernel, _stored_norm_kernel, _trust_kernel
from eco_llm.optim.norm_skip import Slack
from eco_llm.optim.rule import BLOCK, Rule, compiled_settings
from eco_llm.optim.storage import GROUP, Storage

CHUNK = 16384
"""Elements that one program walks; a multiple of BLOCK, so that positions in a credit block are known."""
TILE = 1024
"""Elements in registers at a time, at 4 warps: 8 of each stream a thread."""
WARPS = 4
PATIENCE = 8
"""Steps in a row in which a tensor could have been measured before the norm was known, after which it is: a wrong guess
costs four times what a right one saves."""
SQUARES_PROGRAMS, MEASURE_PROGRAMS = 12, 6
"""Programs to a multiprocessor that share the chunks: about as many as run at once, so that a pass with nothing to do
ends at once."""
TICKETS = 256
"""Room for the counters of two turns of the measuring pass over each combination of types."""
STAGES = 3
"""Tiles whose loads are under way, the one that is computed among them; one more for numbers where four programs still
fit on a multiprocessor: 1.4% of bfloat16's time, 0.9% of float32's, and a loss with codes.
"""
SHARES = 2
"""Programs that share a chunk in the update. Where it sums over chunks, as with codes and the norm skip, one.
CHUNK / SHARES must be a multiple of BLOCK, so that positions in a credit block, which rounding needs, count from a
share's start; and of the tile (of 4-bit codes 2 TILE), so that only a tensor's last tile is masked.
"""
REGISTERS = 128
"""Of a thread, at most, where moments are codes: four programs run at once on a multiprocessor, and nothing spills."""
# Scalar programs wait for memory, not for arithmetic: as few turns of their loops as let two programs of the plan, or
# more, run at once on a multiprocessor, so that hundreds of tensors are planned at once.
_PLAN_WARPS, _SUM_LANES = 8, 4096  # the latter: squares of chunks that a program takes at a time
_LANES = 1024  # other partial sums
_SPARE_TABLES = 8

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

# Columns of the tables. Tensors, int64:
_T = (
    "param", "exp_avg", "exp_avg_sq", "step", "update_norm", "param_norm", "norm_age", "numel", "exp_avg_scale",
    "exp_avg_sq_scale", "error", "sphere_radius",
)  # fmt: skip
# Arenas, float64:
_A = (
    "lr", "beta1", "beta2", "log_beta1", "log_beta2", "eps", "weight_decay", "radius", "floor", "drift", "refresh",
    "clip_norm", "clip_value", "slack_state", "slack_param", "may_skip", "coded", "sphere",
    "nesterov", "early",
)  # fmt: skip
# Plan, float32, made by the device in every step: 0 clip factor, 1 clip value, 2 1-b1, 3 b2, 4 1-b2, 5 gain, 6 shift,
# 7 weight decay, 8 lr · scale (on a sphere both are its own), 9 step, 10 bound, 11 mode (0 leave alone, 1 update,
# 2 measure and update), 12 weight of m beside g in Nesterov's direction, 13 gain of the plain direction, 14 steps in a
# row in which it could be measured before the norm was known (at most PATIENCE), 15 clip factor over the one expected,
# 16 what that may change |u| by (K √n).
_PLAN = 17


def stages(dtype: torch.dtype, storage: Storage, error: bool, shared: int) -> int:
    """Of the passes over parameters of that type and their moments, with or without error bits, on a card whose
    multiprocessors have `shared` bytes of shared memory.
    """
    tile = TILE * (2 * dtype.itemsize + 2 * storage.dtype.itemsize + error)
    return STAGES + (not storage.bits and 4 * (STAGES * tile + 1024) <= shared)  # 1024: the system's, of each program


class _Kind:
    """Chunks first..first+count-1 of the table: tensors alike in every type."""

    def __init__(self, arena: Arena, group: dict[str, Any], first: int, shared: int) -> None:
        p, storage = _TYPES[arena.param_dtype], arena.storage
        ratio, second = storage.ratio, storage.second
        self.gradient = {"G": p, "PACK": 2 if storage.bits == 4 else 1}
        # Two groups share a byte of 4-bit codes: as many elements a load as with 8 bits.
        self.shape = {"CHUNK": CHUNK, "TILE": TILE * (2 if storage.bits == 4 else 1), "num_warps": WARPS}
        self.stages = {"STAGES": stages(arena.param_dtype, storage, arena.error is not None, shared)}
        self.limits = {"maxnreg": REGISTERS} if storage.bits else {}
        self.types: dict[str, Any] = {
            "P": p, "G": p, "S": _TYPES.get(storage.dtype, tl.uint8), "BITS": storage.bits,
            "R": ratio.mantissa if ratio else 0, "V": second.mantissa if second else 0,
            "ERROR": arena.error is not None, "NESTEROV": group["nesterov"],
        }  # fmt: skip
        self.update = {
            "R_SPAN": ratio.span if ratio else 1.0, "V_SPAN": second.span if second else 1.0,
            "DITHER": group["weight_rounding"] == "dithered",
        }  # fmt: skip
        self.nesterov = group["nesterov"]
        self.advance = KernelPlan._advances(arena, self.nesterov)
        self.coded = storage.bits > 0
        self.first, self.count = first, 0


class KernelPlan:
    """The tables of some arenas of one device, and the launches that step them.

    Args:
        arenas: each with its parameter group; float32 or bfloat16 throughout, contiguous, no credit.

    Tensors need not have a gradient in every step: those without one are left alone.
    """

    def __init__(self, arenas: Sequence[tuple[Arena, dict[str, Any]]]) -> None:
        # Arenas of one kind are neighbours, so that a kind is one run of chunks.
        self._arenas = sorted(arenas, key=lambda x: self._kind_of(*x))
        self.device = self._arenas[0][0].device
        self.params = [p for arena, _ in self._arenas for p in arena.params]
        self._owner = [k for k, (arena, _) in enumerate(self._arenas) for _ in arena.params]
        self._dtypes = [p.dtype for p in self.params]
        self._slack = [Slack.of(arena.storage, arena.param_dtype, torch.float32) for arena, _ in self._arenas]
        n = len(self.params)

        shared = 0
        if self.device.type == "cuda":
            shared = torch.cuda.get_device_properties(self.device).shared_memory_per_multiprocessor
        chunks: list[tuple[int, int]] = []
        spans: list[tuple[int, int]] = []
        self._kinds: list[_Kind] = []
        for k, (arena, group) in enumerate(self._arenas):
            if not k or self._kind_of(arena, group) != self._kind_of(*self._arenas[k - 1]):
                self._kinds.append(_Kind(arena, group, len(chunks), shared))
            for p in arena.params:
                parts = -(-p.numel() // CHUNK)
                spans.append((len(chunks), parts))
                chunks += [(len(spans) - 1, j) for j in range(parts)]
            self._kinds[-1].count = len(chunks) - self._kinds[-1].first
        self._chunk_count = len(chunks)
        self._chunks = self._uploaded(chunks, torch.int32)
        self._span = self._uploaded(spans, torch.int32)
        self._arena_of = self._uploaded(self._owner, torch.int32)
        self._tensors = torch.zeros(n, len(_T), dtype=torch.int64, device=self.device)
        self._settings = torch.zeros(len(self._arenas), len(_A), dtype=torch.float64, device=self.device)
        self._lr_at = torch.zeros(len(self._arenas), dtype=torch.int64, device=self.device)
        self._grads = torch.zeros(n, dtype=torch.int64, device=self.device)
        self._plan = torch.zeros(n, _PLAN, device=self.device)
        # In which of its turns the measuring pass measures a tensor; 0: in none that is left.
        self._turns = torch.zeros(n, dtype=torch.int32, device=self.device)
        self._stats = torch.zeros(n, 4, device=self.device)
        # Clip factor, norm of the gradients, whether turn 1 (no kernel reads that: it is for tests and for whoever asks
        # if guesses are made), turn 2 measured anything.
        self._control = self._uploaded([1.0, 0.0, 0.0, 0.0], torch.float32)
        if 2 * len(self._kinds) > TICKETS:
            raise RuntimeError(
                f"{len(self._kinds)} combinations of types and settings need more than {TICKETS} counters"
            )
        self._tickets = torch.zeros(TICKETS, dtype=torch.int32, device=self.device)
        clipped = sum(group["grad_clip"] > 0 for _, group in self._arenas)
        self.summary = self._uploaded([0.0, 0.0, 0.0, 0.0, 1.0, len(self._arenas), clipped], torch.float32)
        """float32 [7], `C3O.metrics_tensor`'s values of the last applied step, in memory that stays the same."""
        self._partials = torch.zeros(4 * self._chunk_count, device=self.device)
        self._squares = torch.zeros(self._chunk_count, device=self.device)
        self._processors = multiprocessors(self.device, interpreted=1)

        self._param_at: list[int] = []
        self._grad_at: list[int] = []
        self._settings_key: Any = None
        self._lr_key: Any = None
        self._align = 16
        self._aligned_for: list[int] = []
        self._bound_grads = self._grads
        self.bound = 0
        """Gradients that the last `bind` took up."""
        self._spare: list[tuple[Tensor, Tensor]] = []
        self._captured: list[tuple[Tensor, Tensor]] = []  # recorded kernels read them in every replay

    @staticmethod
    def _kind_of(arena: Arena, group: dict[str, Any]) -> tuple[str, ...]:
        return str(arena.param_dtype), arena.storage.name, str(arena.error is None), *map(str, compiled_settings(group))

    @staticmethod
    def _advances(arena: Arena, nesterov: bool) -> bool:
        """Whether the measuring pass stores the advanced moments for the update to read."""
        return arena.storage.dtype == torch.float32 and not nesterov

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being recorded on the current stream."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _uploaded(self, values: Any, dtype: torch.dtype) -> Tensor:
        """A device tensor of host numbers, without waiting for the device."""
        self._refuse_in_capture("a table changed")
        host = torch.tensor(values, dtype=dtype)
        # Pinned: the allocator keeps it until the copy is done. Pageable memory would make the copy wait.
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def _refuse_in_capture(self, what: str) -> None:
        if getattr(self, "device", None) is not None and self.capturing:
            raise RuntimeError(f"C3O: {what} while a CUDA graph is being captured; call make_capturable() before")

    # -- what changes between steps --

    def bind(self, rules: Sequence[Rule]) -> set[int]:
        """Take up this step's gradients and settings.

        Args:
            rules: one an arena, in the order of `groups`.

        Returns:
            Indices of arenas that hold a gradient the kernels cannot read; then nothing was bound.

        Raises:
            RuntimeError: something other than gradients changed while a CUDA graph is being captured.
        """
        # On the hot path of an eager step: as few calls a tensor as make the addresses safe. Gradients share device and
        # (unless told otherwise) type with their parameter, which PyTorch enforces; sparse ones are refused before.
        grads: list[int] = []
        unfit: set[int] = set()
        for p, dtype, owner in zip(self.params, self._dtypes, self._owner, strict=True):
            g = p.grad
            if g is None:
                grads.append(0)
            elif g.dtype is dtype and g.is_contiguous():
                grads.append(g.data_ptr())
            else:
                unfit.add(owner)
        params = [p.data_ptr() for p in self.params]
        moved = params != self._param_at
        if moved:
            unfit |= {
                owner
                for p, dtype, owner in zip(self.params, self._dtypes, self._owner, strict=True)
                if not p.is_contiguous() or p.dtype != dtype or p.device != self.device
            }
        if unfit:
            return unfit
        self.bound = len(grads) - grads.count(0)
        if moved:
            self._tensors.copy_(self._uploaded(self._rows(params), torch.int64))
            self._param_at = params
        if moved or grads != self._aligned_for:
            aligned = all(at % 16 == 0 for at in params) and all(at % 16 == 0 for at in grads)
            self._align = 16 if aligned else min(dtype.itemsize for dtype in self._dtypes)
            self._aligned_for = grads
        if self.capturing:
            if not self._spare:
                raise RuntimeError("C3O: no table left for another captured step; call make_capturable() before")
            host, there = self._spare.pop()
            host.copy_(torch.tensor(grads, dtype=torch.int64))
            self._read_addresses(host, there)
            self._captured.append((host, there))
            self._bound_grads = there
        else:
            if grads != self._grad_at:
                self._grads.copy_(self._uploaded(grads, torch.int64))
                self._grad_at = grads
            self._bound_grads = self._grads
        self._bind_settings(rules)
        return unfit

    def _rows(self, params: list[int]) -> list[tuple[int, ...]]:
        rows: list[tuple[int, ...]] = []
        for arena, _ in self._arenas:
            width = arena.exp_avg.element_size() * arena.exp_avg.shape[1]
            m, v = arena.exp_avg.data_ptr(), arena.exp_avg_sq.data_ptr()
            caches = [0] * 3 if arena.cache is None else [x.data_ptr() for x in arena.cache]
            scales = [0] * 2 if arena.scales is None else [x.data_ptr() for x in arena.scales]
            error = 0 if arena.error is None else arena.error.data_ptr()
            radius = 0 if arena.sphere_radius is None else arena.sphere_radius.data_ptr()
            for i, p in enumerate(arena.params):
                first = arena.first[i]
                offset = first * width
                scalars = (arena.step.data_ptr() + 4 * i, *(c + 4 * i if c else 0 for c in caches))
                groups = (s + first * (BLOCK // GROUP) * 2 if s else 0 for s in scales)
                bits = error + first * BLOCK if error else 0
                sphere = radius + 4 * i if radius else 0
                rows.append((params[len(rows)], m + offset, v + offset, *scalars, p.numel(), *groups, bits, sphere))
        return rows

    def _bind_settings(self, rules: Sequence[Rule]) -> None:
        rows: list[tuple[float, ...]] = []
        addresses: list[int] = []
        for slack, rule, (arena, _) in zip(self._slack, rules, self._arenas, strict=True):
            lr, address = 0.0, 0
            if not isinstance(rule.lr, Tensor):
                lr = rule.lr
            elif rule.lr.dtype == torch.float32 and rule.lr.device == self.device:
                address = rule.lr.data_ptr()
            elif rule.lr.device.type == "cpu":
                lr = float(rule.lr)  # host memory: reading it waits for nothing
            else:
                raise TypeError(f"C3O: a device lr must be float32 on {self.device}, not {rule.lr.dtype}")
            rows.append(
                (
                    lr,
                    rule.beta1,
                    rule.beta2,
                    _log(rule.beta1),
                    _log(rule.beta2),
                    rule.eps,
                    rule.weight_decay,
                    rule.trust_radius,
                    rule.trust_floor,
                    rule.trust_norm_refresh_drift,
                    rule.trust_norm_refresh_steps,
                    rule.grad_clip if rule.clips_norm else 0.0,
                    rule.grad_clip if rule.clips_value else float("inf"),
                    slack.state,
                    slack.param,
                    float(rule.may_skip_norms),
                    float(arena.storage.bits > 0),
                    rule.sphere,
                    float(rule.nesterov),
                    float(not self._advances(arena, rule.nesterov)),
                )
            )
            addresses.append(address)
        if rows != self._settings_key:
            self._settings.copy_(self._uploaded(rows, torch.float64))
            self._settings_key = rows
        if addresses != self._lr_key:
            self._lr_at.copy_(self._uploaded(addresses, torch.int64))
            self._lr_key = addresses
        if self.capturing and 0 in addresses:
            raise RuntimeError("C3O: lr is a number, which a CUDA graph would freeze; call make_capturable() before")
        self._clamps = any(rule.clips_value for rule in rules)
        self._measures = any(rule.measures for rule in rules)
        # Pays where tensors are measured in every step, and only where measuring writes nothing.
        self._drafts = any(
            rule.measures and (rule.has_sphere or not rule.may_skip_norms) and not self._advances(arena, rule.nesterov)
            for rule, (arena, _) in zip(rules, self._arenas, strict=True)
        )
        self._spheres = any(rule.has_sphere for rule in rules)
        self._skips = any(rule.may_skip_norms for rule in rules)
        self._watches_plain = [kind.nesterov and not kind.coded and self._skips for kind in self._kinds]
        self._watches = any(
            rule.may_skip_norms and a.storage.bits for rule, (a, _) in zip(rules, self._arenas, strict=True)
        )
        clipping = [k for k, rule in enumerate(rules) if rule.clips_norm]
        self._clip_arena = clipping[-1] if clipping else 0
        self.clips_norm = bool(clipping)
        self._clip_count = sum(rule.grad_clip > 0 for rule in rules)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The group of every arena, in the order that `bind` expects their rules."""
        return [group for _, group in self._arenas]

    @property
    def arenas(self) -> list[Arena]:
        """The arenas, in the same order."""
        return [arena for arena, _ in self._arenas]

    # -- the step --

    def step(
        self, *, measure: bool, norm: Tensor | None, loss: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One step of what `bind` took up. No host sync; two to eight launches, and more if types differ.

        Args:
            measure: compute the norm of all bound gradients.
            norm: or take this one, 0-dim; None with `measure` off: no clipping by norm.
            loss: 0-dim; given, the step is taken only if it and the norm are finite.
            found_inf: 0-dim or 1-element; not 0 refuses the step too.

        Returns:
            (norm, applied): 0-dim float32 and bool, of their own memory.
        """
        norm_out = torch.empty((), dtype=torch.float32, device=self.device)
        applied = torch.empty((), dtype=torch.bool, device=self.device)
        grads, table = self._bound_grads, self._tensors
        columns = {"COLUMNS": len(_T)}
        scalars = {**columns, "ARENA_COLUMNS": len(_A), "PLAN": _PLAN, "SLACK": 8 * torch.finfo(torch.float32).eps}
        early = measure and self._drafts

        tables = (self._settings, table, self._arena_of, self._span, self._plan)
        tensors = len(self.params)

        def plan(*, draft: bool) -> None:
            _plan_kernel[(tensors,)](
                self._squares, self._chunk_count, norm, loss, found_inf, self._settings, self._lr_at, table,
                self._arena_of, grads, self._span, self._partials, self._plan, self._turns, self._stats, self._control,
                self._tickets, norm_out, applied.view(torch.uint8), self._clip_arena, DRAFT=draft, EARLY=early,
                PATIENCE=PATIENCE, SKIPS=self._skips, MEASURED=measure and not draft, KNOWN=norm is not None,
                GUARD=loss is not None and not draft, FLAG=found_inf is not None and not draft, TICKETS=TICKETS,
                SPHERE=self._spheres, PLAIN=any(self._watches_plain), LANES=_LANES, SUM_LANES=_SUM_LANES,
                num_warps=_PLAN_WARPS if measure and not draft else 1, **scalars,
            )  # fmt: skip

        def measure_norms(turn: int) -> None:
            for k, (kind, plain) in enumerate(zip(self._kinds, self._watches_plain, strict=True)):
                if turn == 2 or not kind.advance:
                    _measure_kernel[(self._grid(kind, MEASURE_PROGRAMS),)](
                        self._chunks, grads, table, self._plan, self._turns, self._control, self._tickets,
                        self._partials, self._squares, kind.first, kind.count, self._chunk_count, tensors, turn,
                        2 * k + turn - 1, int(turn == 2 and measure),
                        CLAMP=self._clamps, PLAIN=plain, SPHERE=self._spheres, ADVANCE=kind.advance,
                        ALIGN=self._align, PLAN=_PLAN, **kind.types, **columns, **kind.shape, **kind.stages,
                        **kind.limits,
                    )  # fmt: skip

        with self._on_device():
            if early:
                plan(draft=True)
                measure_norms(1)
            if measure:
                for kind in self._kinds:
                    _squares_kernel[(self._grid(kind, SQUARES_PROGRAMS) if early else kind.count,)](
                        self._chunks, grads, table, self._turns, self._squares, kind.first, kind.count, tensors,
                        EARLY=early, ALIGN=self._align, **kind.gradient, **columns, **kind.shape,
                    )  # fmt: skip
            plan(draft=False)
            if self._measures:
                measure_norms(2)
                _trust_kernel[(tensors,)](
                    self._partials, self._chunk_count, *tables, self._turns, self._stats, EARLY=early,
                    PATIENCE=PATIENCE, SPHERE=self._spheres, PLAIN=any(self._watches_plain), LANES=_LANES, **scalars,
                )  # fmt: skip
            for k, kind in enumerate(self._kinds):
                summaries, watches = int(k == 0), kind.coded and self._watches
                shares = 1 if watches else SHARES
                _update_kernel[(shares * kind.count + summaries,)](
                    self._chunks, grads, table, self._plan, self._control, self._partials, kind.first, kind.count,
                    int(measure), self._stats, self.summary, summaries, tensors, len(self._arenas), self._clip_count,
                    WATCH=watches, CLAMP=self._clamps, ADVANCE=kind.advance, SHARES=shares, ALIGN=self._align,
                    PLAN=_PLAN, BLOCK=BLOCK, **kind.types, **kind.update, **columns, **kind.shape, **kind.stages,
                    **kind.limits,
                )  # fmt: skip
            if self._watches:
                _stored_norm_kernel[(tensors,)](self._partials, *tables, LANES=_LANES, **scalars)
        return norm_out, applied

    def stats(self) -> Tensor:
        """float32 [4], as `foreach_step` returns: sums over tensors."""
        return self._stats.sum(0)

    def prepare_capture(self) -> None:
        """Make the memory that captured steps need; enough for several, topped up by every call."""
        while len(self._spare) < _SPARE_TABLES:
            host = torch.zeros(len(self.params), dtype=torch.int64)
            host = host.pin_memory() if self.device.type == "cuda" else host
            there = torch.zeros_like(self._grads)
            self._read_addresses(host, there)  # compiles and loads the kernel
            self._spare.append((host, there))

    def _read_addresses(self, host: Tensor, there: Tensor) -> None:
        """Copy a pinned table to the device; by a kernel, for a graph gets from a copy to what follows 8 µs late."""
        with self._on_device():
            _address_kernel[(-(-len(host) // _LANES),)](host, there, len(host), LANES=_LANES)

    def _grid(self, kind: _Kind, programs: int) -> int:
        rounds = -(-kind.count // (programs * self._processors))
        return -(-kind.count // rounds)  # no more programs than leave all of them as much to do

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


def _log(beta: float) -> float:
    # exp of it is 0, as 0 to any power; not minus infinity, whose products could be NaN.
    return math.log(beta) if beta > 0 else -1e30
