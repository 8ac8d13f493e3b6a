"""Claim: `compress` costs at most 5% of a step's time, in 8 bits and in 4.

    python benchmarks/compress_cost.py [--shape 32x1024] [--rounds 12]

The default profile's step, as `eco_train` runs it (C3O, one CUDA graph), on real text, with everything
kept; and with `compress` in 8 bits, in 4 bits, and `recompute`. All four train the same batches from the same weights,
and are timed in turn, a few steps each, round after round, so that drift falls on all alike; ratios are against `none`
of the same round. Memory is that of a side's own graph: what its first steps, capture with them, took from the device.

Gates, without which no time is reported: the first loss within 0.1% of none's, for forward is the exact one; every loss
finite; in the end at least one nat under the first and within 10% of none's.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from common import Comparison, GateError, compared, require_close, write_evidence

from eco_llm.runtime import set_cache_dirs

SIDES = {
    "none": {"instant_mode": "none"},
    "compress, 8 bits": {"instant_mode": "compress", "instant_bits": "8"},
    "compress, 4 bits": {"instant_mode": "compress", "instant_bits": "4"},
    "recompute": {"instant_mode": "recompute"},
}
BAR = 1.05


def gate(losses: dict[str, list[float]]) -> None:
    """Raise GateError unless all sides learn alike.

    Args:
        losses: of every side, first to last; those of `none` are what the others are held against.
    """
    exact = losses["none"]
    for name, found in losses.items():
        if not all(map(math.isfinite, found)):
            raise GateError(f"{name}: a loss is not finite: {found}; no speed is reported")
        require_close(exact[0], found[0], relative=1e-3, what=f"first loss of none and {name}")
        if not found[-1] < found[0] - 1:
            raise GateError(f"{name}: the loss does not fall: {found}; no speed is reported")
        require_close(exact[-1], found[-1], relative=0.1, what=f"last loss of none and {name}")


def against_none(rounds: list[dict[str, float]], name: str) -> Comparison:
    """Seconds of a step of side `name`, A, and of none, B, paired by round."""
    return compared([(one[name], one["none"]) for one in rounds])


def table(rounds: list[dict[str, float]], memory: dict[str, float], title: str) -> dict[str, Any]:
    """The docs' table."""
    rows = []
    for name in rounds[0]:
        result = against_none(rounds, name)
        ratio = f"{result.ratio:.3f} ({result.ratio_low:.3f} – {result.ratio_high:.3f})" if name != "none" else "1"
        bar = ("yes" if result.ratio <= BAR else "**no**") if name.startswith("compress") else ""
        rows.append([name, f"{1e3 * result.median_a:.1f}", ratio, bar, f"{memory[name]:.2f}"])
    header = ["mode", "ms a step", "time / none (95%)", f"at most {BAR:g}", "memory of its graph, GiB"]
    return {"title": title, "header": header, "rows": rows}


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="32x1024", help="sequences × tokens")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6, help="of a side in a round, without a wait between")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    batch, length = (int(n) for n in arguments.shape.split("x"))
    set_cache_dirs()

    import torch
    from steps import Ours, Text, clean

    from eco_llm.config import InstantConfig, OptimizerConfig, RuntimeConfig, SigmaConfig
    from eco_llm.runtime import Runtime

    runtime = Runtime.detect(RuntimeConfig(device=arguments.device))
    device, text = runtime.device, Text(batch, length, runtime.device, count=64)
    settings = OptimizerConfig(lr=6e-4)

    def free() -> int:
        return torch.cuda.mem_get_info(device)[0]

    sides: dict[str, Callable[[], torch.Tensor]] = {}
    losses: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    how: dict[str, str] = {}
    for name, choice in SIDES.items():
        clean(device)
        before = free()
        side = Ours(SigmaConfig(), text.cycle(), runtime, instant=InstantConfig(**choice), settings=settings)  # type: ignore[arg-type]
        losses[name] = [float(side.step()), float(side.step())]
        clean(device)
        memory[name] = (before - free()) / 2**30
        sides[name], how[name] = side.step, side.how
        print(name, side.how, losses[name], f"{memory[name]:.2f} GiB", flush=True)

    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds + 1):
        one: dict[str, float] = {}
        for name, step in sides.items():
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(arguments.steps):
                loss = step()
            torch.cuda.synchronize(device)
            one[name] = (time.perf_counter() - start) / arguments.steps
            losses[name].append(float(loss))
        if number:  # the first warms up
            rounds.append(one)
    gate(losses)

    summary: dict[str, Any] = {"first_and_last_loss": {name: [ls[0], ls[-1]] for name, ls in losses.items()}}
    for name in SIDES:
        summary[name] = {**against_none(rounds, name).summary(), "graph_gib": memory[name]}
        print(name, summary[name], flush=True)
    payload = {
        "what": "a step; A the mode, B none", "unit": "s", "shape": arguments.shape, "how": how,
        "table": table(rounds, memory, f"compress's cost, {arguments.shape}, one CUDA graph"),
        "summary": {**summary, "median_ms_none": 1e3 * statistics.median(one["none"] for one in rounds)},
        "samples": [{"round": i, **one} for i, one in enumerate(rounds)], "losses": losses,
    }  # fmt: skip
    print(write_evidence("compress_cost", payload, device=str(device)))


if __name__ == "__main__":
    main()
