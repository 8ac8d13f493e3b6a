"""Claim (row S13): is a training step faster with the blocks compiled? Decides `runtime.COMPILE_PAYS` for a device, and
for a captured step `runtime.compiling_pays`.

    python benchmarks/compile_on_off.py [--rounds N] [ARGUMENTS OF eco_train train …]

Two copies of one model from the same weights, one compiled, take interleaved steps on the same batches in one process:
the step that `eco_train` runs, weights in their stored type, on CUDA one graph. Gate: their first loss agrees to 1e-2
relative (bf16) or 1e-4 (fp32). A is eager, B compiled.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from common import interleave, require_close, seconds_of, write_evidence

from eco_llm.cli.args_file import expand
from eco_llm.cli.parse import parse
from eco_llm.config import TrainConfig
from eco_llm.runtime import Runtime, set_cache_dirs

DEFAULT = ["@presets/quickstart_cpu.txt"]


def main(argv: list[str]) -> None:
    """Measure, print, write the evidence."""
    rounds = 20
    if argv[:1] == ["--rounds"]:
        rounds, argv = int(argv[1]), argv[2:]
    config = parse(TrainConfig, expand(argv or DEFAULT), prog="compile_on_off")
    set_cache_dirs()

    import torch
    from steps import Batches, Ours

    runtime = Runtime.detect(config.runtime)
    t = config.training
    batches = Batches(config.model.vocab_size, t.batch_size, t.seq_len, runtime.device)
    wait = torch.cuda.synchronize if runtime.device.type == "cuda" else None

    def stepper(compiled: bool) -> tuple[Callable[[], torch.Tensor], float, float, str]:
        """(a step, its first loss, seconds the first step took, how it runs)."""
        side = Ours(
            config.model, batches.cycle(), runtime,
            compile_blocks=compiled, settings=config.optimizer, c3o=config.c3o, seed=t.seed,
            bf16_weights=config.runtime.weights_dtype == "bf16",
        )  # fmt: skip
        started = time.perf_counter()
        first = float(side.step())
        return side.step, first, time.perf_counter() - started, side.how

    eager, first_eager, _, how_a = stepper(False)
    compiled, first_compiled, compile_seconds, how_b = stepper(True)
    tolerance = 1e-4 if runtime.compute_dtype == torch.float32 else 1e-2
    require_close(first_eager, first_compiled, relative=tolerance, what="first loss")
    result = interleave(seconds_of(eager, wait), seconds_of(compiled, wait), rounds, warmup=3)
    summary = result.summary() | {"first_step_compiled_s": compile_seconds}
    print(summary)
    what = {"a": how_a, "b": how_b, "unit": "s", "tokens_per_step": t.batch_size * t.seq_len}
    name = f"compile_on_off_{t.batch_size}x{t.seq_len}"
    payload = {**what, "flags": argv or DEFAULT, "summary": summary, "samples": result.samples()}
    print(write_evidence(name, payload, device=str(runtime.device)))


if __name__ == "__main__":
    main(sys.argv[1:])
