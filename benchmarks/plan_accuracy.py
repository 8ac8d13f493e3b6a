"""Claim: `eco_train plan` foretells a step's peak memory within 5%, whatever the mode, batch, length and width.

    python benchmarks/plan_accuracy.py [--only REGEX] [--limit-s SECONDS]      (on a machine with an NVIDIA GPU)

Every configuration is built as `eco_train` builds it, trained for three steps on random tokens (and validated once, if
it validates), and measured: `torch.cuda.max_memory_allocated` over all that against the estimate. Beside it: what the
allocator reserved, and what the process holds on the GPU outside the allocator (context, libraries, kernels). Of
fixed-point both forms run: recomputed, as it begins, and inverted by three iterations.
Gate: before each configuration nothing of those before is allocated. One that finds more is not measured, for its
figures would be too high by that, and the run ends with an error that names it.

Uncompiled configurations come first, for compiling takes most of the time; no configuration is begun after `--limit-s`.
The evidence is written anew after each, so a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import GateError, write_evidence

from eco_llm.cli.parse import parse
from eco_llm.config import TrainConfig
from eco_llm.instant.plan.search import job_of
from eco_llm.instant.plan.sizes import Job, Shapes
from eco_llm.instant.plan.step import GIB, estimate
from eco_llm.runtime import set_cache_dirs

EAGER = "--no-torch-compile --cuda-graph off"
CONFIGURATIONS = {
    "none 8x1024": f"{EAGER} --batch-size 8 --seq-len 1024",
    "none 1x8192, D 1024, 12 layers": (
        f"{EAGER} --batch-size 1 --seq-len 8192 --d-model 1024 --n-heads 16 --n-layers 12"
    ),
    "none 8x512, adamw": f"{EAGER} --batch-size 8 --seq-len 512 --optimizer adamw",
    "recompute 64x1024": f"{EAGER} --batch-size 64 --seq-len 1024 --instant-mode recompute",
    "recompute 1x16384": f"{EAGER} --batch-size 1 --seq-len 16384 --instant-mode recompute",
    "recompute 8x1024, 2 micro-steps": f"{EAGER} --batch-size 8 --seq-len 1024 --instant-mode recompute --grad-accum 2",
    "recompute*9,none*9 16x1024": f"{EAGER} --batch-size 16 --seq-len 1024 --instant-mode recompute*9,none*9",
    "coupled 64x1024": f"{EAGER} --batch-size 64 --seq-len 1024 --instant-mode coupled",
    "coupled 8x1024, D 512, 48 layers": (
        f"{EAGER} --batch-size 8 --seq-len 1024 --d-model 512 --n-heads 8 --n-layers 48 --instant-mode coupled"
    ),
    "coupled 1x1024, D 1536, 36 layers, bf16 state": (
        f"{EAGER} --batch-size 1 --seq-len 1024 --d-model 1536 --n-heads 24 --n-layers 36 --instant-mode coupled"
        " --c3o-state-dtype bf16"
    ),
    "coupled 1x1024, D 1536, 36 layers, bf16 weights and state, release": (
        f"{EAGER} --batch-size 1 --seq-len 1024 --d-model 1536 --n-heads 24 --n-layers 36 --instant-mode coupled"
        " --c3o-state-dtype bf16 --weights-dtype bf16 --gradient-release --grad-clip-mode value"
    ),
    "compress 16x1024, 8 bits": f"{EAGER} --batch-size 16 --seq-len 1024 --instant-mode compress --instant-bits 8",
    "compress 16x1024, 4 bits": f"{EAGER} --batch-size 16 --seq-len 1024 --instant-mode compress --instant-bits 4",
    "fixed-point 16x1024": f"{EAGER} --batch-size 16 --seq-len 1024 --instant-mode fixed-point",
    "recompute 16x1024, one graph": (
        "--no-torch-compile --cuda-graph on --batch-size 16 --seq-len 1024 --instant-mode recompute"
    ),
    "coupled 16x1024, one graph": (
        "--no-torch-compile --cuda-graph on --batch-size 16 --seq-len 1024 --instant-mode coupled"
    ),
    "recompute 32x1024, compiled, one graph": (
        "--torch-compile --cuda-graph on --batch-size 32 --seq-len 1024 --instant-mode recompute --eval-interval 0"
    ),
    "coupled 32x1024, compiled, one graph": (
        "--torch-compile --cuda-graph on --batch-size 32 --seq-len 1024 --instant-mode coupled --eval-interval 0"
    ),
    "compress 16x1024, compiled, one graph": (
        "--torch-compile --cuda-graph on --batch-size 16 --seq-len 1024 --instant-mode compress --instant-bits 8"
        " --eval-interval 0"
    ),
}
STEPS = 3
ITERATIONS = (3, 3)
LEFT_OVER = 2**22
"""Bytes that may be allocated before a configuration: small tensors of PyTorch, such as a generator's state, and of
ours, which every training has: tables of rotations, 1 MiB for 8,192 tokens."""


class LeftOverError(Exception):
    """An earlier configuration's memory is still allocated."""


