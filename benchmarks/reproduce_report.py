"""Claim: the report's own experiments, run again with this code; its author's figures beside ours.

    python benchmarks/reproduce_report.py [--only NAME …] [--rounds N] [--seconds S] [--train-steps N]
        [--results FOLDER] [ARGUMENTS OF eco_train train …]

NAME is one of EXPERIMENTS (below); `--only`, which may be repeated, leaves what the evidence file has of the others.
By default the profile of train_sigma_args.txt (the report's 4 × 512 tokens) on a GPU, a small model on a CPU.

Every experiment builds its sides from the same weights and batches. Gate first: the losses of their first GATE_STEPS
steps, updates between them included, agree to 1e-4 relative (fp32) or 1e-2 (bf16). Then windows of A and B in turn in
this process; `--seconds` is what an experiment's windows should take. A red gate is recorded, with no speed, and so is
a failure; the others go on, and the exit code is 1. The author's figures and the words beside ours: report_figures.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common import RESULTS, Comparison, GateError, compared, hardware_slug, interleave, require_close, write_evidence
from report_figures import AUTHOR, table

from eco_llm.cli.args_file import expand
from eco_llm.cli.parse import parse
from eco_llm.config import C3OConfig, InstantConfig, TrainConfig
from eco_llm.errors import UserError
from eco_llm.perf import environment
from eco_llm.runtime import Runtime, set_cache_dirs

if TYPE_CHECKING:
    from steps import Ours
    from torch.optim import Optimizer

    from eco_llm.data.loader import Batch

CLAIM = "reproduce_report"
# The report's own optimizer: float32, under a trust region, whose norms may be skipped; the profiles have moved on.
ITS_RULE = ["--c3o-sphere", "0", "--no-c3o-nesterov"]
ON_GPU = [
    "@train_sigma_args.txt", *ITS_RULE, "--lr", "1e-3",
    "--weights-dtype", "fp32", "--c3o-state-dtype", "fp32",
]  # fmt: skip
ON_CPU = ["@presets/quickstart_cpu.txt", *ITS_RULE, "--lr", "4e-3", "--seq-len", "512", "--batch-size", "2"]
GATE_STEPS = 5
MOST_STEPS = 20  # of a window
LR = 1e-4  # of compared sides: updates that a loss shows, and no first steps so wild that rounding decides them
PHASES = ("forward", "backward", "opt_step", "zero_grad")
Entry = dict[str, Any]


class Side:
    """One side of an experiment: steps as the trainer takes them, INSTANT's reviews between them included."""

    def __init__(self, ours: Ours, number: int = 0) -> None:
        self.ours = ours
        self.number = number
        self.reviews = 0
        self.window_steps = 1
        self.core: list[float] = []
        """Of every window: seconds of a step's core, by the phase timer."""
        self.first_step_s = 0.0

    def step(self) -> Any:
        """One step; the loss, on the device."""
        loss = self.ours.step()
        self.number += 1
        if self.ours.model.stack.review_due(self.number):
            self.ours.review(self.number)
            self.reviews += 1
        return loss

    def losses(self, steps: int) -> list[float]:
        """Of so many steps, read one by one; also notes how long the first took."""
        found = []
        for _ in range(steps):
            started = time.perf_counter()
            found.append(float(self.step()))
            self.first_step_s = self.first_step_s or time.perf_counter() - started
        return found

    def seconds(self) -> float:
        """Of a step now, roughly: to choose the length of windows."""
        self.ours.wait()
        started = time.perf_counter()
        self.step()
        self.ours.wait()
        return time.perf_counter() - started

    def window(self) -> float:
        """Host seconds a step, the device being idle before and after: a measure for `interleave`."""
        self.ours.wait()
        first, started = len(self.ours.times), time.perf_counter()
        for _ in range(self.window_steps):
            self.step()
        self.ours.wait()
        seconds = (time.perf_counter() - started) / self.window_steps
        self.core.append(sum(t.core_step_time_s for t in self.ours.times[first:]) / self.window_steps)
        return seconds

    def phases(self, steps: int) -> dict[str, float]:
        """Mean seconds of every phase over the last steps."""
        times = self.ours.times[-steps:]
        return {name: sum(getattr(t, f"phase_{name}_s") for t in times) / len(times) for name in PHASES}

    def work(self) -> dict[str, float]:
        """What one step asks of PyTorch and the driver, counted by torch.profiler.

        `host_reads`: values that the host waited for; `operators`: calls of PyTorch operators, nested ones included; on
        a GPU `launches`: kernels, copies, fills and graphs put on the stream.
        """
        import torch
        from torch.profiler import ProfilerActivity, profile

        on_gpu = torch.cuda.is_available()
        self.ours.wait()
        with profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])) as trace:
            self.step()
            self.ours.wait()
        counts = {event.key: event.count for event in trace.key_averages()}
        found = {
            "host_reads": counts.get("aten::_local_scalar_dense", 0),
            "operators": sum(n for name, n in counts.items() if name.startswith("aten::")),
        }
        if on_gpu:
            found["launches"] = sum(n for name, n in counts.items() if name.startswith(_LAUNCHES))
        return found


