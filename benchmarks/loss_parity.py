"""Claim: the fast path learns what the reference path learns, to within bf16 noise.

    python benchmarks/loss_parity.py [--steps 500] [--references 3] [FLAGS OF eco_train train …]

The same weights, batches of real text (--data, by default this Python's standard library) and schedule, run as: the
fast path (kernels and a whole-step CUDA graph, as a run that says nothing has it), and reference runs
(ops.backend.reference_only, eager) that differ from each other in the order of their sums alone: SSD chunk 128, 64, 256
and 2048, 1024, 512 tokens of logits.

How the noise is measured: every curve is smoothed (mean of 25 steps); the noise is the largest root mean square, over
steps, of the difference of two references. Verdict: the fast curve's difference from the mean of the references has
a root mean square of at most 1.5 times that. Rounding makes such runs part at an exponential rate until they differ as
two seeds' data order would not: by noise without a trend; so the mean difference over the last fifth is given as well.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import time
from typing import Any

import numpy as np
from common import GateError, write_evidence

from eco_llm.cli.args_file import expand
from eco_llm.cli.parse import parse
from eco_llm.config import TrainConfig
from eco_llm.runtime import set_cache_dirs

REFERENCES = ((128, 2048), (64, 1024), (256, 512))  # (SSD chunk, tokens of logits)
WINDOW = 25
FACTOR = 1.5


def smoothed(losses: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Means of `window` neighbours: [steps] -> [steps - window + 1]."""
    if len(losses) <= window:
        return np.array([losses.mean()])
    total = np.cumsum(np.concatenate(([0.0], losses)))
    means: np.ndarray = (total[window:] - total[:-window]) / window
    return means


def verdict(fast: np.ndarray, references: list[np.ndarray]) -> dict[str, float]:
    """Noise, the fast path's difference, and their ratio; curves [steps] in nats per token.

    Raises:
        GateError: a curve is not finite, or the fast path's does not fall.
    """
    curves = [smoothed(np.asarray(c, dtype=np.float64)) for c in (fast, *references)]
    if not all(np.isfinite(c).all() for c in curves):
        raise GateError("a loss is not finite")
    if not np.mean(fast[-WINDOW:]) < fast[0]:
        raise GateError("the fast path's loss does not fall")
    ours, others = curves[0], curves[1:]

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(x**2)))

    noise = max(rms(a - b) for a, b in itertools.combinations(others, 2))
    difference = ours - np.mean(others, axis=0)
    tail = max(1, len(ours) // 5)
    tails = [float(c[-tail:].mean()) for c in others]
    return {
        "noise_rms": noise,
        "difference_rms": rms(difference),
        "difference_over_noise": rms(difference) / noise if noise > 0 else float(rms(difference) > 0),
        "largest_difference": float(np.abs(difference).max()),
        "largest_noise": max(float(np.abs(a - b).max()) for a, b in itertools.combinations(others, 2)),
        "tail_difference": float(difference[-tail:].mean()),
        "tail_noise": max(tails) - min(tails),
    }


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--references", type=int, default=3, choices=(2, 3))
    arguments, flags = parser.parse_known_args()
    config = parse(TrainConfig, expand(flags or ["@train_sigma_args.txt"]), prog="loss_parity")
    set_cache_dirs()

    import torch
    from steps import Ours, clean

    from eco_llm.data.loader import TokenLoader
    from eco_llm.data.prepare import prepare
    from eco_llm.ops.backend import kernels_for, reference_only
    from eco_llm.optim.schedule import lr_at
    from eco_llm.runtime import Runtime

    runtime = Runtime.detect(config.runtime)
    t = config.training
    runtime.setup(t.seed)
    data = prepare(config.data, config.model.vocab_size)
    on_cuda = runtime.device.type == "cuda"
    with TokenLoader(data, batch_size=t.batch_size, seq_len=t.seq_len, seed=t.seed, pin_memory=on_cuda) as loader:
        batches = [next(loader) for _ in range(arguments.steps)]

    def run(chunk: Any, loss_chunk: int, fast: bool) -> tuple[np.ndarray, float, str]:
        """(losses [steps], seconds a step, how)."""
        shape = dataclasses.replace(config.model, mamba_chunk=chunk, loss_chunk_tokens=loss_chunk)
        losses = torch.empty(arguments.steps, device=runtime.device)
        with contextlib.nullcontext() if fast else reference_only():
            side = Ours(
                shape, itertools.cycle(batches), runtime,
                compile_blocks=None if fast else False, graph=fast, settings=config.optimizer, c3o=config.c3o,
                bf16_weights=config.runtime.weights_dtype == "bf16", seed=t.seed,
            )  # fmt: skip
            started = time.perf_counter()
            for step in range(arguments.steps):
                side.update.set_lr(lr_at(step, config=config.optimizer, total_steps=arguments.steps))
                losses[step] = side.step()
            values = losses.double().cpu().numpy()
        seconds, how = (time.perf_counter() - started) / arguments.steps, side.how
        del side
        torch._dynamo.reset()  # on a CPU: what was compiled inside reference_only must not serve the next run
        clean(runtime.device)
        return values, seconds, how

    fast, fast_seconds, how = run(config.model.mamba_chunk, config.model.loss_chunk_tokens, True)
    print(f"fast ({how}): {1e3 * fast_seconds:.1f} ms a step, last loss {fast[-1]:.4f}", flush=True)
    references = []
    for chunk, loss_chunk in REFERENCES[: arguments.references]:
        losses, seconds, _ = run(chunk, loss_chunk, False)
        references.append(losses)
        print(f"reference, chunk {chunk}: {1e3 * seconds:.1f} ms a step, last loss {losses[-1]:.4f}", flush=True)
    if abs(fast[0] - references[0][0]) > 1e-2 * references[0][0]:
        raise GateError(f"first losses differ: fast {fast[0]}, reference {references[0][0]}")

    summary: dict[str, Any] = verdict(fast, references)
    summary |= {"steps": arguments.steps, "references": len(references), "factor": FACTOR}
    summary["within_noise"] = int(summary["difference_over_noise"] <= FACTOR)
    summary |= {"fast_ms": 1e3 * fast_seconds, "fast_last_25": float(fast[-WINDOW:].mean())}
    summary |= {"reference_last_25": float(np.mean([r[-WINDOW:].mean() for r in references]))}
    print(summary)
    names = [f"reference_chunk{chunk}" for chunk, _ in REFERENCES]
    samples = [
        {"step": i + 1, "loss": float(fast[i]), **{n: float(r[i]) for n, r in zip(names, references, strict=False)}}
        for i in range(arguments.steps)
    ]
    row = [
        arguments.steps, f"{summary['difference_rms']:.5f}", f"{summary['noise_rms']:.5f}",
        f"{summary['difference_over_noise']:.2f}", f"{summary['tail_difference']:+.5f}", f"{summary['tail_noise']:.5f}",
        "yes" if summary["within_noise"] else "no",
    ]  # fmt: skip
    header = ["steps", "difference, rms", "noise, rms", "ratio", "last fifth: difference", "its noise", "within"]
    payload = {
        "what": "loss of the fast path against reference runs, nats per token", "fast": how, "flags": flags,
        "kernels": kernels_for(runtime.device).name, "dtype": str(runtime.compute_dtype),
        "summary": summary, "table": {"header": header, "rows": [row]}, "samples": samples,
    }  # fmt: skip
    print(write_evidence("loss_parity", payload, device=str(runtime.device)))


if __name__ == "__main__":
    main()