def settings_of(flags: str) -> TrainConfig:
    """Accepted settings of one configuration."""
    config = parse(TrainConfig, flags.split(), prog="plan_accuracy")
    config.validate()
    return config


def job_fields(job: Job) -> dict[str, Any]:
    """What a job was, but for model and modes, which are named apart."""
    return {f.name: getattr(job, f.name) for f in dataclasses.fields(job) if f.name not in ("model", "modes")}


def main(argv: list[str]) -> Path | None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression that a configuration's name must contain")
    parser.add_argument("--limit-s", type=float, default=140.0)
    arguments = parser.parse_args(argv)
    set_cache_dirs()
    import torch

    if not torch.cuda.is_available():
        sys.exit("plan_accuracy: needs a CUDA device")
    started, samples, path = time.monotonic(), list[dict[str, Any]](), None
    refused: list[str] = []
    for name, flags in CONFIGURATIONS.items():
        if not re.search(arguments.only, name):
            continue
        if time.monotonic() - started > arguments.limit_s:
            print(f"not begun for lack of time: {name}")
            continue
        begun = time.monotonic()
        config = settings_of(flags)
        try:
            sample = {"name": name, "flags": flags, **measure(config)}
        except LeftOverError as error:
            refused.append(name)
            print(f"{name:<48} not measured: {error}", flush=True)
            continue
        job = job_of(config)
        found = estimate(job)
        sample |= {
            "mode": config.instant.instant_mode,
            "model": dataclasses.asdict(config.model),
            "job": job_fields(job),
            "estimated_peak": found.peak,
            "estimated_by_kind": dict(found.by_kind),
            "estimated_reserved": found.reserved,
            "error": found.peak / sample["measured_peak"] - 1.0,
            "reserved_error": found.reserved / sample["measured_reserved"] - 1.0,
        }
        samples.append(sample)
        peak, reserved = sample["measured_peak"] / GIB, sample["measured_reserved"] / GIB
        print(
            f"{name:<48} measured {peak:7.3f} GiB, estimated {found.peak / GIB:7.3f} ({sample['error']:+.1%});"
            f" reserved {reserved:7.3f} / {found.reserved / GIB:7.3f} ({sample['reserved_error']:+.1%});"
            f" outside {sample['outside'] / GIB:.3f}; {time.monotonic() - begun:.1f} s",
            flush=True,
        )
        path = write_evidence("plan_accuracy", payload_of(samples), device="cuda")
    if refused:
        raise GateError(f"memory of earlier configurations was still allocated before: {'; '.join(refused)}")
    return path


