"""Claim: quantizing activations to 8 or 4 bits, and back, runs at the speed of a copy of the same bytes.

    python benchmarks/quantize.py [--rounds N]

x [batch, length, 3352] bf16 (what the Mamba mixer's in-projection writes) at 4 × 512 and 32 × 1024 tokens. A copies as
many bytes as B reads and writes in all, B quantizes, dequantizes or measures the error; each as a CUDA graph of several
calls on several buffers, together larger than the L2 cache. The ratio A / B is the fraction of copy bandwidth.

The Mamba mixer's convolution writes the codes of its input xBC, 1792 columns of that x. Rows "convolve": A convolves
and then quantizes, B does both in one launch; the ratio is the speedup. Rows "convolve_plain": A a copy, B no codes.

Gate: codes, scales and results equal the reference's bit for bit, |x̂ − x| stays within the scale, other steps give
other codes, and codes and scales take 1.9 and 3.5 times fewer bytes than bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from common import Comparison, GateError, interleave, write_evidence

from eco_llm.runtime import set_cache_dirs

SHAPES = ((4, 512, 3352), (32, 1024, 3352))  # batch, length, width
FIRST, CHANNELS, TAPS = 1536, 1792, 4  # the convolution's input among those columns
LEAST_RATIO = {8: 1.9, 4: 3.5}
CACHE = 192 << 20  # bytes that a turn of buffers moves at least


def bytes_moved(count: int, bits: int, itemsize: int = 2) -> dict[str, int]:
    """Bytes read and written by each of the three operations on `count` numbers, each byte once."""
    packed = count * bits // 8 + 2 * -(-count // 64)
    return {"quantize": count * itemsize + packed, "dequantize": packed + count * itemsize, "error": count * itemsize}


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    set_cache_dirs()

    import torch
    from steps import clean, seconds_each
    from torch import Tensor

    from eco_llm.ops.backend import kernels_for
    from eco_llm.ops.quantize import Quantized, dequantize, quantization_error, quantize

    if not torch.cuda.is_available():
        print("needs a CUDA device: the kernels are what is measured")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    if kernels_for(device).name != "triton":
        raise GateError(f"the kernels do not serve this machine: {kernels_for(device).why}")
    from eco_llm.ops.causal_conv.triton import conv_silu_forward, conv_silu_forward_to_codes

    step = torch.tensor(3, device=device)

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise GateError(f"{what}; no speed is reported")

    def gate(x: Tensor, bits: int) -> tuple[float, float]:
        """(relative error, bf16 bytes over bytes held); x is small enough for the reference."""
        q = quantize(x, bits, step=step, stream=1)
        plain = quantize(x, bits, step=step, stream=1, backend="reference")
        y = dequantize(q)
        same = torch.equal(q.codes, plain.codes) and torch.equal(q.scales, plain.scales)
        require(same and torch.equal(y, dequantize(plain, backend="reference")), f"{bits} bits: not the reference's")
        other = quantize(x, bits, step=step + 1, stream=1)
        require(not torch.equal(other.codes, q.codes), f"{bits} bits: the step changes nothing")
        scale = q.scales.float().repeat_interleave(64)[: x.numel()].view(x.shape)
        off = (y.float() - x.float()).abs()
        require(bool((off <= scale + y.float().abs() / 256).all()), f"{bits} bits: an error is above the scale")
        error, squares = quantization_error(x, bits, step, 1)
        expected = off.double().square().sum()
        require(abs(float(error / expected) - 1) < 1e-3, f"{bits} bits: the error is {float(error)}, not {expected}")
        ratio = x.numel() * 2 / q.nbytes
        require(ratio >= LEAST_RATIO[bits], f"{bits} bits: only {ratio:.3f} times fewer bytes")
        return float((error / squares).sqrt()), ratio

    def gate_convolution(x: Tensor, weight: Tensor, bias: Tensor, bits: int) -> None:
        y, codes = conv_silu_forward_to_codes(x, weight, bias, bits, step, 1)
        q = quantize(x, bits, step=step, stream=1, backend="reference")
        same = torch.equal(codes.codes, q.codes) and torch.equal(codes.scales, q.scales)
        require(same, f"{bits} bits: the convolution's codes are not the reference's")
        require(torch.equal(y, conv_silu_forward(x, weight, bias)), f"{bits} bits: the convolution is another")

    def graph_of(works: list[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, list[object]]:
        """All of them, one after the other, with what they read and write: kept, for replays go to the same memory."""
        for work in works[:2]:
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [work() for work in works]
        return graph, [*works, *results]

    samples: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    summary: dict[str, Any] = {}

    def copies(moved: int, count: int) -> list[Callable[[], object]]:
        half = moved // 2 // 16 * 16
        sources = [torch.empty(half, dtype=torch.uint8, device=device) for _ in range(count)]
        target = [torch.empty_like(source) for source in sources]
        return [lambda a=a, b=b: b.copy_(a) for a, b in zip(sources, target, strict=True)]  # type: ignore[misc]

    def compare(
        name: str, moved: int, works: list[Callable[[], object]], against: list[Callable[[], object]] | None = None
    ) -> Comparison:
        """`works` with `against`, by default copies of the bytes `moved`."""
        (a, _kept_a), (b, _kept_b) = graph_of(against or copies(moved, len(works))), graph_of(works)
        count = 5
        result = interleave(
            seconds_each(a.replay, torch.cuda.synchronize, count),
            seconds_each(b.replay, torch.cuda.synchronize, count),
            arguments.rounds,
            warmup=2,
        )
        calls = len(works)
        gigabytes = moved * calls / result.median_b / 1e9
        samples.extend({"what": name, "calls": calls, **s} for s in result.samples())
        key = f"{name}_{'speedup' if against else 'of_copy'}"
        summary[key] = result.ratio
        summary[f"{key}_low"], summary[f"{key}_high"] = result.ratio_low, result.ratio_high
        summary[f"{name}_us"] = 1e6 * result.median_b / calls
        interval = f"{result.ratio_low:.2f} to {result.ratio_high:.2f}"
        a_us, us = (1e6 * t / calls for t in (result.median_a, result.median_b))
        rows.append([name, round(a_us, 1), round(us, 1), round(gigabytes), round(result.ratio, 3), interval])
        print(*rows[-1], sep="\t", flush=True)
        return result

    def convolve(name: str, xs: list[Tensor], bits: int) -> None:
        generator = torch.Generator(device).manual_seed(1)
        weight = torch.randn(CHANNELS, TAPS, device=device, generator=generator)
        bias = torch.randn(CHANNELS, device=device, generator=generator)
        inputs = [x[..., FIRST : FIRST + CHANNELS] for x in xs]
        gate_convolution(inputs[0][:4, :512], weight, bias, bits)
        plain: list[Callable[[], object]] = [lambda x=x: conv_silu_forward(x, weight, bias) for x in inputs]  # type: ignore[misc]
        apart: list[Callable[[], object]] = [
            lambda x=x, i=i: (conv_silu_forward(x, weight, bias), quantize(x, bits, step=step, stream=i))  # type: ignore[misc]
            for i, x in enumerate(inputs)
        ]
        fused: list[Callable[[], object]] = [
            lambda x=x, i=i: conv_silu_forward_to_codes(x, weight, bias, bits, step, i)  # type: ignore[misc]
            for i, x in enumerate(inputs)
        ]
        count = inputs[0].numel()
        moved = 4 * count
        if bits == 8:
            compare(f"{name.removesuffix('_int8')}_convolve_plain", moved, plain)
        compare(f"{name}_convolve", moved + bytes_moved(count, bits)["quantize"] - 2 * count, fused, apart)

    for batch, length, width in SHAPES:
        for bits in (8, 4):
            count = batch * length * width
            moved = bytes_moved(count, bits)
            turn = max(2, -(-CACHE // moved["quantize"]))
            generator = torch.Generator(device).manual_seed(0)
            xs = [
                torch.randn(batch, length, width, device=device, dtype=torch.bfloat16, generator=generator)
                for _ in range(turn)
            ]
            name = f"{batch}x{length}x{width}_int{bits}"
            summary[f"{name}_relative_error"], summary[f"{name}_bytes_ratio"] = gate(xs[0][:4, :512], bits)
            qs = [quantize(x, bits, step=step, stream=i) for i, x in enumerate(xs)]
            kinds: dict[str, list[Callable[[], object]]] = {"quantize": [], "dequantize": [], "error": []}
            for i, (x, q) in enumerate(zip(xs, qs, strict=True)):

                def forward(x: Tensor = x, i: int = i, bits: int = bits) -> object:
                    return quantize(x, bits, step=step, stream=i)

                def back(q: Quantized = q) -> object:
                    return dequantize(q)

                def probe(x: Tensor = x, i: int = i, bits: int = bits) -> object:
                    return quantization_error(x, bits, step, i)

                kinds["quantize"].append(forward)
                kinds["dequantize"].append(back)
                kinds["error"].append(probe)
            for kind, works in kinds.items():
                if kind != "error" or bits == 4:
                    compare(f"{name}_{kind}", moved[kind], works)
            convolve(f"{batch}x{length}x{width}_int{bits}", xs, bits)
            del xs, qs, kinds, works
            clean(device)
    ratios = [v for k, v in summary.items() if k.endswith(("quantize_of_copy", "dequantize_of_copy"))]
    summary["worst_of_copy"] = min(ratios)
    print(f"worst fraction of copy bandwidth: {min(ratios):.2f}")
    payload = {
        "what": "one turn of buffers; A a copy of the same bytes, or convolving and then quantizing; B ours",
        "unit": "s", "dtype": "bfloat16",
        "backend": kernels_for(device).name,
        "table": {"header": ["work", "A, µs", "ours, µs", "GB/s", "A / ours", "95% interval"], "rows": rows},
        "summary": summary, "samples": samples,
    }  # fmt: skip
    print(write_evidence("quantize", payload, device=str(device)))


if __name__ == "__main__":
    main()
