"""Claim (row S4): which SSD chunk is fastest at which sequence length. Decides `ops/ssd/policy.py`.

    python benchmarks/chunk_policy.py [--device cuda] [--path reference|triton] [--compile] [--rounds N]

One Mamba mixer, forward and backward, the same number of tokens at every length; the three chunks take turns within
each round, so that drift falls on all alike. Gate: outputs of 64 and 256 agree with those of 128 to 1e-4 (fp32) or 2e-2
(bf16) relative. `reference` is the chunked PyTorch form, evidence `chunk_policy` (eager) or `chunk_policy_compiled`;
`triton` the kernels, evidence `chunk_policy_triton`, several steps a sample, so that launches do not hide the kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from typing import Any

import torch
from common import require_close, write_evidence
from steps import clean, seconds_each

from eco_llm.config import RuntimeConfig, SigmaConfig
from eco_llm.model.mamba import Mamba
from eco_llm.ops.backend import kernels_for, reference_only
from eco_llm.runtime import Runtime

CHUNKS = (64, 128, 256)
LENGTHS = (512, 1024, 4096, 16_384)
TOKENS = 16_384


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--path", choices=("reference", "triton"), default="reference")
    parser.add_argument("--compile", action="store_true", help="compile the mixer (reference path)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens a row; lengths above it are left out")
    arguments = parser.parse_args()
    runtime = Runtime.detect(RuntimeConfig(device=arguments.device))
    on_cuda = runtime.device.type == "cuda"
    if arguments.path == "triton" and kernels_for(runtime.device).name != "triton":
        parser.error(f"--path triton: {kernels_for(runtime.device).why}")
    shape = SigmaConfig() if on_cuda else SigmaConfig(d_model=192, mamba_state_dim=64)
    runtime.setup(0)
    with torch.device(runtime.device):
        mixers = {chunk: Mamba(SigmaConfig(**{**vars(shape), "mamba_chunk": chunk})) for chunk in CHUNKS}
    for chunk in CHUNKS:
        mixers[chunk].load_state_dict(mixers[128].state_dict())
        if arguments.compile:
            mixers[chunk].compile(dynamic=False)
    wait = torch.cuda.synchronize if on_cuda else None
    count = 10 if arguments.path == "triton" else 1

    samples: list[dict[str, Any]] = []
    summary: dict[str, float] = {}
    with reference_only() if arguments.path == "reference" else contextlib.nullcontext():
        for length in (t for t in LENGTHS if t <= arguments.tokens):
            x = torch.randn(arguments.tokens // length, length, shape.d_model, device=runtime.device)
            x.requires_grad_()
            weight = torch.randn_like(x)

            def run(chunk: int, x: torch.Tensor = x, weight: torch.Tensor = weight) -> torch.Tensor:
                x.grad = None
                with runtime.autocast():
                    y = mixers[chunk](x)
                y.backward(weight.to(y.dtype))
                return y.detach()

            expected = run(128).float()
            for chunk in CHUNKS:
                error = float((run(chunk).float() - expected).norm() / expected.norm())
                require_close(1.0, 1.0 + error, relative=2e-2 if on_cuda else 1e-4, what=f"chunk {chunk}, T {length}")
            timers = {c: seconds_each(lambda c=c, run=run: run(c), wait, count) for c in CHUNKS}  # type: ignore[misc]
            for number in range(-2, arguments.rounds):
                times = {chunk: timer() for chunk, timer in timers.items()}
                if number >= 0:
                    samples += [{"T": length, "chunk": c, "round": number, "seconds": s} for c, s in times.items()]
            for chunk in CHUNKS:
                mine = [s["seconds"] for s in samples if (s["T"], s["chunk"]) == (length, chunk)]
                summary[f"T{length}_chunk{chunk}_ms"] = 1000 * statistics.median(mine)
                print(f"T{length}_chunk{chunk}_ms: {summary[f'T{length}_chunk{chunk}_ms']:.3f}", flush=True)
            del x, weight, expected
            clean(runtime.device)
    what = {"what": "one Mamba mixer, forward + backward", "d_model": shape.d_model, "state": shape.mamba_state_dim}
    path = {"path": f"{arguments.path}, {'compiled' if arguments.compile else 'eager'}", "steps_a_sample": count}
    payload = what | path | {"tokens": arguments.tokens, "dtype": str(runtime.compute_dtype)}
    claim = "chunk_policy" + ("_triton" if arguments.path == "triton" else "_compiled" if arguments.compile else "")
    print(write_evidence(claim, payload | {"summary": summary, "samples": samples}, device=str(runtime.device)))


if __name__ == "__main__":
    main()
