"""Claim: a SigmaLLM step against nanoGPT's at equal parameters and tokens.

    python benchmarks/against_nanogpt.py --peer PATH --shape 4x512|32x1024|1x65536
    python benchmarks/against_nanogpt.py --peer PATH --shape 8x256 --device cpu

PATH is a checkout of nanoGPT. Its model.py is used as it is, its step is that of its train.py: torch.compile, bf16
autocast, clip_grad_norm_(1.0), fused AdamW (on a CPU: what its configure_optimizers picks), zero_grad(set_to_none).
On a GPU also the same step captured as one CUDA graph (AdamW capturable). Ours is the step that `eco_train` runs:
C3O, on a GPU the whole-step graph, on a CPU compiled blocks. Both copy each batch from pinned host memory; none reads
one back.

Equal parameters: nanoGPT's own count, which leaves out its position table; ours within 3% (asserted). Gate: the
architectures differ, so both first losses must be within 5% of ln V and both losses finite and lower after the
timed steps. Sides alternate in one process; a sample is as many steps as take about 0.1 s. A is nanoGPT, B ours.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

from common import Comparison, GateError, interleave, seconds_of, write_evidence

from eco_llm.runtime import set_cache_dirs

BARS = {"4x512": (2.4, 1.0), "32x1024": (0.9, None), "1x65536": (3.0, None), "8x256": (1.0, None)}
"""What is asked of us: against nanoGPT compiled, against nanoGPT captured. Printed, never used in a measurement."""


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of nanoGPT")
    parser.add_argument("--shape", default="4x512", help="sequences × tokens a step")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=0, help="pairs measured; 0: about 9 s for each peer")
    parser.add_argument("--layers", type=int, default=0, help="0: 18 on CUDA, 6 on a CPU")
    parser.add_argument("--width", type=int, default=0, help="0: 768 on CUDA, 384 on a CPU")
    parser.add_argument("--vocab", type=int, default=0, help="0: 50304 on CUDA, 1024 on a CPU")
    parser.add_argument("--mamba-expand", type=int, default=2, help="of our model; its MLP takes up the difference")
    parser.add_argument("--loss-chunk-tokens", type=int, default=4096, help="of our model; the profiles' is 2048")
    parser.add_argument("--mamba-chunk", default="auto", choices=("auto", "64", "128", "256"))
    parser.add_argument("--weights-dtype", default="fp32", choices=("fp32", "bf16"), help="of our matrices")
    parser.add_argument("--c3o-state-dtype", default="fp32", choices=("fp32", "bf16", "int8", "int4"), help="of C3O")
    parser.add_argument("--eager", action="store_true", help="compile neither (a quick try; not evidence)")
    arguments = parser.parse_args()
    batch, length = (int(n) for n in arguments.shape.split("x"))
    set_cache_dirs()

    import torch
    from peers import describe, load_nanogpt, nanogpt_model
    from steps import Batches, Ours, clean, equal_mlp_width, gpt_flops_per_token, peak_flops, quiet

    from eco_llm.config import C3OConfig, RuntimeConfig, SigmaConfig
    from eco_llm.runtime import Runtime

    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    runtime = Runtime.detect(RuntimeConfig(device=arguments.device))
    device, on_cuda = runtime.device, runtime.device.type == "cuda"
    layers = arguments.layers or (18 if on_cuda else 6)
    width = arguments.width or (768 if on_cuda else 384)
    vocab = arguments.vocab or (50_304 if on_cuda else 1024)
    heads = width // 64
    module = load_nanogpt(arguments.peer)
    batches = Batches(vocab, batch, length, device)
    wait = torch.cuda.synchronize if on_cuda else None

    def allocated() -> int:
        clean(device)
        return torch.cuda.memory_allocated(device) if on_cuda else 0

    def peak_since(before: int) -> float | None:
        """Most memory that live tensors held since, GiB: weights, optimizer state, activations."""
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30 if on_cuda else None

    # ---- nanoGPT, as its train.py has it -------------------------------------------------------------------
    before = allocated()
    with torch.device(device):
        gpt = nanogpt_model(
            module, block_size=length, vocab_size=vocab, n_layer=layers, n_head=heads, n_embd=width,
            dropout=0.0, bias=False,
        )  # fmt: skip
    kind = device.type
    with quiet():
        adamw = gpt.configure_optimizers(1e-1, 1e-4, (0.9, 0.95), kind)
    gpt_call = gpt if arguments.eager else torch.compile(gpt)

    def gpt_body(inputs: torch.Tensor, targets: torch.Tensor, optimizer: Any) -> torch.Tensor:
        with runtime.autocast():
            _, loss = gpt_call(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    gpt_source = batches.cycle()

    def gpt_step() -> torch.Tensor:
        return gpt_body(*batches.to_device(gpt_source), adamw)

    started = time.perf_counter()
    gpt_first = float(gpt_step())
    gpt_step()  # the optimizer's state exists from here on
    gpt_seconds = time.perf_counter() - started
    gpt_peak = peak_since(before)
    gpt_parameters = gpt.get_num_params()

    # ---- ours ------------------------------------------------------------------------------------------------
    if on_cuda:
        shape = SigmaConfig(d_model=width, n_layers=layers, n_heads=heads, vocab_size=vocab)
    else:  # the proportions of presets/quickstart_cpu.txt
        shape = SigmaConfig(
            d_model=width, n_layers=layers, n_heads=heads, vocab_size=vocab,
            mamba_state_dim=32, kv_latent_dim=width // 2, rope_head_dim=16,
        )  # fmt: skip
    chunk = arguments.mamba_chunk
    ours_only = {
        "mamba_expand": arguments.mamba_expand, "mamba_chunk": chunk if chunk == "auto" else int(chunk),
        "loss_chunk_tokens": arguments.loss_chunk_tokens,
    }  # fmt: skip
    shape = SigmaConfig(**{**vars(shape), **ours_only})
    shape = SigmaConfig(**{**vars(shape), "mlp_hidden_dim": equal_mlp_width(shape, gpt_parameters)})
    started = time.perf_counter()
    before = allocated()
    c3o = C3OConfig(  # the profiles'
        c3o_sphere=1.0,
        c3o_trust_norm_refresh_drift=0.02 if on_cuda else 0.0,
        c3o_state_dtype=arguments.c3o_state_dtype,
    )
    bf16 = arguments.weights_dtype == "bf16"
    ours = Ours(
        shape, batches.cycle(), runtime, compile_blocks=False if arguments.eager else None, c3o=c3o, bf16_weights=bf16
    )
    our_first = float(ours.step())
    ours.step()
    our_seconds = time.perf_counter() - started
    our_peak = peak_since(before)
    our_parameters = ours.model.num_parameters()
    if not 0.97 <= our_parameters / gpt_parameters <= 1.03:
        raise GateError(f"parameters differ: nanoGPT {gpt_parameters:,}, ours {our_parameters:,}")

    # ---- gate, then speed --------------------------------------------------------------------------------------
    log_v = math.log(vocab)
    for name, loss in (("nanoGPT", gpt_first), ("ours", our_first)):
        if not abs(loss - log_v) <= 0.05 * log_v:
            raise GateError(f"{name}: first loss {loss:.4f} is not within 5% of ln V = {log_v:.4f}")

    def steps_a_sample(step: Any) -> int:
        step()
        one = statistics.median(seconds_of(step, wait)() for _ in range(3))
        return max(1, min(50, round(0.1 / one)))

    def compare(a: Any) -> tuple[Comparison, int]:
        """Paired samples of `a` and our step, in seconds a step."""
        count = max(steps_a_sample(a), steps_a_sample(ours.step))

        def several(step: Any) -> Any:
            def work() -> None:
                for _ in range(count):
                    step()

            measure = seconds_of(work, wait)
            return lambda: measure() / count

        one_pair = (several(a)() + several(ours.step)()) * count
        rounds = arguments.rounds or max(5, min(40, round(9 / one_pair)))
        return interleave(several(a), several(ours.step), rounds, warmup=2), count

    tokens = batch * length
    rate, rate_is = peak_flops(device)
    our_flops = ours.model.flops_per_token(length)
    gpt_flops = gpt_flops_per_token(gpt, layers, width, length)
    compared: dict[str, Comparison] = {}
    samples: list[dict[str, Any]] = []
    compared["compiled"], count = compare(gpt_step)
    samples += [{"a": "nanogpt compiled", "steps": count, **s} for s in compared["compiled"].samples()]
    if on_cuda:
        with quiet():
            capturable = gpt.configure_optimizers(1e-1, 1e-4, (0.9, 0.95), kind)
        for group in capturable.param_groups:
            group["capturable"] = True
        del adamw
        clean(device)
        graph = gpt_graph(gpt_body, capturable, batches)
        compared["graph"], count = compare(graph)
        samples += [{"a": "nanogpt graph", "steps": count, **s} for s in compared["graph"].samples()]
        gpt_last = float(graph())
    else:
        gpt_last = float(gpt_step())
    our_last = float(ours.step())
    for name, first, last in (("nanoGPT", gpt_first, gpt_last), ("ours", our_first, our_last)):
        if not last < first:  # also refuses NaN
            raise GateError(f"{name}: the loss went from {first:.4f} to {last:.4f}; no speed is reported")

    summary: dict[str, Any] = {
        "nanogpt_parameters": gpt_parameters,
        "nanogpt_position_parameters": gpt.transformer.wpe.weight.numel(),
        "sigma_parameters": our_parameters,
        "parameters_ratio": our_parameters / gpt_parameters,
        "mlp_hidden_dim": shape.mlp_hidden_dim,
        "tokens_per_step": tokens,
        "nanogpt_flops_per_token": gpt_flops,
        "sigma_flops_per_token": our_flops,
        "peak_flops": rate,
        "nanogpt_first_step_s": gpt_seconds,
        "sigma_first_step_s": our_seconds,
        "nanogpt_peak_memory_gib": gpt_peak,
        "sigma_peak_memory_gib": our_peak,
        "first_loss": [gpt_first, our_first],
        "last_loss": [gpt_last, our_last],
    }

    def line(seconds: float, flops: int, peak: float | None) -> list[str]:
        memory = "–" if peak is None else f"{peak:.1f}"
        return [f"{1e3 * seconds:.2f}", f"{tokens / seconds:,.0f}", f"{flops * tokens / seconds / rate:.1%}", memory]

    bars = BARS.get(arguments.shape, (None, None))
    for (name, result), bar in zip(compared.items(), bars, strict=False):
        summary |= {f"{name}_{key}": value for key, value in result.summary().items()}
        summary[f"{name}_nanogpt_mfu"] = gpt_flops * tokens / result.median_a / rate
        summary[f"{name}_sigma_mfu"] = our_flops * tokens / result.median_b / rate
        summary[f"{name}_nanogpt_tokens_per_s"] = tokens / result.median_a
        summary[f"{name}_sigma_tokens_per_s"] = tokens / result.median_b
        print(
            f"{arguments.shape} nanoGPT {name}: {1e3 * result.median_a:.2f} ms, {tokens / result.median_a:,.0f} tok/s,"
            f" MFU {summary[f'{name}_nanogpt_mfu']:.1%} | ours {1e3 * result.median_b:.2f} ms,"
            f" {tokens / result.median_b:,.0f} tok/s, MFU {summary[f'{name}_sigma_mfu']:.1%} | ratio {result.ratio:.3f}"
            f" ({result.ratio_low:.3f} – {result.ratio_high:.3f}), bar {bar}"
        )
    rows = [
        [f"nanoGPT {name}", *line(result.median_a, gpt_flops, gpt_peak if name == "compiled" else None), "", ""]
        for name, result in compared.items()
    ]
    first_pair = compared["compiled"]
    storage = (
        ""
        if arguments.weights_dtype == arguments.c3o_state_dtype == "fp32"
        else (f", {arguments.weights_dtype} weights, {arguments.c3o_state_dtype} state")
    )
    rows.append([f"SigmaLLM{storage}", *line(first_pair.median_b, our_flops, our_peak), "", ""])
    for row, result in zip(rows, compared.values(), strict=False):
        row[-2:] = [f"{result.ratio:.2f}", f"{result.ratio_low:.2f} – {result.ratio_high:.2f}"]
    main_pair = compared["compiled"].summary()
    payload = {
        "what": "training step; A nanoGPT, B SigmaLLM", "a": "nanoGPT compiled", "b": ours.how, "unit": "s",
        "peer": describe(arguments.peer, ["model.py", "train.py"]), "peak_flops_is": rate_is,
        "dtype": str(runtime.compute_dtype), "threads": torch.get_num_threads(),
        "model": {"layers": layers, "width": width, "heads": heads, "vocab": vocab, **ours_only},
        "how": ours.how,
        "storage": {"weights": arguments.weights_dtype, "c3o_state": arguments.c3o_state_dtype}, "c3o": vars(c3o),
        "table": {
            "title": f"{arguments.shape}",
            "header": ["step", "ms", "tokens/s", "MFU", "peak, GiB", "its time / ours", "95% interval"],
            "rows": rows,
        },
        "summary": main_pair | summary, "samples": samples,
    }  # fmt: skip
    print({k: v for k, v in summary.items() if "parameters" in k or "loss" in k or "first_step" in k or "memory" in k})
    if arguments.eager:
        print("--eager: no evidence is written")
        return
    suffix = "_" + "_".join((arguments.weights_dtype, arguments.c3o_state_dtype)) if storage else ""
    print(write_evidence(f"against_nanogpt_{arguments.shape}{suffix}", payload, device=str(device)))


def gpt_graph(body: Any, optimizer: Any, batches: Any) -> Any:
    """nanoGPT's step as one CUDA graph."""
    from steps import captured

    return captured(
        lambda inputs, targets: body(inputs, targets, optimizer),
        batches,
        lambda: optimizer.zero_grad(set_to_none=True),
    )


if __name__ == "__main__":
    main()
