"""Claim: a C3O step costs at most 1% more than torch's fused AdamW with clipping at any storage, near its bytes' floor.

    python benchmarks/c3o_speed.py [--rounds N] [--steps N] [--skip-warm-up]

One run, all sides in turn (A B C … A B C …) on the same parameters and gradients, for the shapes of the SigmaLLM
default and of a plain decoder of 355M parameters. A sample is 17 steps, one whole period of the norm skip (one measured
step and 16 that are not); a step is a CUDA graph where the optimizer can be recorded, others run eagerly and say so.
optimi and bitsandbytes take part if they are installed and are named as absent if not. The gradients' norm is above 10:
a clip at 1 binds in every step, one at 1000 ("clip idle") in none. They are the same in every step, and so is the
clip's factor: where norms are measured before it is known, every guess is right, which is the best case.

Gate: eleven steps of every C3O side (from the ninth on tensors may be measured before the norm is known) change the
parameters of odd shapes as the for-loop reference does, within the tolerances below (relative 2-norm of the change; a
wider one for bfloat16 weights, whose last-place rounding may differ and whose gradients the for-loop clips in place),
C3O without Nesterov and a trust region equals AdamW, and a side said to skip does.
A red gate reports no speed.

Bytes: `state` is what the optimizer's tensors hold beside parameter and gradient, summed. `traffic` is counted from the
algorithm (docs/c3o.md), not measured, and divided by the measured time for the share of the copy bandwidth of this run.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import Comparison, GateError, write_evidence

from eco_llm.runtime import set_cache_dirs

TOLERANCE = {"fp32": 1e-2, "bf16": 4e-2}
ADAMW_TOLERANCE = 1e-5
PERIOD = 17
GUESSED_STEPS = 11  # from the ninth on C3O may measure before the norm is known
GATE_SHAPES = ((4097,), (130, 257), (3, 5, 7), ())
_BYTES = {"fp32": 8.0, "bf16": 4.0, "int8": 2.0625, "int4": 1.0625}


@dataclass(frozen=True)
class Side:
    """One optimizer with its settings."""

    weights: str
    """fp32 or bf16: of parameters and gradients."""
    kind: str = "c3o"
    """c3o, adamw, optimi or bitsandbytes."""
    state: str = "fp32"
    skip: bool = False
    clip: bool = True
    error_bits: int = 0
    sphere: bool = False
    """All tensors on a sphere; with `skip` hidden matrices alone, the others skip: what the GPU profile runs."""
    idle: bool = False
    """The clip is far above the norm, as in a settled run; else every step clips."""

    @property
    def name(self) -> str:
        """For people and for the evidence's keys."""
        if self.kind != "c3o":
            return {"adamw": "torch AdamW, fused", "optimi": "optimi AdamW", "bitsandbytes": "bitsandbytes AdamW8bit"}[
                self.kind
            ] + (", + clip_grad_norm_" if self.clip else "")
        norms = ["sphere"] * self.sphere + ["norm skip"] * self.skip
        parts = ["C3O", f"{self.state} state", " and ".join(norms) or "exact norms"]
        parts += ["8 error bits"] * bool(self.error_bits) + ["no clip"] * (not self.clip) + ["clip idle"] * self.idle
        return ", ".join(parts)

    def traffic(self, hidden_share: float) -> float:
        """Counted bytes of memory traffic per parameter and step; `hidden_share` of all are in hidden matrices."""
        p = 4 if self.weights == "fp32" else 2
        if self.kind != "c3o":  # reads p g m v, writes p m v; the clip reads g for the norm, then reads and writes it
            state = 2.0 if self.kind == "bitsandbytes" else 2.0 * p
            return 3 * p + 2 * state + 3 * p * self.clip
        state, error = _BYTES[self.state], self.error_bits / 8
        update = 3 * p + 2 * state + 2 * error  # reads p g m v, writes p m v
        measure = 2 * p + state + error
        always = (hidden_share if self.sphere else 0.0) if self.skip else 1.0  # measured in every step
        measured = always + (1 - always) / PERIOD
        # Of tensors that are always measured, the measuring pass sums the gradients' squares: on a sphere while the
        # clip is idle, under a cap while that is idle, as it is here.
        early = always if self.idle or not self.sphere else 0.0
        return update + measured * measure + p * self.clip * (1 - early)


