"""Where each millisecond of the default profile goes, against the floor of bytes and FLOPs.

    python benchmarks/roofline.py [--shape 4x512|32x1024] [--steps N] [--no-graph]

Kernels of a few steps (the step `eco_train` runs in its default GPU profile: C3O on a sphere, weights and its state in
bf16) are summed by class, from torch.profiler's device times; each class has an analytic floor: the larger of its bytes
at this card's measured copy rate and its FLOPs at its measured bf16 matrix-product rate. `floors` below says what is
counted. Time in which the device had no kernel is its own row.
"""

from __future__ import annotations

import argparse
import re
import time
from typing import Any

from common import GateError, gpu_profile, write_evidence

from eco_llm.config import SigmaConfig
from eco_llm.runtime import set_cache_dirs

# First match wins. Kernels of ours have their op in the name; cuBLAS and CUTLASS call theirs gemm, nvjet or cutlass;
# Inductor's names list the operations it fused, so a fusion that ends in a norm counts as a norm.
CLASSES = (
    ("copies", r"memcpy|memset"),
    ("attention", r"flash|fmha|attention|cudnn.*sdpa|sdpa"),
    ("SSD", r"ssd|walk_kernel|output_kernel|gradient_kernel|finish_kernel|decay_kernel|cumsum|scan"),
    ("convolution", r"conv"),
    ("cross-entropy", r"cross_entropy|softmax|nll|_row_kernel|_scale_kernel"),
    (
        "optimizer",
        r"c3o|multi_tensor|foreach|adam|lpnorm|_(address|squares|plan|measure|trust|update|stored_norm)_kernel",
    ),
    ("embedding", r"embedding|index"),
    ("matrix products", r"gemm|gemv|nvjet|cutlass|cublas|splitk|xmma"),
    ("norms", r"norm|rsqrt"),
    ("elementwise", r"triton|elementwise|reduce|copy|cat|fill|kernel"),
)


def class_of(kernel: str) -> str:
    """The class of a kernel's name."""
    for name, pattern in CLASSES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return name
    return "other"


