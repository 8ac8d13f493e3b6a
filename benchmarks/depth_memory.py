"""Claim: in the coupled mode memory for activations does not grow with depth: 48 layers against 12 at one width.

    python benchmarks/depth_memory.py                       (on a machine with an NVIDIA GPU)

Three steps of the default profile's width at 16 × 1024 tokens, 12 and 48 layers; eager blocks and no CUDA graph, for
neither compiling nor a private pool is the question. Peak is `torch.cuda.max_memory_allocated` over the third step,
less what was there before the model. Counted tensor by tensor: parameters, optimizer state, and the gradients that are
alive together (all of them; with gradient release, whose updates are made inside backward, those of the largest unit).
What of the growth from 12 to 48 layers these do not explain is reported as a share of it; the bar is 2% either way, for
coupled with and without release. `recompute`, which keeps an input a block, is measured beside them: its share says
what the measurement would show if something did grow.
A small model goes before and is not counted: what libraries take once and keep would be the first model's alone.
Gate: the first loss is within 5% of ln V, the last finite; after each pair of models nothing of them is left.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from common import GateError, write_evidence

from eco_llm.runtime import set_cache_dirs

if TYPE_CHECKING:
    from steps import Ours

DEPTHS = (12, 48)
BATCH, LENGTH = 16, 1024
VOCAB = 32_768
BAR = 0.02
ROWS = {  # name: (memory mode, gradient release, held to the bar)
    "coupled": ("coupled", False, True),
    "coupled, gradient release": ("coupled", True, True),
    "recompute": ("recompute", False, False),
}


def counted(side: Ours) -> dict[str, int]:
    """Bytes of parameters, of gradients alive together, and of optimizer state, once a step has been made.

    A gradient is as large and of the same type as its parameter; with gradient release only one unit's exist at a time.
    """
    import torch

    from eco_llm.optim.release import ReleasedUpdate

    def size(parameters: Any) -> int:
        return sum(p.nbytes for p in parameters)

    if isinstance(side.update, ReleasedUpdate):
        optimizers = side.update.optimizers
        gradients = max(size(p for group in o.param_groups for p in group["params"]) for o in optimizers)
    else:
        optimizers = [side.update.optimizer]
        gradients = size(side.model.parameters())
    values = [v for o in optimizers for state in o.state.values() for v in state.values()]
    # C3O's moments are views of buffers over many tensors, laid out in rows: what those take is what there is.
    storages = [v.untyped_storage() for v in values if isinstance(v, torch.Tensor)]
    state = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    return {"parameters": size(side.model.parameters()), "gradients": gradients, "optimizer_state": state}


def unexplained(peaks: tuple[int, int], counts: tuple[int, int]) -> float:
    """Share of the growth of the peak that the growth of what was counted leaves: positive, something else grew.

    Args:
        peaks, counts: bytes, shallow and deep.

    Raises:
        ValueError: the deep model takes no more than the shallow one, so there is nothing to explain.
    """
    grown = peaks[1] - peaks[0]
    if grown <= 0:
        raise ValueError(f"the peak did not grow: {peaks[0]} and {peaks[1]} bytes")
    return (grown - (counts[1] - counts[0])) / grown


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    began = time.perf_counter()
    set_cache_dirs()

    import torch

    if not torch.cuda.is_available():
        print("depth_memory: error: needs a CUDA device: a CPU's allocator does not count its peak", file=sys.stderr)
        sys.exit(2)
    from steps import Batches, Ours, clean

    from eco_llm.config import InstantConfig, OptimizerConfig, RuntimeConfig, SigmaConfig
    from eco_llm.runtime import Runtime

    runtime = Runtime.detect(RuntimeConfig(device="cuda"))
    device = runtime.device
    source = Batches(VOCAB, BATCH, LENGTH, device, count=2)

    def measure(mode: str, layers: int, *, release: bool) -> dict[str, Any]:
        """Peak and count of one model, which is gone afterwards."""
        start = time.perf_counter()
        clean(device)
        before = torch.cuda.memory_allocated(device)
        side = Ours(
            SigmaConfig(n_layers=layers, vocab_size=VOCAB), source.cycle(), runtime, compile_blocks=False, graph=False,
            instant=InstantConfig(instant_mode=mode), release=release,
            settings=OptimizerConfig(lr=1e-4, grad_clip=0.0),
        )  # fmt: skip
        first = float(side.step())
        side.step()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        last = float(side.step())
        torch.cuda.synchronize(device)
        found = {
            "layers": layers, "peak_bytes": torch.cuda.max_memory_allocated(device) - before, **counted(side),
            "at_rest_bytes": torch.cuda.memory_allocated(device) - before, "first_loss": first, "last_loss": last,
            "seconds": time.perf_counter() - start,
        }  # fmt: skip
        if not (abs(first - math.log(VOCAB)) < 0.05 * math.log(VOCAB) and math.isfinite(last)):
            raise GateError(f"{mode}, {layers} layers: losses {first:.4f} … {last:.4f}")
        return found

    samples: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"bar": BAR}
    rows: list[list[str]] = []
    measure("coupled", 6, release=False)  # compiles the kernels, and makes cuBLAS take the workspaces that it keeps
    clean(device)
    base = torch.cuda.memory_allocated(device)
    for name, (mode, release, bar) in ROWS.items():
        pair = [measure(mode, layers, release=release) for layers in DEPTHS]
        clean(device)
        if (left := torch.cuda.memory_allocated(device) - base) > 2**24:  # a fifth of what the bar lets pass
            raise GateError(f"{name}: {left / 2**20:.0f} MiB are left of a model that is gone")
        samples += [{"row": name, **found} for found in pair]
        counts = [found["parameters"] + found["gradients"] + found["optimizer_state"] for found in pair]
        peaks = [found["peak_bytes"] for found in pair]
        share = unexplained((peaks[0], peaks[1]), (counts[0], counts[1]))
        key = name.replace(", ", "_").replace(" ", "_")
        summary |= {f"{key}_unexplained_share": share}
        if bar:
            summary |= {f"{key}_within_bar": abs(share) <= BAR}
        gib = [n / 2**30 for n in (*peaks, peaks[1] - peaks[0], counts[1] - counts[0])]
        rows.append([name, *(f"{n:.3f}" for n in gib), f"{share:+.2%}"])
        print(rows[-1], [round(found["seconds"], 1) for found in pair], flush=True)
    payload = {
        "what": "peak memory of 48 layers against 12, and what explains the difference", "unit": "bytes",
        "dtype": str(runtime.compute_dtype), "width": SigmaConfig().d_model, "tokens": [BATCH, LENGTH],
        "how": "eager blocks, no CUDA graph", "seconds": time.perf_counter() - began,
        "table": {
            "title": f"depth, {BATCH}x{LENGTH}, GiB",
            "header": [
                "mode", "12 layers", "48 layers", "difference", "parameters, gradients, state explain", "unexplained",
            ],
            "rows": rows,
        },
        "summary": summary, "samples": samples,
    }  # fmt: skip
    print(write_evidence("depth_memory", payload, device=str(device)))


if __name__ == "__main__":
    main()