def hidden(shape: Sequence[int]) -> bool:
    """A hidden matrix, and not an embedding's or a head's."""
    return len(shape) == 2 and shape[0] < 30_000


SIDES = (
    Side("fp32", "adamw", clip=False), Side("fp32", "adamw"), Side("fp32"), Side("fp32", skip=True),
    Side("fp32", skip=True, clip=False),
    Side("fp32", state="bf16", skip=True), Side("fp32", state="int8", skip=True),
    Side("bf16", "adamw", state="bf16", clip=False), Side("bf16", "adamw", state="bf16"),
    Side("bf16", "optimi", state="bf16", clip=False), Side("bf16", "bitsandbytes", state="int8", clip=False),
    Side("bf16", state="bf16"), Side("bf16", state="bf16", idle=True), Side("bf16", state="bf16", skip=True),
    Side("bf16", state="bf16", skip=True, clip=False), Side("bf16", state="int8"),
    Side("bf16", state="int8", skip=True), Side("bf16", state="int8", skip=True, clip=False),
    Side("bf16", state="int4"), Side("bf16", state="int4", skip=True),
    Side("bf16", state="int4", skip=True, error_bits=8),
    Side("fp32", sphere=True), Side("bf16", state="bf16", sphere=True), Side("bf16", state="int8", sphere=True),
    Side("bf16", state="bf16", sphere=True, idle=True), Side("bf16", state="bf16", sphere=True, skip=True),
    Side("bf16", state="bf16", sphere=True, skip=True, idle=True),
)  # fmt: skip


def absent(side: Side) -> bool:
    """Whether the side's package is not installed here."""
    try:
        importlib.import_module({"optimi": "optimi", "bitsandbytes": "bitsandbytes"}.get(side.kind, "torch"))
    except ImportError:
        return True
    return False


def make(side: Side, params: list[Any], foreach: bool | None = None) -> tuple[Any, Callable[[], object]]:
    """(optimizer, one step of it on the gradients that are there). Betas and decay are the same for all.

    The learning rate is too small for parameters to get anywhere in a run, whichever side steps them.
    """
    import torch

    common: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    if side.kind == "c3o":
        from eco_llm.optim.c3o import C3O

        state = {"fp32": "float32", "bf16": "bfloat16"}.get(side.state, side.state)
        on_sphere = [p for p in params if side.sphere and (hidden(p.shape) or not side.skip)]
        others = [p for p in params if not side.sphere or (side.skip and not hidden(p.shape))]
        groups: list[dict[str, Any]] = [{"params": on_sphere, "sphere": 20.0}, {"params": others}]
        c3o = C3O(
            [group for group in groups if group["params"]], lr=1e-5, state_dtype=state, error_bits=side.error_bits,
            grad_clip=(1e3 if side.idle else 1.0) if side.clip else 0.0,
            trust_norm_refresh_drift=0.02 if side.skip else 0.0, foreach=foreach, **common,
        )  # fmt: skip
        return c3o, c3o.step
    optimizer: Any
    if side.kind == "adamw":
        fused = params[0].device.type == "cuda"
        optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True, capturable=fused, **common)
    else:
        module: Any = importlib.import_module(side.kind)
        cls = module.AdamW if side.kind == "optimi" else module.optim.AdamW8bit
        optimizer = cls(params, lr=1e-5, **common)

    def step() -> None:
        if side.clip:
            torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()

    return optimizer, step


