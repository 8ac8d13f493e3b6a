"""How kernels that write and read codes on their way are compiled: for each card, and run nowhere.

A card has few units that convert one number at a time, make exponentials and reciprocals: 16 numbers a clock and
multiprocessor, an eighth of its sums. What reads codes has sigmoids to make there already.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETED, compile_instead_of_running

from eco_llm.ops.quantize.reference import empty_codes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")]

TOKENS, WIDTH, INNER, CHANNELS, HIDDEN = 64, 768, 1536, 1792, 1664  # the default profile's
CAPABILITIES = (80, 89, 90, 120)
ALONE = re.compile(r"cvt\.rn\.(?:f32\.[su]\d+|bf16\.f32)\b")  # one number from an integer, one to bfloat16


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def codes_of(numel: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_codes(numel, bits, new(1))


def barriers(compiled: Any) -> int:
    return int(compiled.asm["ptx"].count("bar.sync"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_codes_are_read_and_results_rounded_in_pairs(
    capability: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eco_llm.ops.causal_conv import triton as conv
    from eco_llm.ops.gated_norm import triton as gated
    from eco_llm.ops.residual_norm import triton as residual
    from eco_llm.ops.swiglu import triton as swiglu

    def compiling(module: Any, *kernels: str) -> list[tuple[str, Any]]:
        return compile_instead_of_running(monkeypatch, module, *kernels, capability=capability)

    monkeypatch.setattr(residual, "sum_partials", lambda partials: [partials[0]])
    built = [
        compiling(conv, "conv_silu_forward_kernel", "conv_silu_backward_kernel"),
        compiling(gated, "gated_norm_backward_kernel"),
        compiling(residual, "residual_norm_kernel", "residual_norm_backward_kernel"),
        compiling(swiglu, "silu_mul_from_codes_kernel"),
    ]
    stream, weight, step = new(1, TOKENS, WIDTH, dtype=torch.float32), new(WIDTH, dtype=torch.float32), torch.tensor(0)
    normed = residual.residual_norm_to_codes(stream, new(1, TOKENS, WIDTH), weight, 1e-5, torch.bfloat16, bits, step, 0)
    kept = (normed.codes, normed.scales, normed.inverse, weight)
    residual.NormBackward(kept, bits, stream, torch.bfloat16)(new(1, TOKENS, WIDTH))

    y, gain = new(1, TOKENS, INNER), new(INNER, dtype=torch.float32)
    both = gated.Codes(*codes_of(y.numel(), bits), *codes_of(y.numel(), bits), bits)
    gated.gated_norm_backward_partials(y, y, y, gain, 1e-5, y, y, y, codes=both)

    x, taps, bias = new(1, TOKENS, CHANNELS), new(CHANNELS, 4, dtype=torch.float32), new(CHANNELS, dtype=torch.float32)
    of_x = conv.Codes(*codes_of(x.numel(), bits), bits)
    conv.conv_silu_forward(x, taps, bias, of_x)
    tail = new(2, 1, TOKENS, CHANNELS - INNER, dtype=torch.float32)
    conv.conv_silu_backward_partials(x, taps, bias, y, tail, x, of_x)

    dh = new(TOKENS, HIDDEN)
    swiglu.silu_mul_from_codes(swiglu.Codes(*codes_of(2 * dh.numel(), bits), bits), dh)
    assert [len(some) for some in built] == [2, 1, 2, 1]
    for name, compiled in (one for some in built for one in some):
        assert not ALONE.findall(compiled.asm["ptx"]), name
        assert compiled.asm["ptx"].count("cvt.rn.bf16x2.f32") > 0, name


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_thread_waits_for_others_on_behalf_of_codes(
    capability: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gated norm and SwiGLU have as many barriers with codes to write as without, but for one of 8 bits in SwiGLU:
    a thread stores 16 codes at once there, and 8 numbers.
    """
    from eco_llm.ops.gated_norm import triton as gated
    from eco_llm.ops.swiglu import triton as swiglu

    of_norm = compile_instead_of_running(monkeypatch, gated, "gated_norm_forward_kernel", capability=capability)
    of_mlp = compile_instead_of_running(
        monkeypatch, swiglu, "silu_mul_forward_kernel", "silu_mul_to_codes_kernel", capability=capability
    )
    y, z, gain, step = new(1, TOKENS, INNER), new(1, TOKENS, 3352)[..., :INNER], new(INNER).float(), torch.tensor(0)
    gated.gated_norm_forward(y, z, gain, 1e-5)
    gated.gated_norm_forward_to_codes(y, z, gain, 1e-5, bits, step, 0, 1)
    a = new(TOKENS, 2 * HIDDEN)
    swiglu.silu_mul_forward(a)
    swiglu.silu_mul_to_codes(a, bits, step, 0)
    for built, more in ((of_norm, 0), (of_mlp, int(bits == 8))):
        (_, plain), (_, coded) = built
        assert barriers(coded) == barriers(plain) + more
        assert coded.metadata.shared <= plain.metadata.shared + 4096 * more
