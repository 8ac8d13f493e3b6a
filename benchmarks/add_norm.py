"""Claim: the residual sum with its norm as one op against the same as torch.compile writes it, and what a step gains.

    python benchmarks/add_norm.py [--rows 2048,32768] [--steps 4x512,32x1024] [--rounds N]

The op: a stream of float32, a sub-layer's result in bf16, D 768; forward and backward with all gradients, that of the
sum among what is given. The step: the one that `eco_train` runs at the default profile, twice in one process, once with
the op's reference in its place, which compiled blocks then fuse as they can. Each side is a CUDA graph, replayed in
turns. Gates: results and gradients of the two ops agree to a bf16 rounding; the steps' first losses to 1e-3, and both
learn. Floors are bytes over this card's measured copy rate. `--steps ""` leaves the steps out.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from common import GateError, interleave, require_close, write_evidence
from steps import Batches, Ours, clean, measured_rates, replayed, seconds_each
from torch import Tensor

from eco_llm.config import RuntimeConfig, SigmaConfig
from eco_llm.ops.add_norm import add_rms_norm
from eco_llm.ops.backend import kernels_for
from eco_llm.runtime import Runtime, set_cache_dirs

WIDTH = 768
EPS = 1e-5
BYTES = {True: (6 + 6, 10 + 6), False: (6 + 6, 12 + 6)}
"""Of a number, by `keep_sum`, read + written: forward x, delta | sum, norm; backward the norm's gradient, the sum (or x
and delta), the sum's gradient | dx in both types."""


def op_work(rows: int, backend: Any, keep_sum: bool) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; both results and the three gradients."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda", dtype=dtype)

    batch = rows // 512
    leaves = [draw(batch, 512, WIDTH), draw(batch, 512, WIDTH, dtype=torch.bfloat16), draw(WIDTH)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    given = (draw(batch, 512, WIDTH), draw(batch, 512, WIDTH, dtype=torch.bfloat16))

    def forward(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, delta, weight, EPS, keep_sum=keep_sum, backend=backend)

    run = torch.compile(forward, dynamic=False, fullgraph=True)

    def work() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16):
            results = run(*leaves)
        return (*(r.detach() for r in results), *torch.autograd.grad(results, leaves, given))

    return work


def compare_ops(rows: int, rounds: int, copy_rate: float) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(summary, samples) for each way of keeping."""
    found = []
    for keep_sum in (True, False):
        torch._dynamo.reset()  # else the sides and sizes before count as recompilations, whose number is limited
        sides = [op_work(rows, backend, keep_sum) for backend in ("reference", "triton")]
        names = ("sum", "norm", "dx", "ddelta", "dweight")
        for name, a, b in zip(names, sides[0](), sides[1](), strict=True):
            error = float((a.double() - b.double()).norm() / a.double().norm())
            require_close(1.0, 1.0 + error, relative=4e-3 if a.dtype == torch.bfloat16 else 1e-5, what=name)
        timers = [seconds_each(replayed(work), torch.cuda.synchronize, 20) for work in sides]
        result = interleave(timers[0], timers[1], rounds, warmup=3)
        floor = sum(BYTES[keep_sum]) * rows * WIDTH / copy_rate
        key = f"rows{rows}_{'sum' if keep_sum else 'parts'}_kept"
        summary = {f"{key}_{k}": v for k, v in result.summary().items()} | {f"{key}_floor": floor}
        print(
            f"{key}: compiled {1e6 * result.median_a:.1f} us, op {1e6 * result.median_b:.1f} us, floor"
            f" {1e6 * floor:.1f} us, ratio {result.ratio:.3f} ({result.ratio_low:.3f} – {result.ratio_high:.3f})"
        )
        found.append((summary, [{"of": key, **sample} for sample in result.samples()]))
        clean(torch.device("cuda"))
    return found


def never(tensor: Tensor) -> bool:
    """In the place of `uses_triton`."""
    return False


def compare_steps(shape: str, rounds: int, runtime: Runtime) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary, samples) of a whole step with the reference in the op's place, and with the op."""
    batch, length = (int(n) for n in shape.split("x"))
    model = SigmaConfig(loss_chunk_tokens=4096) if batch * length > 4096 else SigmaConfig()
    batches = Batches(model.vocab_size, batch, length, runtime.device)
    sides, firsts = [], []
    for replaced in (True, False):
        torch._dynamo.reset()  # the other side's graphs are captured
        with mock.patch("eco_llm.ops.add_norm.uses_triton", never) if replaced else contextlib.nullcontext():
            side = Ours(model, batches.cycle(), runtime, compile_blocks=True)
            firsts.append(float(side.step()))  # compiles and captures
        sides.append(side)
    require_close(*firsts, relative=1e-3, what="first loss")
    timers = [seconds_each(side.step, torch.cuda.synchronize, 5) for side in sides]
    result = interleave(timers[0], timers[1], rounds, warmup=2)
    lasts = [float(side.step()) for side in sides]
    if not all(last < first for last, first in zip(lasts, firsts, strict=True)):
        raise GateError(f"losses went from {firsts} to {lasts}")
    print(
        f"step {shape}: compiled {1e3 * result.median_a:.3f} ms, op {1e3 * result.median_b:.3f} ms,"
        f" ratio {result.ratio:.4f} ({result.ratio_low:.4f} – {result.ratio_high:.4f}); losses {firsts} -> {lasts}"
    )
    key = f"step_{shape}"
    return {f"{key}_{k}": v for k, v in result.summary().items()}, [{"of": key, **s} for s in result.samples()]