def parameters(shapes: Sequence[tuple[int, ...]], weights: str, device: Any) -> list[Any]:
    """Parameters of those shapes with gradients, from a fixed seed."""
    import torch

    gen = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    result = []
    for shape in shapes:
        p = torch.nn.Parameter((0.02 * torch.randn(shape, generator=gen, device=device)).to(dtype))
        p.grad = (1e-3 * torch.randn(shape, generator=gen, device=device)).to(dtype)
        result.append(p)
    return result


def sigma_shapes() -> list[tuple[int, ...]]:
    """Parameter shapes of the SigmaLLM default."""
    import torch

    from eco_llm.config import SigmaConfig
    from eco_llm.model.sigma_llm import SigmaLLM

    with torch.device("meta"):
        return [tuple(p.shape) for p in SigmaLLM(SigmaConfig()).parameters()]


def decoder_shapes(width: int = 1024, layers: int = 24, vocab: int = 50304) -> list[tuple[int, ...]]:
    """A plain decoder with tied embedding and no biases; by default of 355M parameters."""
    block = [(width,), (3 * width, width), (width, width), (width,), (4 * width, width), (width, 4 * width)]
    return [(vocab, width), (1024, width), *(block * layers), (width,)]


def value(params: list[Any], optimizer: Any) -> list[Any]:
    """Parameters in float64, their error bits included."""
    from eco_llm.optim.rounding import joined_weight

    found = []
    for p in params:
        error = optimizer.state[p].get("error")
        found.append((p.detach() if error is None else joined_weight(p.detach(), error)).double())
    return found


def check(side: Side, device: Any) -> float:
    """Raise GateError unless `side` does what the for-loop does; return the relative difference of the change."""
    import torch

    changes = []
    for foreach in (None, False):
        params = parameters(GATE_SHAPES, side.weights, device)
        optimizer, _ = make(side, params, foreach)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        before = [p.detach().double() for p in params]
        for i in range(GUESSED_STEPS):
            fresh = parameters(GATE_SHAPES, side.weights, device)
            for p, q in zip(params, fresh, strict=True):
                p.grad = q.grad * (1 + i) ** 2
            optimizer.step()
        after = value(params, optimizer)
        changes.append(torch.cat([(a - b).reshape(-1) for a, b in zip(after, before, strict=True)]))
    difference = float((changes[0] - changes[1]).norm() / changes[1].norm())
    if not difference <= TOLERANCE[side.weights]:
        raise GateError(
            f"{side.name}, {side.weights} weights: {difference:.3g} from the for-loop; no speed is reported"
        )
    return difference


def check_against_adamw(device: Any) -> float:
    """C3O without Nesterov, trust region and clip is AdamW: raise GateError if it is not."""
    import torch

    ours, theirs = (parameters(GATE_SHAPES, "fp32", device) for _ in range(2))
    c3o, _ = make(Side("fp32", clip=False), ours)
    adamw, _ = make(Side("fp32", "adamw", clip=False), theirs)
    for group in (*c3o.param_groups, *adamw.param_groups):
        group["lr"] = 1e-3
    c3o.param_groups[0].update(trust_radius=0.0, nesterov=False)
    for _ in range(3):
        c3o.step()
        adamw.step()
    a, b = (torch.cat([p.detach().reshape(-1) for p in side]) for side in (ours, theirs))
    difference = float((a - b).norm() / b.norm())
    if not difference <= ADAMW_TOLERANCE:
        raise GateError(f"C3O without Nesterov and a trust region: {difference:.3g} from AdamW; no speed is reported")
    return difference


def compile_kernels(side: Side) -> None:
    """Fill the kernel cache for one side; runs in a process of its own, so that sides compile side by side."""
    set_cache_dirs()
    import torch

    params = parameters(((64, 64), (9,)), side.weights, torch.device("cuda"))
    optimizer, step = make(side, params)
    step()
    optimizer.make_capturable()
    torch.cuda.synchronize()


