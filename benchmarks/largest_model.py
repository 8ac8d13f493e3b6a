"""Claim: the largest model that trains in so much memory, 1 × 1024 tokens, and how fast.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python benchmarks/largest_model.py --vram-gib 8 --peer PATH

The allocator is held to the memory by `torch.cuda.set_per_process_memory_fraction`. Ours: bf16 weights (dithered
updates), C3O with 4-bit state, gradient release, coupled memory mode, the step as `eco_train` runs it. The peer, in the
same run: nanoGPT's model in bf16, every block recomputed, AdamW (bitsandbytes 8-bit where that is installed, else
PyTorch's on bf16 state) taken in hooks on each gradient. Sizes are tried from the largest down, each in a process of
its own (one that ran out of memory leaves some behind); the first that trains `--steps` steps counts.
Gate: the mean loss of the last ten steps is at least 1 below the first loss, on real text (bytes of PyTorch's sources).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import GateError, write_evidence
from peers import describe, load_nanogpt, nanogpt_model, recompute_blocks
from steps import Ours, Text, quiet

from eco_llm.config import C3OConfig, InstantConfig, OptimizerConfig, RuntimeConfig, SigmaConfig
from eco_llm.runtime import Runtime, set_cache_dirs
from eco_llm.training.outcome import is_out_of_memory

OURS = {  # width, layers
    8.0: ((2560, 28), (2560, 27), (2560, 26), (2560, 24)),
    12.0: ((3072, 30), (3072, 29), (3072, 28), (3072, 26)),
    24.0: ((4096, 34), (4096, 33), (4096, 32), (4096, 30)),
}
PEER = {  # the first of each does not fit beside 8-bit state on an H200: the limit is the peer's, not the list's
    8.0: ((2304, 30), (2304, 29), (2304, 28), (2304, 27), (2304, 26), (2048, 24), (2048, 22), (2048, 20)),
    12.0: ((2560, 38), (2560, 37), (2560, 36), (2560, 35), (2560, 34), (2560, 30), (2560, 27)),
    24.0: ((4096, 30), (4096, 29), (4096, 28), (4096, 27), (4096, 26), (3584, 30), (3584, 26)),
}
VOCAB = 32_768


Built = tuple[Callable[[], Any], int, str]
"""A step, the model's parameters, and how it is done."""