def payload_of(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The evidence file's contents."""
    errors = [abs(s["error"]) for s in samples]
    header = [
        "configuration",
        "parameters",
        "measured, GiB",
        "estimated, GiB",
        "error",
        "reserved, GiB",
        "estimated",
        "error",
    ]
    rows = [
        [
            s["name"], f"{s['parameters'] / 1e6:.1f}M", f"{s['measured_peak'] / GIB:.3f}",
            f"{s['estimated_peak'] / GIB:.3f}", f"{s['error']:+.1%}", f"{s['measured_reserved'] / GIB:.3f}",
            f"{s['estimated_reserved'] / GIB:.3f}", f"{s['reserved_error']:+.1%}",
        ]
        for s in samples
    ]  # fmt: skip
    return {
        "what": "torch.cuda.max_memory_allocated over three steps and a validation against `eco_train plan`",
        "summary": {
            "configurations": len(samples),
            "worst_error": max(errors),
            "median_error": statistics.median(errors),
            "within_5_percent": sum(e <= 0.05 for e in errors),
            "outside_allocator_gib": max(s["outside"] for s in samples) / GIB,
        },
        "table": {"title": "plan against measurement", "header": header, "rows": rows},
        "samples": samples,
    }


def measure(config: TrainConfig) -> dict[str, Any]:
    """Train the configuration for a few steps; what it took, bytes.

    Raises:
        LeftOverError: not measured.
    """
    import torch
    from steps import clean

    from eco_llm.runtime import Runtime

    runtime = Runtime.detect(config.runtime)
    torch._dynamo.reset()  # shapes are static, and a function is compiled for 8 of them at most
    clean(runtime.device)
    torch._C._cuda_clearCublasWorkspaces()  # one for each stream there ever was
    clean(runtime.device)
    before = torch.cuda.memory_allocated(runtime.device)
    if before > LEFT_OVER:
        raise LeftOverError(f"{before / GIB:.3f} GiB of earlier configurations are still allocated")
    torch.cuda.reset_peak_memory_stats(runtime.device)
    parameters, steps_peak = _train(config, runtime)
    torch.cuda.synchronize(runtime.device)
    peak = torch.cuda.max_memory_allocated(runtime.device)
    reserved = torch.cuda.max_memory_reserved(runtime.device)
    free, total = torch.cuda.mem_get_info(runtime.device)
    outside = total - free - torch.cuda.memory_reserved(runtime.device)
    return {
        "parameters": parameters,
        "allocated_before": before,
        "measured_peak": peak,
        "measured_peak_of_steps": steps_peak,
        "measured_reserved": reserved,
        "outside": outside,
    }


def _train(config: TrainConfig, runtime: Any) -> tuple[int, int]:
    """(parameters, peak over the steps alone). What it builds is gone when it returns, but for reserved memory."""
    import torch

    from eco_llm.data.loader import Batch
    from eco_llm.model.sigma_llm import SigmaLLM
    from eco_llm.optim.factory import build_optimizer
    from eco_llm.optim.release import ReleasedUpdate
    from eco_llm.optim.update import Update
    from eco_llm.perf.phases import PhaseTimer
    from eco_llm.runtime import torch_dtype
    from eco_llm.training.evaluation import evaluate
    from eco_llm.training.graph import GraphedStep, compiles_blocks, wants_graph
    from eco_llm.training.step import Step, TrainStep

    t = config.training
    runtime.setup(t.seed)
    with torch.device(runtime.device):
        weights = torch_dtype(config.runtime.weights_dtype)
        model = SigmaLLM(config.model, config.instant, weights_dtype=weights)
    if compiles_blocks(config, config.model, runtime):
        model.compile_blocks()
    groups = model.parameter_groups(config.optimizer.weight_decay)
    rule = (config.optimizer, config.c3o, runtime.device)
    update: Update | ReleasedUpdate
    if config.optimizer.gradient_release:
        update = ReleasedUpdate(groups, model.update_units(), *rule)
    else:
        update = Update(build_optimizer(groups, *rule), config.optimizer)
    drawn = torch.randint(config.model.vocab_size, (2, t.batch_size, t.seq_len)).pin_memory()

    def source() -> Iterator[Batch]:
        while True:
            yield Batch(drawn[0], drawn[1])

    timer = PhaseTimer(runtime.device)
    loader: Any = source()
    plain = TrainStep(model, update, loader, runtime, timer, t.grad_accum)
    step: Step = plain
    if wants_graph(config, runtime):
        step = GraphedStep(plain, (t.batch_size, t.seq_len), fall_back=None)

    def several(first: int) -> None:
        for number in range(first, first + STEPS):
            timer.begin_step(number)
            step.prepare()
            timer.mark_core_begin()
            step.run()
            timer.mark_core_end()
            timer.end_step()
            timer.collect()
        torch.cuda.synchronize(runtime.device)

    several(1)
    if "fixed-point" in model.stack.modes:
        state = model.stack.state_dict()
        state["iterations"] = [ITERATIONS if mode == "fixed-point" else None for mode in model.stack.modes]
        model.stack.load_state_dict(state)
        several(1 + STEPS)
    peak = torch.cuda.max_memory_allocated(runtime.device)
    if t.eval_interval:
        evaluate(model, [(drawn[0], drawn[1])], runtime, bytes_per_token=1.0)
    assert Shapes(config.model).parameters() == model.num_parameters()
    return model.num_parameters(), peak


if __name__ == "__main__":
    print(main(sys.argv[1:]))