def against(a: list[float], b: list[float]) -> Comparison:
    """Median a / median b of paired samples with its bootstrap interval, as `common.interleave` gives it."""
    pairs = np.array([a, b]).T
    draws = np.random.default_rng(0).integers(len(pairs), size=(10_000, len(pairs)))
    medians = np.median(pairs[draws], axis=1)
    low, high = np.percentile(medians[:, 0] / medians[:, 1], [2.5, 97.5])
    middle = np.median(pairs, axis=0)
    return Comparison(a, b, *map(float, (middle[0], middle[1], middle[0] / middle[1], low, high)))


def recorded(optimizer: Any, step: Callable[[], object], side: Side) -> tuple[Callable[[], object], str]:
    """`step` as a CUDA graph and "graph"; itself and "eager" for what is not recorded."""
    import torch

    if side.kind not in ("c3o", "adamw"):
        return step, "eager"
    if side.kind == "c3o":
        optimizer.make_capturable()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay, "graph"


def measure(
    shape: str, shapes: Sequence[tuple[int, ...]], sides: Sequence[Side], device: Any, rounds: int, steps: int,
    copy_rate: float,
) -> tuple[list[list[Any]], dict[str, float], list[dict[str, Any]]]:  # fmt: skip
    """Table rows, summary and samples of one set of shapes; parameters and gradients are shared by a type's sides."""
    from steps import clean, seconds_each

    on_cuda = device.type == "cuda"
    rows: list[list[Any]] = []
    summary: dict[str, float] = {}
    samples: list[dict[str, Any]] = []
    for weights in ("fp32", "bf16"):
        mine = [s for s in sides if s.weights == weights]
        params = parameters(shapes, weights, device)
        count = sum(p.numel() for p in params)
        runs: dict[Side, Callable[[], float]] = {}
        how: dict[Side, str] = {}
        optimizers = {}
        wait = None
        kept = [p.grad.clone() for p in params]

        def restore(params: list[Any] = params, kept: list[Any] = kept) -> None:
            """torch's clip scales what all sides share in place; a side after it would have nothing to clip."""
            for p, gradient in zip(params, kept, strict=True):
                p.grad.copy_(gradient)

        for side in mine:
            restore()
            optimizer, step = make(side, params)
            step()
            if on_cuda:
                import torch

                wait = torch.cuda.synchronize
                step, how[side] = recorded(optimizer, step, side)
            runs[side] = seconds_each(step, wait, steps)
            optimizers[side] = optimizer
        times: dict[Side, list[float]] = {side: [] for side in mine}
        for i in range(rounds + 1):
            for side in mine:
                restore()
                seconds = runs[side]()
                if on_cuda and side.kind == "c3o" and side.clip:  # on a CPU C3O's clip, too, scales in place
                    scale = optimizers[side].metrics()["c3o_grad_clip_scale"]
                    if (scale == 1.0) != side.idle:
                        raise GateError(f"{side.name}: the clip's factor was {scale}")
                if i:  # the first round warms up
                    times[side].append(1e3 * seconds * 1e8 / count)
        baseline = next(s for s in mine if s.kind == "adamw" and s.clip)
        for side in mine:
            optimizer = optimizers[side]
            if side.skip and not optimizer.metrics()["c3o_trust_norm_skipped"] + optimizer.metrics()[
                "c3o_trust_norm_exact"
            ] == len(params):
                raise GateError(f"{side.name}: tensors are missing from the trust region's counts")
            if side.skip and on_cuda:
                step = runs[side]
                skipped = max(_skipped_after(optimizer, step) for _ in range(2))
                able = sum(not (side.sphere and hidden(p.shape)) for p in params)
                if skipped < 0.9 * able:
                    raise GateError(f"{side.name}: only {skipped:g} of {able} norms were skipped")
            result = against(times[baseline], times[side])
            state = sum(
                v.numel() * v.element_size()
                for s in optimizer.state.values() for v in s.values() if hasattr(v, "element_size")
            ) / count  # fmt: skip
            traffic = side.traffic(sum(p.numel() for p in params if hidden(p.shape)) / count)
            share = traffic * 1e8 / copy_rate * 1e3 / result.median_b
            rows.append([
                shape, weights, side.name, f"{result.median_b:.3f}", f"{result.ratio:.2f}",
                f"{result.ratio_low:.2f} – {result.ratio_high:.2f}", f"{state:.3f}", f"{traffic:.1f}",
                f"{share:.2f}", how.get(side, "eager"),
            ])  # fmt: skip
            key = f"{shape}_{weights}_{side.name}".replace(" ", "_").replace(",", "").replace("+", "and")
            summary |= {
                f"{key}_ms_per_100m": result.median_b, f"{key}_ratio": result.ratio,
                f"{key}_ratio_low": result.ratio_low, f"{key}_ratio_high": result.ratio_high,
                f"{key}_state_bytes": state, f"{key}_copy_share": share,
            }  # fmt: skip
            samples += [
                {"shape": shape, "weights": weights, "side": side.name, "round": i, "ms_per_100m": x}
                for i, x in enumerate(times[side])
            ]
            print(*rows[-1], sep="\t", flush=True)
        summary[f"{shape}_parameters"] = count
        del params, optimizers, runs, optimizer
        clean(device)
    return rows, summary, samples