_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


@dataclasses.dataclass
class Bench:
    """What every experiment is given."""

    config: TrainConfig
    runtime: Runtime
    rounds: int
    seconds: float
    train_steps: int

    def __post_init__(self) -> None:
        from steps import Batches, Text

        t = self.config.training
        self.batches = Batches(self.config.model.vocab_size, t.batch_size, t.seq_len, self.runtime.device)
        self.text = Text(t.batch_size, t.seq_len, self.runtime.device)

    @property
    def on_gpu(self) -> bool:
        return self.runtime.device.type == "cuda"

    @property
    def tolerance(self) -> float:
        """Of the gate."""
        return 1e-4 if str(self.runtime.compute_dtype) == "torch.float32" else 1e-2

    def side(
        self,
        *,
        source: Iterator[Batch] | None = None,
        compile_blocks: bool | None = None,
        graph: bool = True,
        c3o: C3OConfig | None = None,
        instant: InstantConfig | None = None,
        build: Callable[..., Optimizer] | None = None,
        chunk: Literal[128, 256] | None = None,
        lr: float = LR,
        number: int = 0,
    ) -> Side:
        """A side with the profile's settings but for those given; `number` is that of the step before its first."""
        from steps import Ours

        from eco_llm.optim.factory import build_optimizer

        ours = Ours(
            self.config.model if chunk is None else dataclasses.replace(self.config.model, mamba_chunk=chunk),
            source or self.batches.cycle(), self.runtime,
            compile_blocks=self.runtime.compile if compile_blocks is None else compile_blocks, graph=graph,
            settings=dataclasses.replace(self.config.optimizer, lr=lr),
            c3o=c3o or self.config.c3o, seed=self.config.training.seed, instant=instant,
            build=build or build_optimizer,
        )  # fmt: skip
        return Side(ours, number)

    def gate(self, entry: Entry, a: tuple[str, Side], b: tuple[str, Side]) -> None:
        """Record what both sides are, and their first losses; refuse if they differ."""
        for key, (name, side) in (("a", a), ("b", b)):
            entry[key] = f"{name}; {side.ours.how}"
        first_a, first_b = (side.losses(GATE_STEPS) for _, side in (a, b))
        entry["gate"] = {"tolerance": self.tolerance, "losses_a": first_a, "losses_b": first_b}
        self.require_equal(first_a, first_b, self.tolerance)

    @staticmethod
    def require_equal(first_a: list[float], first_b: list[float], tolerance: float) -> None:
        for number, (x, y) in enumerate(zip(first_a, first_b, strict=True), start=1):
            require_close(x, y, relative=tolerance, what=f"loss of step {number}")

    def interleaved(self, a: Side, b: Side, seconds: float) -> Comparison:
        """Windows in turn, as many steps each as the time allows."""
        both = a.seconds() + b.seconds()
        a.window_steps = b.window_steps = max(1, min(MOST_STEPS, round(seconds / (self.rounds * both))))
        return interleave(a.window, b.window, self.rounds)

    def compare(self, entry: Entry, a: Side, b: Side) -> None:
        """Fill in what the table tells of two sides: step, core, phases."""
        result = self.interleaved(a, b, self.seconds)
        core = list(zip(a.core[-self.rounds :], b.core[-self.rounds :], strict=True))
        steps = self.rounds * a.window_steps
        entry["comparison"] = result.summary() | {"steps_per_window": a.window_steps}
        entry["core"] = compared(core).summary()
        entry["phases"] = {"a": a.phases(steps), "b": b.phases(steps)}
        entry["samples"] = [
            {**sample, "core_a": x, "core_b": y} for sample, (x, y) in zip(result.samples(), core, strict=True)
        ]

    def also(self, entry: Entry, what: str, a: Side, b: Side) -> None:
        """A further side against the experiment's A, which passed its gate."""
        gate = entry["gate"]
        self.require_equal(gate["losses_a"], b.losses(GATE_STEPS), gate["tolerance"])
        result = self.interleaved(a, b, self.seconds / 2)
        entry.setdefault("also", {})[what] = result.summary() | {"b": b.ours.how}
        entry["samples"] += [{**sample, "also": what} for sample in result.samples()]


