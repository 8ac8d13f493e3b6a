"""Claim: memory against tokens a second of every memory mode, beside a plain PyTorch decoder's, at equal parameters.

    python benchmarks/instant_modes.py --peer PATH [--shapes 8x1024,32x1024,1x8192,4x8192] [--cap-gib 8]

PATH is a checkout of nanoGPT; its model as it is, compiled, fused AdamW, bf16 autocast, clipping; `recompute` wraps
each of its blocks in torch.utils.checkpoint. Ours: the step that `eco_train` runs, compiled blocks, C3O, no CUDA graph
(whose private pool would blur the memory). Every row is a model of its own in one process, one after the other: peak is
the most that live tensors held from before the model was made; a row that does not fit under the cap says so.
Modes that decide by probes are given one before they are timed. Gate: first losses within 5% of ln V, all finite.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

from common import GateError, write_evidence

from eco_llm.runtime import set_cache_dirs

MODES = ("none", "recompute", "compress", "compress 4 bits", "fixed-point", "coupled")
PEERS = ("nanoGPT", "nanoGPT recompute")


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of nanoGPT")
    parser.add_argument("--shapes", default="8x1024,32x1024,1x8192,4x8192", help="sequences × tokens, comma between")
    parser.add_argument("--rows", default=";".join((*MODES, *PEERS)), help="modes and peers, semicolon between")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--cap-gib", type=float, default=0.0, help="as on a smaller card; 0: none")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed for each row")
    parser.add_argument("--name", default="", help="of the evidence file, after instant_modes")
    arguments = parser.parse_args()
    set_cache_dirs()

    import torch
    from peers import describe, load_nanogpt, nanogpt_model
    from steps import Batches, Ours, clean, equal_mlp_width, quiet
    from torch.utils.checkpoint import checkpoint

    from eco_llm.config import InstantConfig, RuntimeConfig, SigmaConfig
    from eco_llm.runtime import Runtime
    from eco_llm.training.outcome import is_out_of_memory

    runtime = Runtime.detect(RuntimeConfig(device="cuda"))
    device = runtime.device
    torch.backends.cuda.matmul.allow_tf32 = True
    if arguments.cap_gib:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.cap_gib * 2**30 / total, device)
    layers, width, vocab, heads = arguments.layers, arguments.width, arguments.vocab, arguments.width // 64
    module = load_nanogpt(arguments.peer)

    def gpt(length: int) -> Any:
        with quiet(), torch.device(device):
            return nanogpt_model(
                module, block_size=length, vocab_size=vocab, n_layer=layers, n_head=heads, n_embd=width,
                dropout=0.0, bias=False,
            )  # fmt: skip

    with torch.device("meta"), quiet():
        parameters = nanogpt_model(
            module,
            block_size=1024,
            vocab_size=vocab,
            n_layer=layers,
            n_head=heads,
            n_embd=width,
            dropout=0.0,
            bias=False,
        ).get_num_params()
    shape = SigmaConfig(d_model=width, n_layers=layers, n_heads=heads, vocab_size=vocab)
    shape = SigmaConfig(**{**vars(shape), "mlp_hidden_dim": equal_mlp_width(shape, parameters)})

    def peer(row: str, batches: Batches, length: int) -> Any:
        model = gpt(length)
        with quiet():
            optimizer = model.configure_optimizers(1e-1, 1e-4, (0.9, 0.95), "cuda")
        if row.endswith("recompute"):
            for block in model.transformer.h:
                inner = block.forward
                block.forward = lambda x, f=inner: checkpoint(f, x, use_reentrant=False)
        call, source = torch.compile(model), batches.cycle()

        def step() -> torch.Tensor:
            inputs, targets = batches.to_device(source)
            with runtime.autocast():
                _, loss = call(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step, {}

    def ours(row: str, batches: Batches) -> Any:
        mode, _, bits = row.partition(" ")
        instant = InstantConfig(instant_mode=mode, instant_bits="4" if bits else "8")
        model = Ours(shape, batches.cycle(), runtime, graph=False, instant=instant)
        notes: dict[str, Any] = {}
        if mode == "fixed-point":
            for _ in range(60):  # at initialisation hardly a block contracts
                model.step()
            torch.cuda.synchronize()
            model.review(200)

        def step() -> torch.Tensor:
            loss = model.step()
            notes.update(model.model.stack.figures())
            return loss

        return step, notes

    rows: list[dict[str, Any]] = []
    for text in arguments.shapes.split(","):
        batch, length = (int(n) for n in text.split("x"))
        batches = Batches(vocab, batch, length, device, count=2)
        for row in arguments.rows.split(";"):
            clean(device)
            torch._dynamo.reset()
            before = torch.cuda.memory_allocated(device)
            found: dict[str, Any] = {"shape": text, "row": row}
            began = time.perf_counter()
            try:
                step, notes = ours(row, batches) if row.split(" ")[0] != "nanoGPT" else peer(row, batches, length)
                first = float(step())
                step()
                torch.cuda.synchronize()
                found["ready_s"] = time.perf_counter() - began
                torch.cuda.reset_peak_memory_stats(device)
                samples: list[float] = []
                end = time.perf_counter() + arguments.seconds
                while len(samples) < 3 or time.perf_counter() < end:
                    start = time.perf_counter()
                    last = float(step())
                    samples.append(time.perf_counter() - start)
                if not (
                    math.isfinite(last)
                    and (row == "fixed-point" or abs(first - math.log(vocab)) < 0.05 * math.log(vocab))
                ):
                    raise GateError(f"{text} {row}: losses {first:.4f} … {last:.4f}")
                seconds = statistics.median(samples)
                found |= {
                    "tokens_per_s": batch * length / seconds, "step_s": seconds, "steps": len(samples),
                    "peak_gib": (torch.cuda.max_memory_allocated(device) - before) / 2**30,
                    "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
                    "first_loss": first, "last_loss": last, **notes,
                }  # fmt: skip
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                found["out_of_memory"] = True
            step = notes = None
            rows.append(found)
            print(found, flush=True)

    def cells(found: dict[str, Any]) -> list[str]:
        if "tokens_per_s" not in found:
            return [found["shape"], found["row"], "does not fit", ""]
        return [found["shape"], found["row"], f"{found['tokens_per_s']:,.0f}", f"{found['peak_gib']:.2f}"]

    payload = {
        "what": "tokens a second and peak memory of each memory mode", "unit": "tokens/s", "cap_gib": arguments.cap_gib,
        "peer": describe(arguments.peer, ["model.py"]), "parameters": parameters, "dtype": str(runtime.compute_dtype),
        "model": {"layers": layers, "width": width, "vocab": vocab, "mlp_hidden_dim": shape.mlp_hidden_dim},
        "table": {
            "title": "memory modes" + (f", {arguments.cap_gib:g} GiB" if arguments.cap_gib else ""),
            "header": ["tokens a step", "mode", "tokens/s", "peak, GiB"], "rows": [cells(found) for found in rows],
        },
        "summary": {"rows": len(rows)}, "samples": rows,
    }  # fmt: skip
    print(
        write_evidence("instant_modes" + (f"_{arguments.name}" if arguments.name else ""), payload, device=str(device))
    )


if __name__ == "__main__":
    main()