def _skipped_after(optimizer: Any, sample: Callable[[], float]) -> float:
    """Norms skipped in the last step of one more sample; a period may end on the step that measures."""
    sample()
    return float(optimizer.metrics()["c3o_trust_norm_skipped"])


def main(argv: Sequence[str] | None = None, shapes: dict[str, list[tuple[int, ...]]] | None = None) -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--steps", type=int, default=PERIOD, help="steps in a sample; a multiple of 17 is fair to skips"
    )
    parser.add_argument("--skip-warm-up", action="store_true", help="compile kernels as they come, in this process")
    arguments = parser.parse_args(argv)
    set_cache_dirs()

    import torch
    from steps import measured_rates

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    missing = sorted({side.kind for side in SIDES if absent(side)})
    sides = [side for side in SIDES if side.kind not in missing]
    if device.type == "cpu":  # bitsandbytes and optimi have nothing to show there
        sides = [side for side in sides if side.kind in ("c3o", "adamw")]
    print(f"not installed: {', '.join(missing) or 'none'}")
    ours = [side for side in sides if side.kind == "c3o"]
    if device.type == "cuda" and not arguments.skip_warm_up:
        workers = min(len(ours), max(1, (os.cpu_count() or 2) // 2))
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_kernels, ours))
    errors = {f"{side.weights}_{side.name}": check(side, device) for side in ours}
    adamw_error = check_against_adamw(device)
    print(f"gate: at most {max(errors.values()):.2g} from the for-loop, {adamw_error:.2g} from AdamW")

    copy_rate = measured_rates(device)["copy_bytes_per_s"]
    summary: dict[str, Any] = {
        "copy_bytes_per_s": copy_rate, "largest_error": max(errors.values()), "adamw_error": adamw_error,
    }  # fmt: skip
    rows: list[list[Any]] = []
    samples: list[dict[str, Any]] = []
    for name, these in (shapes or {"SigmaLLM default": sigma_shapes(), "355M decoder": decoder_shapes()}).items():
        more, numbers, raw = measure(name, these, sides, device, arguments.rounds, arguments.steps, copy_rate)
        rows += more
        summary |= numbers
        samples += raw
    header = [
        "shapes", "weights", "optimizer", "ms / 100M", "AdamW + clip ÷ this", "95% interval", "state, B/param",
        "traffic, B/param", "of copy", "how",
    ]  # fmt: skip
    payload = {
        "what": "an optimizer step", "unit": "ms per 100M parameters", "steps_in_a_sample": arguments.steps,
        "absent": missing, "gate": errors, "table": {"header": header, "rows": rows}, "summary": summary,
        "median_ms_of_all_samples": statistics.median(s["ms_per_100m"] for s in samples), "samples": samples,
    }  # fmt: skip
    print(write_evidence("c3o_speed", payload, device=str(device)))


if __name__ == "__main__":
    main()
