"""Every operator of the package keeps PyTorch's rules for one, and none is left out here.

`torch.library.opcheck`: nothing is written that was given, no result is or shares memory with an input, the shapes and
types foretold without storage are those that come, and derivatives are registered where they are looked for.
On a GPU (`-m gpu`) or in Triton's interpreter: TRITON_INTERPRET=1 pytest -m gpu.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import KERNEL_DEVICE, normal
from torch import Tensor

import eco_llm.model
import eco_llm.ops
from eco_llm.ops.opaque import Operator

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-5
Arguments = tuple[Any, ...]


def leaf(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return normal(*shape, seed=seed, dtype=dtype).requires_grad_()


def plain(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.detach() if isinstance(t, Tensor) else t for t in tensors)


def add_norm(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    x, delta = leaf(2, 5, 24, seed=0, dtype=dtype), leaf(2, 5, 24, seed=1, dtype=narrow)
    weight = leaf(24, seed=2)
    return [(x, d, weight, EPS, narrow, keep) for d in (delta, None) for keep in (True, False)]


def add_norm_backward(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    found = []
    for x, delta, weight, _, _, keep in map(plain, add_norm(dtype, narrow)):
        d_total = normal(2, 5, 24, seed=3, dtype=dtype) if keep else None
        d_normed = normal(2, 5, 24, seed=4, dtype=narrow)
        found.append((d_total, d_normed, x, delta, weight, EPS, narrow))
    return found


def norm_of_sum(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    (*summed, _), (*alone, _) = add_norm(dtype, narrow)[::2]
    return [(*summed, None), (*alone, None), (*summed, normal(2, 5, 24, seed=3, dtype=narrow))]


def norm_of_sum_backward_beside(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    x, delta, weight, eps, _, beside = plain(norm_of_sum(dtype, narrow)[-1])
    return [(normal(2, 5, 24, seed=4, dtype=narrow), x, delta, weight, eps, beside)]


def gated_norm(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    wide = leaf(2, 5, 48, seed=0, dtype=narrow)
    y, z = leaf(2, 5, 24, seed=1, dtype=narrow), wide[..., 24:]  # z is part of a wider row, as in the mixer
    return [(y, z, leaf(24, seed=2), EPS)]


def gated_norm_backward(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    (arguments,) = gated_norm(dtype, narrow)
    return [(normal(2, 5, 24, seed=3, dtype=narrow), *plain(arguments))]


def convolution(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    return [(leaf(2, 9, 16, seed=0, dtype=narrow), leaf(16, 4, seed=1), leaf(16, seed=2))]


def convolution_backward(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    return [(*plain(convolution(dtype, narrow)[0]), normal(2, 9, 16, seed=3, dtype=narrow))]


def ssd(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    x = leaf(1, 70, 2, 64, seed=0, dtype=narrow)
    dt = normal(1, 70, 2, seed=1).abs().requires_grad_()
    a = (-normal(2, seed=2).abs()).requires_grad_()
    b, c = leaf(1, 70, 1, 32, seed=3, dtype=narrow), leaf(1, 70, 1, 32, seed=4, dtype=narrow)
    return [(x, dt, a, b, c, leaf(2, seed=5), leaf(1, 2, 64, 32, seed=6), 64), (x, dt, a, b, c, None, None, 64)]


def ssd_backward(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    dy, d_final = normal(1, 70, 2, 64, seed=7, dtype=narrow), normal(1, 2, 64, 32, seed=8)
    full, bare = map(plain, ssd(dtype, narrow))
    return [(dy, d_final, *full), (dy, None, *bare)]


def mixer(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    heads, inner, state, width = 2, 128, 32, 24
    channels = inner + 2 * state
    u = leaf(1, 66, width, seed=0, dtype=narrow)
    in_weight, out_weight = leaf(inner + channels + heads, width, seed=1), leaf(width, inner, seed=2)
    conv_weight, conv_bias, norm_weight = leaf(channels, 4, seed=3), leaf(channels, seed=4), leaf(inner, seed=5)
    dt_bias, a_log, d = (leaf(heads, seed=seed) for seed in (6, 7, 8))
    return [
        (u, in_weight, conv_weight, conv_bias, dt_bias, a_log, d, norm_weight, out_weight, state, EPS, 64)
    ]  # fmt: skip


def mixer_backward(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    from eco_llm.ops.mamba_mixer.triton import mixer_forward

    arguments = plain(mixer(dtype, narrow)[0])
    out, *kept = mixer_forward(*arguments)
    return [(normal(*out.shape, seed=9, dtype=out.dtype), *kept, *arguments)]


def mlp(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    return [(leaf(2, 5, 8, seed=0, dtype=narrow), leaf(24, 8, seed=1, dtype=dtype), leaf(8, 12, seed=2, dtype=dtype))]


def mlp_backward(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    x, gate_up, down = plain(mlp(dtype, narrow)[0])
    dy, a = normal(2, 5, 8, seed=3, dtype=narrow), normal(10, 24, seed=4, dtype=narrow)
    return [(dy, x, a, gate_up.to(narrow), down.to(narrow), dtype, dtype)]


def silu_mul(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    return [(normal(10, 24, seed=0, dtype=narrow),)]


def heads(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    """Three heads of 8 + 4 numbers (nope + rope), a latent of 16."""
    from test_mla_heads import NAMES, SHAPES, cases

    inputs, table, _ = cases(SHAPES[0], narrow, KERNEL_DEVICE)
    return [(*(inputs[name].requires_grad_() for name in NAMES), *table, 3, EPS)]


def heads_backward(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    from test_mla_heads import NAMES, SHAPES, cases

    inputs, table, gradients = cases(SHAPES[0], narrow, KERNEL_DEVICE)
    _, latent, weight, up = (inputs[name] for name in NAMES)
    return [(*(g.transpose(1, 2) for g in gradients), latent, weight, up, *table, EPS, up.dtype)]


def quantize(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    step = torch.tensor(3, device=KERNEL_DEVICE)
    return [(normal(3, 50, seed=0, dtype=narrow)[:, :41], bits, step, 1, True) for bits in (8, 4)]


def dequantize(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    from eco_llm.ops.quantize import quantize as make

    codes = [make(x, bits, step=step, stream=1, backend="triton") for x, bits, step, *_ in quantize(dtype, narrow)]
    return [(q.codes, q.scales, list(q.shape), q.dtype, bits, True) for q, bits in zip(codes, (8, 4), strict=True)]


def rotary_table(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    return [(7, 8, 1e4, torch.device(KERNEL_DEVICE))]


def taps_first(dtype: torch.dtype, narrow: torch.dtype) -> list[Arguments]:
    return [(leaf(6, 4, seed=0),)]


CASES: dict[str, Callable[[torch.dtype, torch.dtype], list[Arguments]]] = {
    "add_rms_norm": add_norm, "add_rms_norm_backward": add_norm_backward, "rms_norm_of_sum": norm_of_sum,
    "rms_norm_of_sum_backward_beside": norm_of_sum_backward_beside,
    "gated_rms_norm": gated_norm, "gated_rms_norm_backward": gated_norm_backward,
    "causal_conv_silu": convolution, "causal_conv_silu_backward": convolution_backward,
    "ssd": ssd, "ssd_backward": ssd_backward, "mamba_mixer": mixer, "mamba_mixer_backward": mixer_backward,
    "swiglu_mlp": mlp, "swiglu_mlp_backward": mlp_backward, "silu_mul": silu_mul,
    "mla_heads": heads, "mla_heads_backward": heads_backward,
    "quantize": quantize, "quantization_error": quantize, "dequantize": dequantize,
    "rotary_table": rotary_table, "taps_first": taps_first,
}  # fmt: skip
ELSEWHERE = {"onednn_matmul": "tests/ops/test_onednn.py"}  # of a CPU alone


def operators() -> dict[str, Operator]:
    """All that importing the package's operators and model registers, by name."""
    found: dict[str, Operator] = {}
    for package in (eco_llm.ops, eco_llm.model):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                values = vars(importlib.import_module(module.name)).values()
            except ModuleNotFoundError as error:
                if error.name == "triton":  # kernels, which are not to be had everywhere: no operator is there
                    continue
                raise
            found |= {v.overload.name().removeprefix("eco_llm::"): v for v in values if isinstance(v, Operator)}
    return {name.split(".")[0]: operator for name, operator in found.items()}


def test_no_operator_is_left_out() -> None:
    assert sorted(operators()) == sorted([*CASES, *ELSEWHERE])


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_operators_keep_the_rules(name: str, narrow: torch.dtype) -> None:
    for arguments in CASES[name](F32, narrow):
        torch.library.opcheck(operators()[name].overload, arguments, test_utils=CHECKS)
