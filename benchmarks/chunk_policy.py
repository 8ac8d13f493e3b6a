"""Claim (row S4): which SSD chunk is fastest at which sequence length. Decides `ops/ssd/policy.py`.

    python benchmarks/chunk_policy.py [--device cuda] [--rounds N]

One Mamba mixer, forward and backward, the same number of tokens at every length; the three chunks take turns within
each round, so that drift falls on all alike. Gate: outputs of 64 and 256 agree with those of 128 to 1e-4 (fp32) or 2e-2
(bf16) relative. Path: the chunked PyTorch reference, eager.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from common import require_close, seconds_of, write_evidence

from eco_llm.config import RuntimeConfig, SigmaConfig
from eco_llm.model.mamba import Mamba
from eco_llm.runtime import Runtime

CHUNKS = (64, 128, 256)
LENGTHS = (512, 1024, 4096)


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    runtime = Runtime.detect(RuntimeConfig(device=arguments.device))
    on_cuda = runtime.device.type == "cuda"
    shape = SigmaConfig() if on_cuda else SigmaConfig(d_model=192, mamba_state_dim=64)
    tokens = 16_384 if on_cuda else 4096
    runtime.setup(0)
    with torch.device(runtime.device):
        mixers = {chunk: Mamba(SigmaConfig(**{**vars(shape), "mamba_chunk": chunk})) for chunk in CHUNKS}
    for chunk in CHUNKS:
        mixers[chunk].load_state_dict(mixers[128].state_dict())

    samples: list[dict[str, Any]] = []
    summary: dict[str, float] = {}
    for length in LENGTHS:
        x = torch.randn(tokens // length, length, shape.d_model, device=runtime.device, requires_grad=True)
        weight = torch.randn_like(x)

        def run(chunk: int, x: torch.Tensor = x, weight: torch.Tensor = weight) -> torch.Tensor:
            x.grad = None
            with runtime.autocast():
                y = mixers[chunk](x)
            (y * weight).sum().backward()
            return y.detach().float()

        expected = run(128)
        for chunk in CHUNKS:
            error = float((run(chunk) - expected).norm() / expected.norm())
            require_close(1.0, 1.0 + error, relative=2e-2 if on_cuda else 1e-4, what=f"chunk {chunk}, T {length}")
        wait = torch.cuda.synchronize if on_cuda else None
        timers = {chunk: seconds_of(lambda chunk=chunk: run(chunk), wait) for chunk in CHUNKS}  # type: ignore[misc]
        for number in range(-2, arguments.rounds):
            times = {chunk: timer() for chunk, timer in timers.items()}
            if number >= 0:
                samples += [{"T": length, "chunk": c, "round": number, "seconds": s} for c, s in times.items()]
        for chunk in CHUNKS:
            mine = [s["seconds"] for s in samples if (s["T"], s["chunk"]) == (length, chunk)]
            summary[f"T{length}_chunk{chunk}_ms"] = 1000 * statistics.median(mine)
    for name, value in summary.items():
        print(f"{name}: {value:.3f}")
    what = {"what": "one Mamba mixer, forward + backward", "d_model": shape.d_model, "state": shape.mamba_state_dim}
    payload = what | {"tokens": tokens, "dtype": str(runtime.compute_dtype), "summary": summary, "samples": samples}
    print(write_evidence("chunk_policy", payload, device=str(runtime.device)))


if __name__ == "__main__":
    main()
