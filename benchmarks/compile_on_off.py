"""Claim (row S13): is a training step faster with the blocks compiled? Decides `runtime.COMPILE_PAYS` for a device.

    python benchmarks/compile_on_off.py [--rounds N] [ARGUMENTS OF eco_train train …]

Two copies of one model from the same weights, one compiled, take interleaved steps on the same batches in one
process. Gate: their first loss agrees to 1e-2 relative (bf16) or 1e-4 (fp32). A is eager, B compiled.
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

    from eco_llm.model.sigma_llm import SigmaLLM
    from eco_llm.optim.factory import build_optimizer
    from eco_llm.optim.update import Update

    runtime = Runtime.detect(config.runtime)
    t = config.training
    runtime.setup(t.seed)
    tokens = torch.randint(config.model.vocab_size, (t.batch_size, t.seq_len + 1), device=runtime.device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    wait = torch.cuda.synchronize if runtime.device.type == "cuda" else None

    def stepper(compiled: bool) -> tuple[Callable[[], torch.Tensor], float, float]:
        """(a step, its first loss, seconds the first step took)."""
        torch.manual_seed(t.seed)
        with torch.device(runtime.device):
            model = SigmaLLM(config.model)
        if compiled:
            model.compile_blocks()
        groups = model.parameter_groups(config.optimizer.weight_decay)
        update = Update(build_optimizer(groups, config.optimizer, config.c3o, runtime.device), config.optimizer)

        def step() -> torch.Tensor:
            with runtime.autocast():
                loss = model.loss(inputs, targets)
            loss.backward()
            update.step(loss.detach())
            update.zero_grad()
            return loss.detach()

        started = time.perf_counter()
        first = float(step())
        return step, first, time.perf_counter() - started

    eager, first_eager, _ = stepper(False)
    compiled, first_compiled, compile_seconds = stepper(True)
    tolerance = 1e-4 if runtime.compute_dtype == torch.float32 else 1e-2
    require_close(first_eager, first_compiled, relative=tolerance, what="first loss")
    result = interleave(seconds_of(eager, wait), seconds_of(compiled, wait), rounds, warmup=3)
    summary = result.summary() | {"first_step_compiled_s": compile_seconds}
    print(summary)
    what = {"a": "eager", "b": "compiled blocks", "unit": "s", "tokens_per_step": t.batch_size * t.seq_len}
    name = f"compile_on_off_{t.batch_size}x{t.seq_len}"
    payload = {**what, "flags": argv or DEFAULT, "summary": summary, "samples": result.samples()}
    print(write_evidence(name, payload, device=str(runtime.device)))


if __name__ == "__main__":
    main(sys.argv[1:])
