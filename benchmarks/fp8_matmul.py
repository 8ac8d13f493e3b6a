"""Claim (kept only if true): linear layers in fp8 (e4m3) are at least 1.1× bf16 at the widths we train.

    python benchmarks/fp8_matmul.py [--rounds N]

For each layer K → N and M tokens the three products of training: y = x·Wᵀ, dx = dy·W, dW = dyᵀ·x. A is bf16, B fp8
through torch._scaled_mm, twice: with operands already in fp8 (what the tensor cores give), and with the whole cost:
absolute maxima, scales and casts of x, W and dy, each in both layouts, compiled. Scales per tensor or per row.
Dimensions that fp8 cannot take (not a multiple of 16) are padded for B alone. Not in either side: fp32 → bf16 casts of
weights.

Gate: every fp8 product is within 6% (relative 2-norm) of the float32 product of the same operands (e4m3 keeps 3 bits).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from common import GateError, interleave, write_evidence

from eco_llm.runtime import set_cache_dirs

BAR = 1.1
LAYERS = (
    ("mamba in", 768, 3352), ("swiglu up", 768, 4096), ("swiglu down", 2048, 768),
    ("square 2048", 2048, 2048), ("wide 2048", 2048, 8192), ("square 4096", 4096, 4096), ("wide 4096", 4096, 16384),
)  # fmt: skip
TOKENS = (2048, 32_768)
LARGEST = 448.0  # of e4m3


def padded(n: int, multiple: int = 16) -> int:
    """n rounded up to what fp8 products take."""
    return -(-n // multiple) * multiple


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    set_cache_dirs()

    import torch
    from steps import clean, seconds_each
    from torch import Tensor

    if torch.cuda.get_device_capability() < (8, 9):
        print("this card has no fp8 tensor cores (Ada, Hopper or newer): nothing to measure")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    fp8 = torch.float8_e4m3fn

    def quantized(x: Tensor, rowwise: bool) -> tuple[Tensor, Tensor]:
        """x [r, c] in e4m3, row-major, and the scale that brings it back: [] or [r, 1] fp32."""
        amax = x.abs().amax(dim=1, keepdim=True) if rowwise else x.abs().amax()
        scale = amax.float().clamp(min=1e-12) / LARGEST
        return (x.float() / scale).to(fp8), scale

    def both_layouts(x: Tensor, rowwise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`quantized` of x and of xᵀ, each row-major."""
        if rowwise:
            return *quantized(x, True), *quantized(x.t().contiguous(), True)
        q, scale = quantized(x, False)
        return q, scale, q.t().contiguous(), scale

    prepare = torch.compile(both_layouts, dynamic=True)

    def product(a: Tensor, scale_a: Tensor, b_t: Tensor, scale_b: Tensor, rowwise: bool) -> Tensor:
        """a [m, k] · b_tᵀ, b_t [n, k]; both row-major."""
        if rowwise:
            scale_b = scale_b.t()
        return torch._scaled_mm(
            a, b_t.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def three(operands: Any, rowwise: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The three products from (row-major, scale, transposed, scale) of x [M, K], W [N, K] and dy [M, N]."""
        x, w, dy = operands
        return (
            product(x[0], x[1], w[0], w[1], rowwise),
            product(dy[0], dy[1], w[2], w[3], rowwise),
            product(dy[2], dy[3], x[2], x[3], rowwise),
        )

    samples: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    summary: dict[str, Any] = {}
    for name, k, n in LAYERS:
        for m in TOKENS:
            wide = padded(n)
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            w = torch.randn(wide, k, device=device, dtype=torch.bfloat16) * 0.02
            dy = torch.randn(m, wide, device=device, dtype=torch.bfloat16) * 1e-3
            w16, dy16 = w[:n].contiguous(), dy[:, :n].contiguous()

            def bf16(x: Tensor = x, w: Tensor = w16, dy: Tensor = dy16) -> object:
                return x @ w.t(), dy @ w, dy.t() @ x

            line: list[Any] = [f"{name} {k} → {n}", m]
            for kind, rowwise in (("tensorwise", False), ("rowwise", True)):
                ready = [prepare(t, rowwise) for t in (x, w, dy)]
                got = three(ready, rowwise)
                exact = (x.float() @ w.float().t(), dy.float() @ w.float(), dy.float().t() @ x.float())
                for part, a, b in zip(("y", "dx", "dW"), got, exact, strict=True):
                    if not (error := float((a.float() - b).norm() / b.norm())) <= 6e-2:
                        raise GateError(f"{name}, M {m}, {kind}: {part} is off by {error:.3g}; no speed is reported")
                del got, exact

                def raw(ready: Any = ready, rowwise: bool = rowwise) -> object:
                    return three(ready, rowwise)

                def whole(x: Tensor = x, w: Tensor = w, dy: Tensor = dy, rowwise: bool = rowwise) -> object:
                    return three([prepare(t, rowwise) for t in (x, w, dy)], rowwise)

                sides: tuple[tuple[str, Callable[[], object]], ...] = (("products", raw), ("with casts", whole))
                for what, side in sides:
                    wait, count = torch.cuda.synchronize, max(1, round(2e12 / (6 * m * k * n)))
                    count = min(count, 20)
                    result = interleave(
                        seconds_each(bf16, wait, count), seconds_each(side, wait, count), arguments.rounds, warmup=1
                    )
                    where = {"layer": name, "k": k, "n": n, "m": m, "scales": kind, "what": what}
                    samples += [{**where, **s} for s in result.samples()]
                    if what == "products" and kind == "tensorwise":
                        line.append(round(1e3 * result.median_a, 3))
                    line.append(round(result.ratio, 2))
                    key = f"{name}_{m}_{kind}_{what}".replace(" ", "_")
                    summary[f"{key}_ratio"] = result.ratio
                    summary[f"{key}_low"], summary[f"{key}_high"] = result.ratio_low, result.ratio_high
            rows.append(line)
            print(*line, sep="\t", flush=True)
            clean(device)
    default = [v for k_, v in summary.items() if k_.endswith("with_casts_ratio") and k_.startswith(("mamba", "swiglu"))]
    wider = [v for k_, v in summary.items() if k_.endswith("with_casts_ratio") and k_.startswith(("square", "wide"))]
    summary["best_at_default_width"], summary["best_at_wider"] = max(default), max(wider)
    summary["layers_at_bar"] = sum(v >= BAR for v in default + wider)
    summary["layers"] = len(default + wider)
    print(f"with casts, best ratio at default width {max(default):.2f}, wider {max(wider):.2f}; the bar is {BAR}")
    header = [
        "layer", "M", "bf16, ms", "tensorwise, products", "tensorwise, with casts", "rowwise, products",
        "rowwise, with casts",
    ]  # fmt: skip
    payload = {
        "what": "three products of a linear layer; A bf16, B fp8", "unit": "s", "summary": summary,
        "samples": samples, "table": {"header": header, "rows": rows},
    }  # fmt: skip
    print(write_evidence("fp8_matmul", payload, device=str(device)))


if __name__ == "__main__":
    main()