def floors(shape: SigmaConfig, batch: int, time: int, chunk: int, parameters: int) -> dict[str, tuple[float, float]]:
    """(bytes, FLOPs) a step of each class: what the mathematics needs, each tensor touched once a pass.

    bf16 activations, products, weights and moments; fp32 residual stream.

        matrix products  linear layers and head: forward, d input, d weight; operands read, results written
        attention        q, k, v, result forward; those, dy and three gradients backward; causal half of the products
        SSD              as in `mamba_mixer.py`; the smaller part of it that a chunk computes
        convolution      input read and result written forward; input, gradient, d input backward
        norms            pre-norms with residual sums: stream and what is added read, sum and norm written; then the sum
                         and both gradients read, dx written in both types; gated norms: y, z, g and d g, y, z, d y, d z
        elementwise      SwiGLU: gate, up, product forward; those three and their gradients backward
        cross-entropy    logits written by one product, read, their gradient written, read twice; in bf16
        optimizer        p, g, m, v read, p, m, v written (bf16, 14 bytes), and g read once more for the global norm
        embedding        rows gathered and gradient rows added
        copies           token numbers
    """
    tokens, d, f = batch * time, shape.d_model, shape.mlp_dim
    inner, state, heads = shape.mamba_inner_dim, shape.mamba_state_dim, shape.mamba_n_heads
    conv = inner + 2 * state
    mamba = shape.mixer_pattern.count("mamba")
    mla = shape.n_layers - mamba
    up = shape.n_heads * (2 * shape.head_dim - shape.rope_head_dim)
    linear = [(d, 2 * f, shape.n_layers), (f, d, shape.n_layers), (d, inner + conv + heads, mamba), (inner, d, mamba)]
    linear += [(d, d, 2 * mla), (d, shape.kv_latent_dim + shape.rope_head_dim, mla), (shape.kv_latent_dim, up, mla)]
    linear += [(d, shape.vocab_size, 1)]
    product_flops = sum(6 * tokens * k * n * count for k, n, count in linear)
    # Three products, each of which reads two of (input, weight, output-sized) and writes the third.
    product_bytes = sum(3 * 2 * (tokens * (k + n) + k * n) * count for k, n, count in linear)
    ssd_bytes = tokens * ((5 * inner + 6 * state) * 2 + 12 * heads)
    norm_bytes = tokens * d * (12 + 16) * (2 * shape.n_layers + 1) + mamba * tokens * inner * 2 * (3 + 5)
    return {
        "matrix products": (product_bytes, product_flops),
        "attention": (mla * tokens * d * 2 * (4 + 8), mla * 3 * 2 * tokens * time * d),
        "SSD": (mamba * ssd_bytes, mamba * 3 * tokens * (4 * inner * state + min(chunk, time) * (state + inner))),
        "convolution": (mamba * tokens * conv * 2 * 5, mamba * 3 * 2 * tokens * conv * shape.mamba_conv_width),
        "norms": (norm_bytes, 0.0),
        "elementwise": (shape.n_layers * tokens * f * 2 * (3 + 5), 0.0),
        "cross-entropy": (tokens * shape.vocab_size * 2 * 5, 0.0),
        "optimizer": (parameters * 16, 0.0),
        "embedding": (tokens * d * 4 * 2 * 2, 0.0),
        "copies": (tokens * 2 * 8 * 2, 0.0),
    }


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4x512", help="sequences × tokens a step")
    parser.add_argument("--steps", type=int, default=10, help="steps traced")
    parser.add_argument("--no-graph", action="store_true", help="without the whole-step graph (names of ranges stay)")
    arguments = parser.parse_args()
    batch, length = (int(n) for n in arguments.shape.split("x"))
    set_cache_dirs()

    import torch
    from steps import Batches, Ours, measured_rates, peak_flops
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from eco_llm.config import RuntimeConfig
    from eco_llm.ops.ssd import choose_chunk
    from eco_llm.runtime import Runtime

    runtime = Runtime.detect(RuntimeConfig(device="cuda"))
    runtime.setup(0)
    rates = measured_rates(runtime.device)
    shape = SigmaConfig()
    batches = Batches(shape.vocab_size, batch, length, runtime.device)
    shipped = gpu_profile()
    bf16 = shipped.runtime.weights_dtype == "bf16"
    ours = Ours(shape, batches.cycle(), runtime, graph=not arguments.no_graph, c3o=shipped.c3o, bf16_weights=bf16)
    first = float(ours.step())
    for _ in range(10):
        ours.step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(2 * arguments.steps):
        ours.step()
    torch.cuda.synchronize()
    step_ms = 1e3 * (time.perf_counter() - started) / (2 * arguments.steps)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(arguments.steps):
            loss = ours.step()
        torch.cuda.synchronize()
    if not float(loss) < first:
        raise GateError(f"the loss went from {first} to {float(loss)}; nothing is reported")

    kernels = [
        {
            "kernel": event.key,
            "class": class_of(event.key),
            "calls": event.count / arguments.steps,
            "ms": event.self_device_time_total / 1e3 / arguments.steps,
        }
        for event in trace.key_averages()
        if event.device_type == DeviceType.CUDA
        and event.self_device_time_total > 0
        and not event.key.startswith(("eco/", "Optimizer.", "ProfilerStep", "Torch-Compiled"))
    ]
    kernels.sort(key=lambda k: -k["ms"])
    floor = floors(shape, batch, length, choose_chunk(length), ours.model.num_parameters())
    by_class = {name: sum(k["ms"] for k in kernels if k["class"] == name) for name, _ in CLASSES}
    by_class["other"] = sum(k["ms"] for k in kernels if k["class"] == "other")
    busy = sum(by_class.values())
    rows: list[list[Any]] = []
    summary: dict[str, Any] = {"step_ms": step_ms, "kernels_ms": busy, "launches": sum(k["calls"] for k in kernels)}
    total_floor = 0.0
    for name in sorted(by_class, key=lambda n: -by_class[n]):
        ms = by_class[name]
        moved, flops = floor.get(name, (0.0, 0.0))
        by_bytes, by_flops = 1e3 * moved / rates["copy_bytes_per_s"], 1e3 * flops / rates["matmul_flops_per_s"]
        least = max(by_bytes, by_flops)
        total_floor += least
        key = name.replace(" ", "_").replace("-", "_").lower()
        summary |= {f"{key}_ms": ms, f"{key}_floor_ms": least}
        limit = "–" if least == 0 else "bytes" if by_bytes >= by_flops else "FLOPs"
        ratio = f"{ms / least:.1f}" if least > 0 and ms > 0 else "–"
        rows.append([name, f"{ms:.3f}", f"{ms / step_ms:.1%}", f"{least:.3f}", limit, ratio])
    idle = max(0.0, step_ms - busy)
    rows.append(["no kernel running", f"{idle:.3f}", f"{idle / step_ms:.1%}", "0", "–", "–"])
    rows.append(["step", f"{step_ms:.3f}", "100%", f"{total_floor:.3f}", "–", f"{step_ms / total_floor:.1f}"])
    rate, rate_is = peak_flops(runtime.device)
    flops_per_token = ours.model.flops_per_token(length)
    summary |= rates | {"floor_ms": total_floor, "idle_ms": idle, "tokens_per_s": 1e3 * batch * length / step_ms}
    summary["mfu"] = flops_per_token * summary["tokens_per_s"] / rate
    for row in rows:
        print("{:<20}{:>10}{:>9}{:>10}{:>8}{:>8}".format(*row))
    for k in kernels[:25]:
        print(f"{k['ms']:8.3f} ms {k['calls']:7.1f} × {k['class']:<16} {k['kernel'][:90]}")
    print(f"MFU {summary['mfu']:.1%}; {summary['launches']:.0f} kernels a step")
    header = ["class", "ms", "of the step", "floor, ms", "floor by", "times the floor"]
    payload = {
        "what": "device time of a training step by class", "how": ours.how, "peak_flops_is": rate_is,
        "table": {"title": arguments.shape, "header": header, "rows": rows}, "summary": summary, "samples": kernels,
    }  # fmt: skip
    print(write_evidence(f"roofline_{arguments.shape}", payload, device=str(runtime.device)))


if __name__ == "__main__":
    main()