def table_of(summary: dict[str, Any]) -> dict[str, Any]:
    """A row for each op and step that was compared; times in ms."""
    header = ["what", "compiled, ms", "the op, ms", "compiled / op", "95% interval", "floor of bytes, ms"]
    rows: list[list[Any]] = []
    for key in (k.removesuffix("_median_a") for k in summary if k.endswith("_median_a")):
        what = key.replace("rows", "op, rows ").replace("_sum_kept", ", the sum kept")
        what = what.replace("_parts_kept", ", x and delta kept").replace("step_", "step, ")
        a, b = (f"{1e3 * summary[f'{key}_median_{side}']:.4f}" for side in "ab")
        interval = f"{summary[f'{key}_ratio_low']:.3f} – {summary[f'{key}_ratio_high']:.3f}"
        floor = summary.get(f"{key}_floor")
        rows.append([what, a, b, f"{summary[f'{key}_ratio']:.3f}", interval,
                     None if floor is None else f"{1e3 * floor:.4f}"])  # fmt: skip
    return {"header": header, "rows": rows}


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="2048,32768", help="multiples of 512")
    parser.add_argument("--steps", default="4x512", help="sequences × tokens, commas between; may be empty")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    set_cache_dirs()
    runtime = Runtime.detect(RuntimeConfig(device="cuda"))
    if kernels_for(runtime.device).name != "triton":
        parser.error(kernels_for(runtime.device).why)
    runtime.setup(0)
    rates = measured_rates(runtime.device)
    summary: dict[str, Any] = {"copy_bytes_per_s": rates["copy_bytes_per_s"]}
    samples: list[dict[str, Any]] = []
    for rows in (int(n) for n in arguments.rows.split(",") if n):
        for found, taken in compare_ops(rows, arguments.rounds, rates["copy_bytes_per_s"]):
            summary |= found
            samples += taken
    for shape in (s for s in arguments.steps.split(",") if s):
        found, taken = compare_steps(shape, arguments.rounds, runtime)
        summary |= found
        samples += taken
        clean(runtime.device)
    payload: dict[str, Any] = {
        "what": "residual sum and RMSNorm: compiled (A), as an op (B)",
        "how": "CUDA graphs",
        "d_model": WIDTH,
    }
    payload |= {"summary": summary, "table": table_of(summary), "samples": samples}
    print(write_evidence("add_norm", payload, device=str(runtime.device)))


if __name__ == "__main__":
    main()