def ours(arguments: argparse.Namespace, width: int, layers: int, text: Text, runtime: Runtime) -> Built:
    """The step of `eco_train`, with the least memory a parameter."""
    shape = SigmaConfig(d_model=width, n_layers=layers, n_heads=width // 128, vocab_size=VOCAB)
    side = Ours(
        shape, text.cycle(), runtime, compile_blocks=False, graph=arguments.graph, bf16_weights=True, release=True,
        instant=InstantConfig(instant_mode="coupled"), c3o=C3OConfig(c3o_state_dtype=arguments.state),
        settings=OptimizerConfig(lr=arguments.lr, grad_clip=0.0),
    )  # fmt: skip
    return side.step, side.model.num_parameters(), f"{side.how}, bf16 weights, {arguments.state} state, release"


def peer(arguments: argparse.Namespace, width: int, layers: int, text: Text, runtime: Runtime) -> Built:
    """nanoGPT as a careful user would squeeze it."""
    module = load_nanogpt(arguments.peer)
    with quiet(), torch.device(runtime.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = nanogpt_model(
                module, block_size=1024, vocab_size=VOCAB, n_layer=layers, n_head=width // 128, n_embd=width,
                dropout=0.0, bias=False,
            )  # fmt: skip
        finally:
            torch.set_default_dtype(before)
    recompute_blocks(model)
    if importlib.util.find_spec("bitsandbytes"):
        Adam: Any = importlib.import_module("bitsandbytes.optim").AdamW8bit
        name, further = "bitsandbytes AdamW8bit", {}
    else:
        Adam = torch.optim.AdamW
        name, further = "torch AdamW, bf16 state", {"fused": True}
    for p in model.parameters():
        own = Adam([p], lr=arguments.lr, **further)

        def taken(parameter: Any, own: Any = own) -> None:
            own.step()
            own.zero_grad(set_to_none=True)

        p.register_post_accumulate_grad_hook(taken)
    source = text.cycle()

    def step() -> Any:
        inputs, targets = text.to_device(source)
        _, loss = model(inputs, targets)
        loss.backward()
        return loss.detach()

    return step, model.get_num_params(), f"nanoGPT, bf16, recompute, {name} in hooks, eager"


SIDES = {"SigmaLLM": ours, "nanoGPT": peer}


def attempt(side: str, width: int, layers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one size, in a fresh process; `out_of_memory` if it does not fit."""
    set_cache_dirs()
    runtime = Runtime.detect(RuntimeConfig(device="cuda"))
    device = runtime.device
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(arguments.vram_gib * 2**30 / total, device)
    found: dict[str, Any] = {"width": width, "layers": layers}
    try:
        text = Text(1, 1024, device, count=64)
        step, parameters, how = SIDES[side](arguments, width, layers, text, runtime)
        found |= {"parameters": parameters, "how": how}
        losses, seconds = [], []
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(arguments.steps):
            start = time.perf_counter()
            losses.append(float(step()))
            seconds.append(time.perf_counter() - start)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {**found, "out_of_memory": True}
    return {
        **found, "losses": losses, "seconds": seconds, "tokens_per_s": 1024 / statistics.median(seconds[5:]),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
    }  # fmt: skip


def largest(side: str, sizes: Sequence[tuple[int, int]], arguments: argparse.Namespace) -> dict[str, Any]:
    """The first of the sizes that trains, with what was tried before it."""
    tried = []
    for width, layers in sizes:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found = process.submit(attempt, side, width, layers, arguments).result()
        tried.append(found)
        print({k: v for k, v in found.items() if k not in ("seconds", "losses")}, flush=True)
        if "out_of_memory" in found:
            continue
        losses = found["losses"]
        if not (math.isfinite(losses[-1]) and statistics.fmean(losses[-10:]) < losses[0] - 1):
            raise GateError(f"{found['how']}: the loss did not fall: {losses[0]:.3f} … {losses[-1]:.3f}")
        return {**found, "tried": tried}
    raise GateError(f"{side}: no size of the list fits")


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vram-gib", type=float, default=8.0)
    parser.add_argument("--peer", type=Path, help="checkout of nanoGPT; left out, no peer is run")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--graph", action="store_true", help="ours as one CUDA graph")
    parser.add_argument("--state", default="int4", choices=("int4", "int8", "bf16"))
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--sizes", default="", help="ours, as 2560x26,2560x24; default: a list for 8, 12 and 24 GiB")
    arguments = parser.parse_args()

    sizes: Sequence[tuple[int, int]] = OURS[arguments.vram_gib]
    if arguments.sizes:
        pairs = (size.split("x") for size in arguments.sizes.split(","))
        sizes = tuple((int(width), int(layers)) for width, layers in pairs)
    sides = {"SigmaLLM": largest("SigmaLLM", sizes, arguments)}
    if arguments.peer:
        sides["nanoGPT"] = largest("nanoGPT", PEER[arguments.vram_gib], arguments)
    payload: dict[str, Any] = {
        "what": "largest model trained for some steps under a memory cap", "unit": "parameters",
        "cap_gib": arguments.vram_gib, "dtype": "torch.bfloat16",
        "table": {
            "title": f"largest model in {arguments.vram_gib:g} GiB, 1 × 1024",
            "header": ["", "parameters", "tokens/s", "peak / reserved, GiB", "loss, first and last"],
            "rows": [
                [f["how"], f"{f['parameters'] / 1e9:.2f} B", f"{f['tokens_per_s']:,.0f}",
                 f"{f['peak_gib']:.2f} / {f['reserved_gib']:.2f}", f"{f['losses'][0]:.2f}, {f['losses'][-1]:.2f}"]
                for f in sides.values()
            ],
        },
        "summary": {
            f"{name}_{k}": f[k] for name, f in sides.items() for k in ("parameters", "tokens_per_s", "peak_gib")
        },
        "samples": [{"side": name, **f} for name, f in sides.items()],
    }  # fmt: skip
    if arguments.peer:
        payload["peer"] = describe(arguments.peer, ["model.py"])
    print(write_evidence(f"largest_model_{arguments.vram_gib:g}gib", payload, device="cuda"))


if __name__ == "__main__":
    main()
