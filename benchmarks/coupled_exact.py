"""Claim: the coupled mode rebuilds every state bit for bit, its memory does not grow with depth, and it costs no more
than 1.05 of recompute.

    python benchmarks/coupled_exact.py [--steps 1000] [--rounds 12]

1. A thousand steps of the default profile (4 × 512, one CUDA graph) on real text: trips of the gate.
2. Peak memory of 12 and of 48 layers (16 × 1024, no graph): their difference against that of parameters, gradients and
   optimizer state, counted tensor by tensor.
3. Step time at 32 × 1024 against recompute, each one CUDA graph, paired; a sample is a whole cycle of the four batches.
   Gate: both first losses within 5% of ln V.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from common import GateError, interleave, write_evidence

from eco_llm.runtime import set_cache_dirs


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    set_cache_dirs()

    import torch
    from steps import Batches, Ours, Text, clean, seconds_each

    from eco_llm.config import InstantConfig, OptimizerConfig, RuntimeConfig, SigmaConfig
    from eco_llm.model.sigma_llm import SigmaLLM
    from eco_llm.ops.grid import RANGE, STEP, advance, snap
    from eco_llm.optim.update import Update
    from eco_llm.runtime import Runtime

    @torch.no_grad()
    def largest(model: SigmaLLM, ids: torch.Tensor) -> list[float]:
        """The largest magnitude in the streams before each block and after the last; NaN from where one left RANGE."""
        found = []
        with runtime.autocast():
            b, x, _ = snap(model.embedding(ids))
            a = b
            for block in model._blocks():
                found.append(x.abs().max())
                c, x, _ = advance(a, *block.change(x, x), dtype=x.dtype)
                a, b = b, c
            found.append(x.abs().max())
        return torch.stack(found).tolist()

    runtime = Runtime.detect(RuntimeConfig(device=arguments.device))
    device = runtime.device
    coupled, recompute = InstantConfig(instant_mode="coupled"), InstantConfig(instant_mode="recompute")
    summary: dict[str, Any] = {}

    # 1 ---- exactness -------------------------------------------------------------------------------------------
    text = Text(4, 512, device)
    model = Ours(SigmaConfig(), text.cycle(), runtime, instant=coupled, settings=OptimizerConfig(lr=1e-3))
    trips = torch.zeros((), device=device)
    refused = torch.zeros((), device=device)
    losses, refusals, verdicts = [], [], []
    for _ in range(arguments.steps):
        losses.append(model.step().clone())
        names, values = model.output.names, model.output.values
        trips += values[names.index("instant_tripped_blocks")]
        refused += 1 - values[names.index("applied")]
        refusals.append(refused.clone())
        verdicts.append(values[names.index("instant_tripped_block_0") :].clone())
    first, last = float(losses[0]), float(torch.stack(losses[-20:]).mean())
    summary |= {"steps": arguments.steps, "trips": float(trips), "refused": float(refused), "losses": [first, last]}
    summary["how"] = model.how
    counts = torch.stack(refusals).tolist()
    summary["refused_steps"] = [i for i, (a, b) in enumerate(zip([0.0, *counts], counts, strict=False), 1) if a != b][
        :50
    ]
    if summary["refused_steps"]:
        summary["tripped_blocks_first"] = verdicts[summary["refused_steps"][0] - 1].tolist()
    summary["largest_values"] = largest(model.model, text.to_device(text.cycle()).inputs)
    summary |= {"range": RANGE, "step_of_grid": STEP}
    print(summary, flush=True)
    if not last < first:
        raise GateError(f"the loss went from {first:.4f} to {last:.4f}: nothing was trained, so nothing is proven")
    del model

    # 2 ---- depth ---------------------------------------------------------------------------------------------------
    source = Batches(32_768, 16, 1024, device)
    peaks, counted = {}, {}
    for layers in (12, 48):
        clean(device)
        before = torch.cuda.memory_allocated(device)
        model = Ours(SigmaConfig(n_layers=layers), source.cycle(), runtime, instant=coupled, graph=False)
        for _ in range(2):
            model.step()
        torch.cuda.reset_peak_memory_stats(device)
        model.step()
        torch.cuda.synchronize()
        peaks[layers] = torch.cuda.max_memory_allocated(device) - before
        weights = sum(p.nbytes for p in model.model.parameters())
        assert isinstance(model.update, Update)
        states = [v for s in model.update.optimizer.state.values() for v in s.values()]
        state = sum(v.nbytes for v in states if isinstance(v, torch.Tensor))
        counted[layers] = 2 * weights + state  # a gradient is as large as its weight
        del model
    grown, explained = peaks[48] - peaks[12], counted[48] - counted[12]
    summary |= {
        "peak_bytes": peaks, "counted_bytes": counted, "peak_difference": grown, "explained_difference": explained,
        "unexplained_share": (grown - explained) / grown,
    }  # fmt: skip
    print({k: summary[k] for k in ("peak_difference", "explained_difference", "unexplained_share")}, flush=True)

    # 3 ---- time ---------------------------------------------------------------------------------------------------
    clean(device)
    source, shape = Batches(32_768, 32, 1024, device), SigmaConfig()
    sides = [Ours(shape, source.cycle(), runtime, instant=mode) for mode in (coupled, recompute)]
    for side in sides:
        loss = float(side.step())
        if not abs(loss - math.log(32_768)) < 0.05 * math.log(32_768):
            raise GateError(f"{side.how}: first loss {loss:.4f} is not near ln V")
        for _ in range(len(source) - 1):
            side.step()

    def cycle(side: Ours) -> Callable[[], float]:
        return seconds_each(side.step, torch.cuda.synchronize, len(source))

    a, b = cycle(sides[0]), cycle(sides[1])
    result = interleave(a, b, arguments.rounds)
    summary |= {f"time_{k}": v for k, v in result.summary().items()}
    print(f"coupled / recompute: {result.ratio:.4f} ({result.ratio_low:.4f} – {result.ratio_high:.4f})")
    rows = [
        [f"trips of the gate in {arguments.steps} steps", f"{summary['trips']:.0f}"],
        ["peak, 12 and 48 layers, GiB", f"{peaks[12] / 2**30:.3f}, {peaks[48] / 2**30:.3f}"],
        ["of it not parameters, gradients, optimizer state", f"{summary['unexplained_share']:.2%}"],
        ["step time, of recompute", f"{result.ratio:.3f} ({result.ratio_low:.3f} – {result.ratio_high:.3f})"],
    ]  # fmt: skip
    payload = {
        "what": f"coupled mode; times: a step, over all {len(source)} batches, A coupled, B recompute", "unit": "s",
        "dtype": str(runtime.compute_dtype),
        "table": {"title": "coupled", "header": ["", "measured"], "rows": rows},
        "summary": summary, "samples": result.samples(),
    }  # fmt: skip
    print(write_evidence("coupled_exact", payload, device=str(device)))


if __name__ == "__main__":
    main()
