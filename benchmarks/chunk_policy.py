"""Claim (row S4): which SSD chunk is fastest at which sequence length. Decides `ops/ssd/policy.py`.

    python benchmarks/chunk_policy.py [--device cuda] [--path reference|triton|scan] [--compile] [--rounds N]

One Mamba mixer, forward and backward, the same number of tokens at every length; the three chunks take turns within
each round, so that drift falls on all alike. Gate: outputs of 64 and 256 agree with those of 128 to 1e-4 (fp32) or 2e-2
(bf16) relative. `reference` is the chunked PyTorch form, evidence `chunk_policy` (eager) or `chunk_policy_compiled`;
`triton` the mixer on the kernels, `scan` their SSD alone (dt after softplus, D), evidence `chunk_policy_triton` and
`chunk_policy_scan`. These two replay CUDA graphs, as training does: launched piece by piece, a mixer takes longer to
launch than to run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import require_close, write_evidence
from steps import clean, replayed, seconds_each
from torch import Tensor

from eco_llm.config import RuntimeConfig, SigmaConfig
from eco_llm.model.mamba import Mamba
from eco_llm.ops.backend import kernels_for, reference_only
from eco_llm.ops.ssd import ssd
from eco_llm.runtime import Runtime

CHUNKS = (64, 128, 256)
LENGTHS = (512, 1024, 4096, 16_384)
TOKENS = 16_384


Work = Callable[[int], Tensor]
"""Forward and backward with chunks of so many tokens; the result of forward."""


def mixer_work(mixers: dict[int, Mamba], batch: int, length: int, width: int, runtime: Runtime) -> Work:
    """One mixer; gradients of its input and parameters."""
    x = torch.randn(batch, length, width, device=runtime.device, requires_grad=True)
    weight = torch.randn_like(x)

    def work(chunk: int) -> Tensor:
        with runtime.autocast():
            y = mixers[chunk](x)
        torch.autograd.grad(y, [x, *mixers[chunk].parameters()], weight.to(y.dtype))
        return y.detach()

    return work


def scan_work(shape: SigmaConfig, batch: int, length: int, runtime: Runtime) -> Work:
    """The SSD of that mixer, in the ranges of an initialised one; gradients of all six inputs."""

    def draw(*size: int) -> Tensor:
        return torch.randn(batch, length, *size, device=runtime.device)

    heads, head, state = shape.mamba_n_heads, shape.mamba_head_dim, shape.mamba_state_dim
    x, dy, b, c = (draw(*size).to(runtime.compute_dtype) for size in [(heads, head)] * 2 + [(1, state)] * 2)
    dt = torch.exp(draw(heads).uniform_(-6.9, -2.3))
    decay, skip = -torch.empty(heads, device=runtime.device).uniform_(1.0, 16.0), draw(heads)[0, 0]
    leaves = [v.detach().requires_grad_() for v in (x, dt, decay, b, c, skip)]

    def work(chunk: int) -> Tensor:
        y = ssd(*leaves, chunk_size=chunk)
        torch.autograd.grad(y, leaves, dy)
        return y.detach()

    return work


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--path", choices=("reference", "triton", "scan"), default="reference")
    parser.add_argument("--compile", action="store_true", help="compile the mixer (reference path)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens a row; lengths above it are left out")
    arguments = parser.parse_args()
    runtime = Runtime.detect(RuntimeConfig(device=arguments.device))
    on_cuda = runtime.device.type == "cuda"
    kernels = arguments.path != "reference"
    if kernels and kernels_for(runtime.device).name != "triton":
        parser.error(f"--path {arguments.path}: {kernels_for(runtime.device).why}")
    shape = SigmaConfig() if on_cuda else SigmaConfig(d_model=192, mamba_state_dim=64)
    runtime.setup(0)
    with torch.device(runtime.device):
        mixers = {chunk: Mamba(SigmaConfig(**{**vars(shape), "mamba_chunk": chunk})) for chunk in CHUNKS}
    for chunk in CHUNKS:
        mixers[chunk].load_state_dict(mixers[128].state_dict())
        if arguments.compile:
            mixers[chunk].compile(dynamic=False)
    wait = torch.cuda.synchronize if on_cuda else None
    count = 10 if kernels else 1

    samples: list[dict[str, Any]] = []
    summary: dict[str, float] = {}
    with contextlib.nullcontext() if kernels else reference_only():
        for length in (t for t in LENGTHS if t <= arguments.tokens):
            batch = arguments.tokens // length
            if arguments.path == "scan":
                work = scan_work(shape, batch, length, runtime)
            else:
                work = mixer_work(mixers, batch, length, shape.d_model, runtime)
            expected = work(128).float()
            for chunk in CHUNKS:
                error = float((work(chunk).float() - expected).norm() / expected.norm())
                require_close(1.0, 1.0 + error, relative=2e-2 if on_cuda else 1e-4, what=f"chunk {chunk}, T {length}")
            calls = {c: functools.partial(work, c) for c in CHUNKS}
            runs = {c: replayed(call) if kernels else call for c, call in calls.items()}
            timers = {c: seconds_each(run, wait, count) for c, run in runs.items()}
            for number in range(-2, arguments.rounds):
                times = {chunk: timer() for chunk, timer in timers.items()}
                if number >= 0:
                    samples += [{"T": length, "chunk": c, "round": number, "seconds": s} for c, s in times.items()]
            for chunk in CHUNKS:
                mine = [s["seconds"] for s in samples if (s["T"], s["chunk"]) == (length, chunk)]
                summary[f"T{length}_chunk{chunk}_ms"] = 1000 * statistics.median(mine)
                print(f"T{length}_chunk{chunk}_ms: {summary[f'T{length}_chunk{chunk}_ms']:.3f}", flush=True)
            del work, calls, runs, timers, expected
            clean(runtime.device)
    of = "the SSD of one Mamba mixer" if arguments.path == "scan" else "one Mamba mixer"
    what = {"what": f"{of}, forward + backward", "d_model": shape.d_model, "state": shape.mamba_state_dim}
    how = "CUDA graph" if kernels else "compiled" if arguments.compile else "eager"
    label = {"reference": "reference", "triton": "kernels, mixer", "scan": "kernels, SSD alone"}[arguments.path]
    path = {"path": f"{label}, {how}", "steps_a_sample": count}
    payload = what | path | {"tokens": arguments.tokens, "dtype": str(runtime.compute_dtype)}
    claim = "chunk_policy" + (f"_{arguments.path}" if kernels else "_compiled" if arguments.compile else "")
    print(write_evidence(claim, payload | {"summary": summary, "samples": samples}, device=str(runtime.device)))


if __name__ == "__main__":
    main()