# ---- the experiments: each fills in its entry; GateError ends it without a speed -------------------------------


def hot_path(bench: Bench, entry: Entry) -> None:
    """A: per-parameter C3O with host reads; B: the fused step. Neither in a graph, which a read would not survive."""
    from per_parameter_c3o import LoopC3O, PerParameterC3O, built_by

    slow = bench.side(build=built_by(PerParameterC3O), graph=False)
    fused = bench.side(graph=False)
    bench.gate(entry, ("one parameter at a time, host reads", slow), ("fused", fused))
    bench.compare(entry, slow, fused)
    entry["facts"] = {
        "parameters": sum(1 for _ in slow.ours.model.parameters()),
        "work": {"a": slow.work(), "b": fused.work()},
    }
    bench.also(entry, "no_reads", slow, bench.side(build=built_by(LoopC3O), graph=False))
    if bench.on_gpu:
        bench.also(entry, "graph", slow, bench.side())


def torch_compile(bench: Bench, entry: Entry) -> None:
    """A: compiled blocks; B: eager ones; each as `eco_train` runs it."""
    on, off = bench.side(compile_blocks=True), bench.side(compile_blocks=False)
    bench.gate(entry, ("compile on", on), ("off", off))
    bench.compare(entry, on, off)
    entry["facts"] = {"first_step_s": {"a": on.first_step_s, "b": off.first_step_s},
                      "work": {"a": on.work(), "b": off.work()}}  # fmt: skip


def trust_skip(bench: Bench, entry: Entry) -> None:
    """A: every norm measured; B: `--c3o-trust-norm-refresh-drift 0.02`."""
    drift = bench.config.c3o.c3o_trust_norm_refresh_drift or 0.02
    exact, skip = (
        bench.side(c3o=dataclasses.replace(bench.config.c3o, c3o_trust_norm_refresh_drift=x)) for x in (0.0, drift)
    )
    bench.gate(entry, ("drift 0.0", exact), (f"drift {drift:g}", skip))
    bench.compare(entry, exact, skip)
    figures = skip.ours.update.metrics()
    entry["facts"] = {"drift": drift, "skipped": figures["c3o_trust_norm_skipped"],
                      "exact": figures["c3o_trust_norm_exact"]}  # fmt: skip


def chunk(bench: Bench, entry: Entry) -> None:
    """A: SSD chunk 128; B: 256."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    compilable = not bench.on_gpu or version >= (2, 13)  # SigmaLLM.compile_blocks refuses a pinned 256 before that
    blocks = bench.runtime.compile and compilable
    small, large = bench.side(chunk=128, compile_blocks=blocks), bench.side(chunk=256, compile_blocks=blocks)
    bench.gate(entry, ("chunk 128", small), ("chunk 256", large))
    bench.compare(entry, small, large)
    entry["facts"] = {"length": bench.config.training.seq_len}


def tolerance(bench: Bench, entry: Entry) -> None:
    """A: fixed-point inversion to 2e-3; B: to 3e-3; a model that was trained a little, its weights then held."""
    import torch

    t, interval = bench.config.training, InstantConfig.instant_int4_probe_interval
    trained = bench.side(source=bench.text.cycle(), lr=bench.config.optimizer.lr)
    curve = [float(trained.step())]
    for _ in range(bench.train_steps):
        loss = trained.step()
    curve.append(float(loss))
    if not curve[1] < curve[0]:
        raise GateError(f"the model was not trained: its loss went from {curve[0]} to {curve[1]}")
    weights = {name: value.clone() for name, value in trained.ours.model.state_dict().items()}
    del trained, loss
    # One batch that training has not seen serves probe, gradients and windows: on others a block might trip half-way.
    batch_of_all = next(itertools.islice(bench.text.cycle(), bench.train_steps + 1, None))
    held_out = batch_of_all.to(bench.runtime.device)

    def make(tol: float | None) -> Side:
        instant = None if tol is None else InstantConfig(instant_mode="fixed-point", instant_reversible_tol=tol)
        # No graph: gradients are wanted, and a graph keeps them to itself.
        side = bench.side(source=itertools.repeat(batch_of_all), graph=False, instant=instant, lr=0.0, number=interval)
        side.ours.model.load_state_dict(weights)
        side.ours.step()
        side.ours.wait()
        if tol is not None:
            side.ours.review(interval)  # the probe that decides
        return side

    def gradient(side: Side) -> dict[str, torch.Tensor]:
        model = side.ours.model
        model.stack.begin_step()
        with bench.runtime.autocast():
            loss = model.loss(held_out.inputs, held_out.targets)
        loss.backward()
        found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    plain, a, b = make(None), make(2e-3), make(3e-3)
    exact = gradient(plain)
    norm = torch.stack([g.square().sum() for g in exact.values()]).sum().sqrt()
    facts: dict[str, Any] = {"train_steps": bench.train_steps, "losses": curve, "tokens": t.batch_size * t.seq_len}
    for key, side in (("a", a), ("b", b)):
        found = gradient(side)
        wrong = torch.stack([(found[name] - g).square().sum() for name, g in exact.items()]).sum().sqrt() / norm
        stack = side.ours.model.stack
        names, values = stack.metrics_tensor()
        assert values is not None
        verdicts = dict(zip(names, values.tolist(), strict=True))
        facts[key] = {
            **stack.figures(), "gradient_error": float(wrong), "mamba_blocks": stack.modes.count("fixed-point"),
            "residual": verdicts["instant_inversion_rel_residual"], "rows": verdicts["instant_reconstruction_error"],
        }  # fmt: skip
        if verdicts["instant_tripped_blocks"]:
            raise GateError(f"the gate tripped in {verdicts['instant_tripped_blocks']:.0f} blocks of side {key}")
    del exact, found
    bench.gate(entry, ("tolerance 2e-3", a), ("tolerance 3e-3", b))
    bench.require_equal(plain.losses(GATE_STEPS), entry["gate"]["losses_b"], entry["gate"]["tolerance"])
    bench.compare(entry, a, b)
    # What inverting costs beyond a step that keeps everything, in forwards.
    against = bench.interleaved(b, plain, bench.seconds / 2)
    steps = bench.rounds * b.window_steps
    entry["also"] = {"none": against.summary() | {"b": plain.ours.how}}
    entry["samples"] += [{**sample, "also": "none"} for sample in against.samples()]
    entry["phases"]["none"] = plain.phases(steps)
    entry["phases"]["b"] = b.phases(steps)  # of the same windows
    for key, side in (("a", a), ("b", b)):
        if trips := sum(side.ours.model.stack.state_dict()["trips"]):
            raise GateError(f"INSTANT's gate tripped {trips} times on side {key} while it was timed")
    entry["facts"] = facts


def int4(bench: Bench, entry: Entry) -> None:
    """A: 4 bits tried, and refused, after every step; B: 8 bits stay until the next periodic probe."""
    # Refused by its threshold: a retry is an attempt that fails, and both sides then compute the same.
    common = {"instant_mode": "compress", "instant_bits": "auto", "instant_error_threshold": 1e-6}
    interval = InstantConfig.instant_int4_probe_interval
    retry, sticky = (
        # From step 50 on, where the product's early probes are over.
        bench.side(instant=InstantConfig(**common, instant_int4_probe_interval=n), number=49)  # type: ignore[arg-type]
        for n in (1, interval)
    )
    bench.gate(entry, ("4 bits tried every step", retry), (f"every {interval} steps", sticky))
    before = retry.reviews, sticky.reviews, retry.number, sticky.number
    bench.compare(entry, retry, sticky)
    entry["facts"] = {
        "interval": interval,
        "probes": {"a": retry.reviews - before[0], "b": sticky.reviews - before[1]},
        "steps": {"a": retry.number - before[2], "b": sticky.number - before[3]},
        "bits": {k: s.ours.model.stack.figures()["instant_bits"] for k, s in (("a", retry), ("b", sticky))},
    }


def batch(bench: Bench, entry: Entry) -> None:
    """A: the profile's batch; B: half as many again, under a cap that A fits and B does not; B recomputed, beside."""
    import torch
    from steps import Batches, clean

    from eco_llm.training.outcome import is_out_of_memory

    if not bench.on_gpu:
        entry["undefined"] = "not defined on a CPU: no memory cap"
        return
    t, device = bench.config.training, bench.runtime.device
    small, large = t.batch_size, t.batch_size + max(1, t.batch_size // 2)
    total = torch.cuda.get_device_properties(device).total_memory

    def attempt(size: int, instant: InstantConfig | None = None) -> dict[str, Any]:
        clean(device)
        torch.cuda.reset_peak_memory_stats(device)
        source = Batches(bench.config.model.vocab_size, size, t.seq_len, device).cycle()
        try:
            # Eager and without a graph: no private pools, no workspaces that come with compiling.
            side = bench.side(source=source, compile_blocks=False, graph=False, instant=instant)
            losses = side.losses(GATE_STEPS)
            samples = [side.window() for _ in range(max(3, bench.rounds // 2))]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return {"out_of_memory": True}
        return {
            "losses": losses, "tokens_per_s": size * t.seq_len / sorted(samples)[len(samples) // 2],
            "samples": samples, "peak_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.max_memory_reserved(device), "how": side.ours.how,
        }  # fmt: skip

    free_a, free_b = attempt(small), attempt(large)
    # What the cap bounds is reserved; what a step cannot do without is allocated.
    fits = free_a["reserved_bytes"] if free_a["reserved_bytes"] < free_b["peak_bytes"] else free_a["peak_bytes"]
    cap = (fits + free_b["peak_bytes"]) // 2
    try:
        torch.cuda.set_per_process_memory_fraction(cap / total, device)
        capped_a, capped_b = attempt(small), attempt(large)
        recomputed = attempt(large, InstantConfig(instant_mode="recompute"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        clean(device)
    entry |= {"a": f"batch {small}, {free_a['how']}", "b": f"batch {large}, {free_a['how']}"}
    entry["gate"] = {"tolerance": bench.tolerance, "losses_a": free_a["losses"], "losses_b": capped_a.get("losses", [])}
    if "out_of_memory" in capped_a or "out_of_memory" not in capped_b:
        raise GateError(f"a cap of {cap} bytes does not separate batch {small} from batch {large}")
    bench.require_equal(free_a["losses"], capped_a["losses"], bench.tolerance)
    found = {"free_a": free_a, "free_b": free_b, "capped_a": capped_a, "recomputed_b": recomputed}
    entry["samples"] = [
        {"round": i, "side": name, "seconds": s}
        for name, x in found.items()
        for i, s in enumerate(x.pop("samples", []))
    ]
    entry["facts"] = {"small": small, "large": large, "cap_bytes": cap, **found}


def phases(bench: Bench, entry: Entry) -> None:
    """The step as `eco_train` runs it, by the definitions of window_10m_bottlenecks.json. One side alone."""
    from eco_llm.perf.window import RollingWindow

    side = bench.side()
    entry["a"] = side.ours.how
    first = side.losses(GATE_STEPS)
    steps = max(20, min(200, round(bench.seconds / side.seconds())))
    side.window_steps = steps
    side.window()
    times, means = side.ours.times[-steps:], side.phases(steps)
    last = float(side.step())
    entry["gate"] = {"tolerance": 0.0, "losses_a": first, "losses_b": [last]}
    if not (math.isfinite(last) and last < first[0]):
        raise GateError(f"the loss went from {first[0]} to {last}")
    t = bench.config.training
    window = RollingWindow(t.batch_size * t.seq_len, mode="events" if bench.on_gpu else "host", sync_boundaries=False)
    for step in times:
        window.add(step)
    report = window.report({})
    entry["phases"] = {"a": means}
    entry["facts"] = {
        name: {part["stage"]: part["percent"] for part in report[name]}
        for name in ("stages", "train_phase", "optimizer_phase")
    } | {"steps": report["steps"]}
    entry["samples"] = [
        {"round": i, "core": s.core_step_time_s, **{name: getattr(s, f"phase_{name}_s") for name in PHASES}}
        for i, s in enumerate(times)
    ]


EXPERIMENTS: dict[str, Callable[[Bench, Entry], None]] = {
    "hot_path": hot_path, "compile": torch_compile, "trust_skip": trust_skip, "chunk": chunk, "tolerance": tolerance,
    "int4": int4, "batch": batch, "phases": phases,
}  # fmt: skip


def run(name: str, bench: Bench) -> Entry:
    """One experiment's entry; with a red gate it has no speed, after a failure only what failed."""
    import torch
    from steps import clean

    from eco_llm.training.outcome import headline

    torch._dynamo.reset()  # what the last experiment compiled counts towards a limit, beyond which blocks run eagerly
    clean(bench.runtime.device)
    entry: Entry = {}
    started = time.perf_counter()
    try:
        EXPERIMENTS[name](bench, entry)
        if "gate" in entry:
            entry["gate"]["passed"] = True
    except GateError as error:
        gate = {**entry.get("gate", {"tolerance": None}), "passed": False, "said": str(error)}
        entry = {key: entry[key] for key in ("a", "b") if key in entry} | {"gate": gate}
    except Exception as error:
        traceback.print_exc()
        entry = {"failed": headline(error)}
    gate = entry.get("gate", {})
    entry.setdefault("samples", [])
    entry["samples"] += [
        {"gate_step": i, "a": a, "b": b}
        for i, (a, b) in enumerate(zip(gate.get("losses_a", []), gate.get("losses_b", []), strict=False), start=1)
    ]
    env = environment.collect(str(bench.runtime.device))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # Windows has none
    entry["measured"] = {"date": env["date"], "commit": env["commit"], "dirty": env["dirty"], "load_average": load,
                         "seconds": time.perf_counter() - started}  # fmt: skip
    return entry


def earlier(path: Path, settings: dict[str, Any]) -> tuple[dict[str, Entry], list[dict[str, Any]]]:
    """(experiments, samples) of the evidence that `--only` adds to; none if there is no file.

    Raises:
        UserError: it was measured with other settings, so that one table would mix two.
    """
    if not path.exists():
        return {}, []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        raise UserError(f"--only: {path.name} was measured with other arguments; measure all, or give --results")
    return found["experiments"], found["samples"]


def main(argv: list[str]) -> int:
    """Measure, print, write the evidence. Exit codes: 0; 1 a red gate or a failure; 2 bad arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", action="append", choices=list(EXPERIMENTS), metavar="NAME", default=None)
    parser.add_argument("--rounds", type=int, default=10, help="pairs of windows in a comparison, at least 2")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="a comparison's windows together; 0: 4 (GPU), 6 (CPU)"
    )
    parser.add_argument("--train-steps", type=int, default=0, help="before the inversion is measured; 0: 300, 50")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the evidence")
    arguments, flags = parser.parse_known_args(argv)
    set_cache_dirs()

    import torch

    try:
        if arguments.rounds < 2 or arguments.seconds < 0 or arguments.train_steps < 0:
            raise UserError("--rounds must be at least 2, --seconds and --train-steps not negative")
        default = ON_GPU if torch.cuda.is_available() else ON_CPU
        config = parse(TrainConfig, expand(flags or default), prog=CLAIM)
        config.validate()
        runtime = Runtime.detect(config.runtime)
        on_gpu = runtime.device.type == "cuda"
        if on_gpu:
            torch.cuda.init()  # lets the environment block name this GPU
        bench = Bench(
            config, runtime, arguments.rounds, arguments.seconds or (4.0 if on_gpu else 6.0),
            arguments.train_steps or (300 if on_gpu else 50),
        )  # fmt: skip
        settings = {"flags": flags or default, "rounds": bench.rounds, "seconds": bench.seconds,
                    "train_steps": bench.train_steps, "dtype": str(runtime.compute_dtype),
                    "tokens_per_step": [config.training.batch_size, config.training.seq_len]}  # fmt: skip
        slug = hardware_slug(environment.collect(str(runtime.device)))
        path = arguments.results / slug / f"{CLAIM}.json"
        experiments, samples = earlier(path, settings) if arguments.only else ({}, [])
    except UserError as error:
        print(f"{CLAIM}: error: {error}", file=sys.stderr)
        return 2

    wanted = [name for name in EXPERIMENTS if name in (arguments.only or EXPERIMENTS)]
    for name in wanted:
        entry = run(name, bench)
        samples = [s for s in samples if s["experiment"] != name]
        samples += [{"experiment": name, **sample} for sample in entry.pop("samples")]
        experiments[name] = entry
        print(name, json.dumps(entry, indent=1, default=str), flush=True)
    experiments = {name: experiments[name] for name in EXPERIMENTS if name in experiments}
    t = config.training
    shown = table(experiments, on_gpu=on_gpu)
    payload = {
        "what": "the report's experiments: A against B, interleaved windows", "unit": "s a step", "settings": settings,
        "author": AUTHOR, "experiments": experiments,
        "table": {"title": f"{t.batch_size} × {t.seq_len}", **shown},
        "summary": {
            "experiments": len(experiments),
            "red": sum(1 for e in experiments.values() if not e.get("gate", {}).get("passed", True)),
            "failed": sum(1 for e in experiments.values() if "failed" in e),
        } | {
            f"{name}_gain_percent": 100 * (e["comparison"]["ratio"] - 1)
            for name, e in experiments.items() if "comparison" in e
        },
        "samples": samples or [{"experiment": name, "samples": 0} for name in experiments],
    }  # fmt: skip
    for row in shown["rows"]:
        print("\n".join(f"  {head}: {cell}" for head, cell in zip(shown["header"], row, strict=True)) + "\n")
    print(write_evidence(CLAIM, payload, device=str(runtime.device), results=arguments.results))
    return int(any("failed" in e or not e.get("gate", {}).get("passed", True) for e in experiments.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
